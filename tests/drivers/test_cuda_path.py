"""The CUDA path as far as a CPU can run it: steps of fixed shapes, two steps under way, and the Triton kernels
in Triton's interpreter. Where there is a CUDA device the kernels are compiled and run on it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmasos.drivers.torch import attention, loader
from llmasos.drivers.torch.executor import TorchDriver

from . import test_conformance as conformance
from .conftest import Subject, Tiny, start

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Read when triton is first imported, which others may do: so these tests have a process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="run by test_the_kernels_interpreted")


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_kernels)])
def subject(
    request: pytest.FixtureRequest, tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Subject]:
    if request.param == "triton":
        from llmasos.drivers.torch.triton_ops import TritonOps

        for module in (attention, loader):
            monkeypatch.setattr(module, "ops_for", TritonOps)
    model = tiny("llama")
    driver = TorchDriver("cpu", static=True)
    yield Subject(start(driver, model.files), model.greedy)
    driver.close()


globals().update({k: v for k, v in vars(conformance).items() if k.startswith("test_")})
