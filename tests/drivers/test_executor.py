"""What the torch driver does when a step goes wrong, and what it says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llmasos.drivers import base
from llmasos.drivers.torch import ops
from llmasos.drivers.torch.attention import KvPool
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.syscalls import errors

from .conftest import file_of, index_of, start


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_is_tried_once_more(
    kernel_of: Callable[..., Any],
    tiny: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
) -> None:
    kernel = kernel_of("llama")
    gather, failures = KvPool.gather, iter([True, False])

    def flaky(pool: KvPool, layer: int, table: torch.Tensor) -> torch.Tensor:
        if layer == 2 and next(failures, False):
            raise problem
        return gather(pool, layer, table)

    monkeypatch.setattr(KvPool, "gather", flaky)
    assert kernel.generate([kernel.open([1, 2, 3])], 4) == [tiny("llama").greedy([1, 2, 3], 4)]


class _Ended(BaseException):
    pass


@pytest.mark.parametrize("lost", [True, False])
def test_a_broken_cuda_context_ends_the_process(
    kernel_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lost: bool,
) -> None:
    """For it stays broken; of another error the worker tells, and goes on."""

    def fail(*_: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    def end(code: int) -> None:
        raise _Ended(code)

    kernel = kernel_of("llama")
    seq = kernel.open([1, 2, 3])
    monkeypatch.setattr(KvPool, "gather", fail)
    monkeypatch.setattr(kernel.driver, "_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", fail if lost else lambda *_: None)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(_Ended if lost else RuntimeError):
        kernel.step([(seq, 3)])
    assert ("illegal memory access" in capsys.readouterr().err) == lost
    kernel.driver._device = torch.device("cpu")


def test_kernels_that_do_not_compile_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """For lack of a C compiler, Python's headers, a newer driver."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("llmasos.drivers.torch.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    ops.triton_trouble.cache_clear()
    assert "Triton does not work here: " in ops.triton_trouble(device)
    assert not ops.has_triton(device)
    assert isinstance(ops.ops_for(device), ops.TorchOps)
    ops.triton_trouble.cache_clear()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((9, 0), "bfloat16")])
def test_old_cards_compute_in_float32(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    driver: Any = TorchDriver("cpu")
    driver._device = torch.device("cuda", 0)
    assert driver._dtype(base.LoadSpec(1, {}, "", 0.5), SimpleNamespace(stored="F32")) == dtype


def test_out_of_memory_twice_says_who_holds_what(
    kernel_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = kernel_of("llama")
    seq = kernel.open([1, 2, 3])

    def full(pool: KvPool, layer: int, table: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(KvPool, "gather", full)
        with pytest.raises(errors.DeviceFault, match=r"3 tokens; model 1: weights .* MB, KV .* 1 sequences"):
            kernel.step([(seq, 3)])
    [out] = kernel.step([(seq, 3)])
    assert "not open" in out.error  # what was half done is forgotten


def test_a_broken_row_fails_its_sequence_and_leaves_no_nan(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    place = index_of(model.folder / "model.safetensors")["tensors"]["model.embed_tokens.weight"]["offset"]
    data = bytearray((model.folder / "model.safetensors").read_bytes())
    row = place + 5 * 64 * 4
    data[row : row + 64 * 4] = np.full(64, np.nan, np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    kernel = start(
        TorchDriver("cpu"), {**model.files, "model.safetensors": file_of(tmp_path / "model.safetensors")}
    )
    good, bad = kernel.open([1, 2, 3]), kernel.open([5] * 20)
    first, second = kernel.step([(good, 3), (bad, 20)])
    assert first.tokens == model.greedy([1, 2, 3], 1)
    assert "finite" in second.error
    written = np.frombuffer(kernel.driver.export_blocks(1, good.blocks + bad.blocks), np.float32)
    assert np.isfinite(written).all()
    [again] = kernel.step([(bad, 20)])
    assert "finite" in again.error


def test_the_description_names_engine_and_threads(kernel_of: Callable[..., Any]) -> None:
    found = kernel_of("llama").driver.describe()
    assert torch.__version__ in found.text
    assert "thread" in found.text
    assert (found.step_tokens, found.max_sequences) == (256, 32)
    assert found.dtypes == ["float32", "bfloat16"]
    assert 0 < found.memory_free <= found.memory_total


def test_unloading_forgets_the_model(kernel_of: Callable[..., Any]) -> None:
    kernel = kernel_of("gpt2")
    kernel.driver.unload(1)
    with pytest.raises(errors.DeviceFault, match="handle 1"):
        kernel.step([(kernel.open([1]), 1)])
    with pytest.raises(errors.DeviceFault, match="ticket 42"):
        kernel.driver.collect(42)
    with pytest.raises(errors.DeviceFault):
        kernel.driver.export_blocks(1, [0])


def test_a_batch_without_work_only_changes_the_mirror(kernel_of: Callable[..., Any]) -> None:
    kernel = kernel_of("gpt2")
    batch = base.Batch(7, 1, [3], [], [(0, 1)], [])
    assert kernel.driver.collect(kernel.driver.submit(batch)).outputs == []


def test_a_worker_does_not_wait_for_torchs_compiler() -> None:
    """Seconds of each start."""
    code = "import sys, llmasos.drivers.torch.group; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
