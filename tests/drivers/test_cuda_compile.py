"""The Triton kernels compile for an H100, which needs no device. What they compute is test_cuda_path's to
say."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_path compiles them for this device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they are interpreted"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SHARED_MEMORY = 227 << 10  # bytes that a block of threads may have

_ATTENTION = {
    "tables": "*i32",
    "lengths": "*i64",
    "sinks": "*fp32",
    "parts": "*fp32",
    "peaks": "*fp32",
    "sums": "*fp32",
}
_PLACE = {"slots": "*i64", "turns": "*fp32"}
_SAMPLE = {"logits": "*fp32", "numbers": "*i64", "reals": "*fp32", "out": "*i64"}


def compiled(kernel: Any, types: dict[str, str], fixed: dict[str, Any], **options: int) -> Any:
    """Arguments without a type that are not fixed are i32; pointers are aligned as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*")
    }
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


class _H100:
    """What Triton asks a device's driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the functions that launch kernels have compiled for an H100; nothing is launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_H100())
    made: list[Any] = []
    run: Any = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        made.append(run(self, *args, warmup=True, **options))
        assert made[-1].metadata.shared <= SHARED_MEMORY

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return made


def test_what_differs_between_steps_compiles_no_kernel_anew(launched: list[Any]) -> None:
    """Or the first steps of each batch size and context length would wait for a compiler."""
    from llmasos.drivers.torch.kernels import attention, linear, sampling

    half = torch.bfloat16
    for rows, width in ((1, 1), (3, 16), (16, 40)):
        query, kv = torch.zeros(rows, 8, 64, dtype=half), torch.zeros(4, 3, 16, 64, dtype=half)
        tables, lengths = torch.zeros(rows, width, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
        attention.attend(query, kv, tables, lengths, 0.1, 0, 0.0, None, 8)
        weight = torch.zeros(256, 512, dtype=torch.int8)
        linear.matmul(torch.zeros(rows, 512, dtype=half), weight, torch.ones(256), None, None, 132)
        sampling.sample(torch.zeros(4, 300), torch.zeros(4, rows, dtype=torch.int64), torch.ones(3, rows))
    assert len({id(kernel) for kernel in launched}) == len(launched) / 3


def test_a_mixed_step_splits_by_the_context_that_the_model_has() -> None:
    """Not by the longest in the batch: each number of splits is a kernel to compile."""
    import array

    from llmasos.drivers.mirror import Piece, Sequence
    from llmasos.drivers.torch import attention
    from llmasos.drivers.torch.config import Shape
    from llmasos.drivers.torch.triton_ops import TritonOps
    from llmasos.syscalls import types as t

    cpu = torch.device("cpu")
    pool = attention.KvPool(Shape(1, 2, 2, 8, 4096, 97), 9, torch.float32, cpu)
    pool.ops = TritonOps(cpu)
    sequence = Sequence(1, array.array("I", range(9)), 9, 8, 99, array.array("i", [0]), t.Sampling(seed=0))
    plan: Any = attention.Plan(pool, [Piece(0, sequence, 8, 9, True, 0)], {0})
    assert plan._paged.longest == 4096


@pytest.mark.parametrize("type_", ["*bf16", "*fp32"])
@pytest.mark.parametrize(("dim", "splits", "window"), [(64, 1, 0), (128, 64, 0), (256, 8, 1024)])
def test_attention(type_: str, dim: int, splits: int, window: int) -> None:
    from llmasos.drivers.torch.kernels import attention

    types = {**_ATTENTION, "query": type_, "kv": type_, "out": type_, "scale": "fp32", "softcap": "fp32"}
    fixed = {"WINDOW": window, "DIM": dim, "DIM_PAD": dim, "LEAST": 128, "SPLITS": splits, "SUNK": window > 0}
    fixed["TILE"] = 64 if dim * (2 if type_ == "*bf16" else 4) <= 512 else 32
    own = {"KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": 16, "PAGE": 16, "CAPPED": window > 0}
    made = compiled(attention._attend, types, {**fixed, **own}, num_warps=4, num_stages=3)
    assert made.metadata.shared <= SHARED_MEMORY
    merging = {name: types[name] for name in types if name in attention._merge.arg_names}
    assert compiled(attention._merge, merging, {**fixed, "HEADS": 32}, num_warps=4).asm["cubin"]


def test_layers_and_sampling() -> None:
    from llmasos.drivers.torch.kernels import layer, sampling

    half = dict.fromkeys(("x", "delta", "weight", "out", "rows", "pool", "norm"), "*bf16")
    half["epsilon"] = "fp32"
    assert compiled(layer._add_norm, half, {"ADDS": True, "PAD": 4096}, num_warps=8).asm["cubin"]
    assert compiled(layer._gate, half, {"TILE": 1024}, num_warps=4).asm["cubin"]
    fixed = {
        "FIRST": 0,
        "HEADS": 32,
        "KV_HEADS": 8,
        "DIM": 128,
        "HALF_PAD": 64,
        "TURNED": True,
        "NORMED": True,
    }
    assert compiled(layer._place, {**half, **_PLACE}, fixed, num_warps=1).asm["cubin"]
    assert compiled(sampling._sample, _SAMPLE, {"TILE": 4096}, num_warps=16).asm["cubin"]


@pytest.mark.parametrize(("stored", "scales"), [("*i8", "*fp32"), ("*fp8e4nv", "*fp32"), ("*u8", "*fp16")])
@pytest.mark.parametrize(("tile", "depth", "stages"), [(16, 128, 4), (64, 64, 3)])
def test_quantised_products(stored: str, scales: str, tile: int, depth: int, stages: int) -> None:
    from llmasos.drivers.torch.kernels import linear

    types = {"x": "*bf16", "stored": stored, "scales": scales, "lows": scales, "bias": "*bf16"}
    shared = {"FOUR": stored == "*u8", "BIASED": True, "SPLITS": 4}
    fixed = {**shared, "TILE_M": tile, "TILE_N": 2 * tile, "TILE_K": depth}
    made = compiled(linear._matmul, {**types, "out": "*fp32"}, fixed, num_warps=4, num_stages=stages)
    assert made.metadata.shared <= SHARED_MEMORY
    adding = {"parts": "*fp32", "scales": scales, "bias": "*bf16", "out": "*bf16"}
    assert compiled(linear._add_up, adding, shared).asm["cubin"]
