"""Triton kernels of the CUDA path, each file with the functions that launch them. Imported only where Triton
is (`ops.py`); with TRITON_INTERPRET=1 they run on CPU tensors, which is how the tests run them.

Compiled for sm_90 and run in the interpreter; none of them had been run on a device when it was written
(docs/decisions.md, "CUDA: written, not yet run").
"""
