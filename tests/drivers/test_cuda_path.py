"""The CUDA path as far as a CPU can run it: steps of fixed shapes, two steps under way, quantised weights,
and the Triton kernels in Triton's interpreter. Where there is a CUDA device the kernels are compiled and run
on it.

The interpreter is slow, so a selection runs with it by default; all of it:

    TRITON_INTERPRET=1 python -m pytest tests/drivers/test_cuda_path.py
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from llmasos.drivers import base
from llmasos.drivers.mirror import Piece, Sequence
from llmasos.drivers.torch import attention, flight, graphs, loader, models, quantised, sampler
from llmasos.drivers.torch.config import Config, Shape
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.drivers.torch.ops import PagedRows, TorchOps, Turn
from llmasos.drivers.torch.weights import Checkpoint
from llmasos.syscalls import errors
from llmasos.syscalls import types as t
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import test_conformance as conformance
from .conftest import CONFIGS, Kernel, Subject, Tiny, start

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# Read when triton is first imported, which others may do: so what needs it has a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernels = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="see test_the_kernels_in_the_interpreter"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

SELECTED = "kernel or (triton and (mix or penalised or logprobs_come or only_the_device))"


def prompt(length: int, seed: int = 1) -> list[int]:
    return conformance.prompt(length, seed)


@needs_triton
@pytest.mark.skipif(CUDA or INTERPRETED, reason="they run in this process")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", SELECTED]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:]


def kernel_ops() -> Any:
    from llmasos.drivers.torch.triton_ops import TritonOps

    return TritonOps(DEVICE)


# -- what every driver must do, in steps of fixed shapes -------------------------------------------------


@pytest.fixture(params=["torch", "triton"] if CUDA or INTERPRETED else ["torch"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which operators the models and pools of a test use."""
    made = TorchOps() if request.param == "torch" else kernel_ops()
    for module in (attention, loader):
        monkeypatch.setattr(module, "ops_for", lambda device: made)
    name: str = request.param
    return name


@pytest.fixture
def static_kernel(ops: str, tiny: Callable[[str], Tiny]) -> Iterator[Callable[[str], Kernel]]:
    drivers: list[TorchDriver] = []

    def make(name: str) -> Kernel:
        drivers.append(TorchDriver(DEVICE.type if ops == "triton" else "cpu", static=True))
        return start(drivers[-1], tiny(name).files)

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def subject(static_kernel: Callable[[str], Kernel], tiny: Callable[[str], Tiny]) -> Subject:
    return Subject(static_kernel("llama"), tiny("llama").greedy)


globals().update({name: test for name, test in vars(conformance).items() if name.startswith("test_")})


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_decodes_the_same_in_fixed_shapes(
    static_kernel: Callable[[str], Kernel], tiny: Callable[[str], Tiny], name: str
) -> None:
    kernel = static_kernel(name)
    prompts = [prompt(length, seed=length) for length in (40, 7, 17)]
    found = kernel.generate([kernel.open(tokens) for tokens in prompts], 6)
    assert found == [tiny(name).greedy(tokens, 6) for tokens in prompts]


@pytest.mark.parametrize("ops", ["torch"], indirect=True)
@pytest.mark.parametrize("count", [1, 3, 9, 33])
def test_padded_batches_equal_the_ordinary_path(
    static_kernel: Callable[[str], Kernel],
    kernel_of: Callable[..., Kernel],
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    sizes: list[int] = []
    run = graphs.StaticDecode.run

    def spy(self: Any, pieces: Any, coming: Any) -> Any:
        sizes.append(len(pieces))
        return run(self, pieces, coming)

    monkeypatch.setattr(graphs.StaticDecode, "run", spy)
    static, ordinary = static_kernel("mistral"), kernel_of("mistral")
    samplings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_p": 0.8},
        {"repetition_penalty": 1.3},
        {"temperature": 1.2, "top_k": 9, "min_p": 0.05, "logprobs": 2},
    ]
    made = []
    for kernel in (static, ordinary):
        seqs = [
            kernel.open(prompt(3 + n, seed=n), **{"seed": n, **samplings[n % len(samplings)]})
            for n in range(count)
        ]
        made.append(kernel.generate(seqs, 8))
    assert made[0] == made[1]
    assert sizes[-7:] == [count] * 7


class _Questions(TorchDispatchMode):
    """Refuses operators that wait for the device to tell the host something: no graph can hold them."""

    ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(asking) for asking in self.ASKING), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ops", ["torch"], indirect=True)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_step_of_fixed_shape_asks_the_host_nothing(
    static_kernel: Callable[[str], Kernel], name: str
) -> None:
    kernel = static_kernel(name)
    kernel.generate([kernel.open(prompt(20))], 3)
    decode = _resident(kernel).static
    with torch.inference_mode(), _Questions():
        decode._graph(1).run()
    with pytest.raises(AssertionError, match="scalar"), _Questions():
        torch.ones(1).item()


class _Tape:
    """Stands for a CUDA graph: replays the same operators on the same memory, with no Python in between."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            made = func(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(made), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class _Taping(_Questions):
    """Stands for torch.cuda.graph."""

    def __init__(self, tape: _Tape, pool: Any) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        self._tape.calls.append((func, args, kwargs or {}, made))
        return made


@pytest.mark.parametrize("ops", ["torch"], indirect=True)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_was_captured_computes_every_later_step(
    static_kernel: Callable[[str], Kernel],
    tiny: Callable[[str], Tiny],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Whatever the host would have to do between operators is lost in a replay."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Tape)
    monkeypatch.setattr(torch.cuda, "graph", _Taping)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    make = graphs.StaticDecode.__init__
    monkeypatch.setattr(
        graphs.StaticDecode,
        "__init__",
        lambda self, model, pool, length, captured: make(self, model, pool, length, True),
    )
    kernel = static_kernel(name)
    for count in (3, 1, 3):
        prompts = [prompt(5 + 11 * n, seed=n) for n in range(count)]
        found = kernel.generate([kernel.open(tokens) for tokens in prompts], 8)
        assert found == [tiny(name).greedy(tokens, 8) for tokens in prompts]
    taped = [graph._graph.calls for graph in _resident(kernel).static._graphs.values()]
    assert len(taped) > 1
    assert all(taped)


# -- two steps under way ---------------------------------------------------------------------------------


def _resident(kernel: Kernel) -> Any:
    driver: Any = kernel.driver
    return driver._residents[1]


def test_a_step_is_started_on_tokens_that_only_the_device_knows(subject: Subject) -> None:
    kernel = subject.kernel
    seq, other = kernel.open(prompt(20)), kernel.open(prompt(9, seed=2), temperature=0.7, seed=3)
    twin = kernel.open(prompt(9, seed=2), temperature=0.7, seed=3)
    kernel.step([(seq, 20), (other, 9)])
    under_way = [kernel.submit([(seq, 1), (other, 1)])]
    for _ in range(6):
        under_way.append(kernel.submit([(seq, 1), (other, 1)], ahead=1))
        assert len(_resident(kernel).flights) == 2
        mirrored = _resident(kernel).mirror._sequences[seq.id].tokens
        assert mirrored[-1] == attention.PENDING
        kernel.collect(under_way.pop(0))
        assert attention.PENDING not in mirrored
    kernel.collect(under_way.pop(0))
    assert seq.tokens[20:] == subject.greedy(prompt(20), 8)
    assert [other.tokens[9:]] == kernel.generate([twin], 8)


def test_what_needs_the_tokens_waits_for_them(subject: Subject) -> None:
    """Guesses and penalties read the text, so the step before is settled first, and nothing is lost."""
    kernel = subject.kernel
    for sampling, draft in (({"repetition_penalty": 1.3}, 0), ({}, 4)):
        seq, twin = kernel.open([7, 8] * 10, **sampling), kernel.open([7, 8] * 10, **sampling)
        kernel.step([(seq, 20)])
        first = kernel.submit([(seq, 1)])
        second = kernel.submit([(seq, 1)], ahead=1, draft=draft)
        assert len(_resident(kernel).flights) == 1
        kernel.collect(first)
        kernel.collect(second)
        plain = kernel.generate([twin], 10)[0]
        assert seq.tokens[20:] == plain[: len(seq.tokens) - 20]


def test_a_stop_token_voids_the_step_behind(subject: Subject) -> None:
    kernel = subject.kernel
    made = subject.greedy(prompt(20), 4)
    seq, other = kernel.open(prompt(20), stop_token_ids=[made[1]]), kernel.open(prompt(5, seed=4))
    kernel.step([(seq, 20), (other, 5)])
    first = kernel.submit([(seq, 1), (other, 1)])
    second = kernel.submit([(seq, 1), (other, 1)], ahead=1)
    third = None
    [out, _] = kernel.collect(first)
    assert (out.tokens, out.stop, out.computed) == ([made[1]], True, 21)
    third = kernel.submit([(seq, 1), (other, 1)], ahead=1)
    for step in (second, third):
        [out, _] = kernel.collect(step)
        assert (out.tokens, out.stop, out.error, out.computed) == ([], False, "", 21)
    assert other.tokens[5:] == subject.greedy(prompt(5, seed=4), 4)


def test_a_limit_and_a_close_end_a_sequence_whose_token_is_coming(subject: Subject) -> None:
    kernel = subject.kernel
    seq, other = kernel.open(prompt(20)), kernel.open(prompt(5, seed=4))
    seq.limit = 22
    kernel._announce(seq)
    kernel.step([(seq, 20), (other, 5)])
    first = kernel.submit([(seq, 1), (other, 1)])
    kernel._closes = [other.id]
    second = kernel.submit([(seq, 1)], ahead=1)
    kernel.collect(first)
    [out] = kernel.collect(second)
    assert out.tokens == []
    assert seq.tokens[20:] == subject.greedy(prompt(20), 2)
    assert other.tokens[5:] == subject.greedy(prompt(5, seed=4), 2)


@pytest.mark.parametrize("ops", ["torch"], indirect=True)
def test_a_broken_row_ends_its_sequence_in_the_step_behind_too(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = subject.kernel
    bad, good = kernel.open(prompt(20)), kernel.open(prompt(9, seed=2))
    kernel.step([(bad, 20), (good, 9)])
    first = kernel.submit([(bad, 1), (good, 1)])
    found: Any = _resident(kernel).flights[0]
    found.finite = torch.tensor([False, True])
    second = kernel.submit([(bad, 1), (good, 1)], ahead=1)
    for step in (first, second):
        [out, _] = kernel.collect(step)
        assert "finite" in out.error
    assert good.tokens[9:] == subject.greedy(prompt(9, seed=2), 3)
    assert isinstance(found, flight.Flight)


def test_a_chunk_beside_a_coming_token(subject: Subject) -> None:
    """A mixed step, which is not of a fixed shape, takes tokens from the device too."""
    kernel = subject.kernel
    seq, other = kernel.open(prompt(20)), kernel.open(prompt(60, seed=2))
    kernel.step([(seq, 20)])
    first = kernel.submit([(seq, 1)])
    second = kernel.submit([(other, 60), (seq, 1)], ahead=1)
    assert len(_resident(kernel).flights) == 2
    kernel.collect(first)
    kernel.collect(second)
    assert seq.tokens[20:] == subject.greedy(prompt(20), 3)
    assert other.tokens[60:] == subject.greedy(prompt(60, seed=2), 1)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_chunks_beyond_the_start_need_no_mask(monkeypatch: pytest.MonkeyPatch, softcap: float) -> None:
    """As on CUDA, where flash attention knows causality that ends at the last key."""
    torch.manual_seed(0)
    shape = Shape(layers=1, heads=4, kv_heads=2, head_dim=8, context_length=256, vocab_size=97)
    pool = attention.KvPool(shape, 9, torch.float32, torch.device("cpu"))
    sequence = Sequence(1, array("I", prompt(80)), 80, 40, 999, array("i", range(5)), t.Sampling(seed=0))
    rows = torch.randn(80, 8, 8)
    arguments = (rows[40:, :4], rows[40:, 4:], 0.3, 0, softcap)
    attention.Plan(pool, [Piece(0, sequence, 0, 40, False, 0)], {0}).attend(
        0, rows[:40, :4], rows[:40, 4:], 1
    )
    chunk = [Piece(0, sequence, 40, 80, False, 0)]
    masked = attention.Plan(pool, chunk, {0}).attend(0, *arguments)
    monkeypatch.setattr(attention.Plan, "_mask", lambda *_: None)
    torch.testing.assert_close(attention.Plan(pool, chunk, {0}).attend(0, *arguments), masked)


# -- kernels ---------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "window", "softcap", "sunk", "processors"),
    [
        (4, 2, 64, torch.float32, 0, 0.0, False, 4),
        (8, 2, 128, torch.float32, 0, 0.0, False, 64),
        (6, 2, 24, torch.float32, 150, 0.0, False, 64),
        (4, 4, 96, torch.float16, 40, 0.0, False, 4),
        (8, 1, 256, torch.float16, 0, 30.0, True, 64),
        (2, 1, 80, torch.float32, 0, 20.0, True, 1),
    ],
)
def test_the_attention_kernel_equals_the_reference(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
    sunk: bool,
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN stands wherever a row may not look: behind its length, and in the blocks of others."""
    torch.manual_seed(0)
    lengths = [1, 300, 17, 160]
    pool = torch.full((2 * kv_heads, 40, 16, dim), float("nan"), dtype=dtype)
    tables = torch.full((len(lengths), 24), 39, dtype=torch.int32)
    blocks = iter(random.Random(1).sample(range(39), 39))
    for row, length in enumerate(lengths):
        for first in range(0, length, 16):
            block = next(blocks)
            tables[row, first // 16] = block
            count = min(16, length - first)
            pool[:, block, :count] = torch.randn(2 * kv_heads, count, dim).to(dtype)
    query = torch.randn(len(lengths), heads + 3, dim).to(dtype).to(DEVICE)[:, :heads]
    sinks = torch.randn(heads).to(DEVICE) if sunk else None
    rows = PagedRows(tables.to(DEVICE), torch.tensor(lengths).to(DEVICE), 300)
    made = kernel_ops()
    monkeypatch.setattr(made, "_processors", processors)
    arguments = (query, pool.to(DEVICE), rows, dim**-0.5, window, softcap, sinks)
    found, expected = made.attend(*arguments), TorchOps().attend(*arguments)
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 2e-3, rtol=1e-3)


def test_the_reference_attention_is_sdpa() -> None:
    torch.manual_seed(0)
    pool, query = torch.randn(4, 6, 16, 32), torch.randn(1, 4, 32)
    rows = PagedRows(torch.tensor([[3, 1, 5]], dtype=torch.int32), torch.tensor([41]), 41)
    kv = pool[:, [3, 1, 5]].flatten(1, 2)[:, :41]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None], kv[None, :2], kv[None, 2:], enable_gqa=True, scale=0.2
    )
    found = TorchOps().attend(query, pool, rows, 0.2, 0, 0.0, None)
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


@needs_kernels
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_placing_kernel_equals_torch(normed: bool, turned: bool) -> None:
    torch.manual_seed(0)
    norm = torch.randn(6, 24).to(DEVICE) if normed else None
    turns = torch.polar(torch.full((3, 12), 1.3), torch.randn(3, 12))[:, None].to(DEVICE) if turned else None
    rows, slots = torch.randn(3, 8, 24).to(DEVICE), torch.tensor([3, 77, 40]).to(DEVICE)
    made = []
    for operators in (kernel_ops(), TorchOps()):
        mine, pool = rows.clone(), torch.zeros(4, 5, 16, 24).to(DEVICE)
        operators.place(mine, pool, slots, Turn(turns, norm, 1e-5))
        made.append((mine[:, :4], pool))
    torch.testing.assert_close(made[0], made[1])


@needs_kernels
def test_the_norm_and_gate_kernels_equal_torch() -> None:
    torch.manual_seed(0)
    x, delta, weight = (torch.randn(*size).to(DEVICE) for size in ((3, 96), (3, 96), (96,)))
    silu = torch.nn.functional.silu
    made = []
    for operators in (kernel_ops(), TorchOps()):
        stream = x.clone()
        normed = operators.add_norm(stream, delta, weight, 1e-5)
        made.append((stream, normed, operators.add_norm(x, None, weight, 1e-5)))
        made[-1] += (operators.gate(x.clone(), silu), operators.gate(x.clone(), torch.relu))
    torch.testing.assert_close(made[0], made[1])


def _sequence(**sampling: Any) -> Sequence:
    sampling = {"seed": 1, **sampling}
    return Sequence(1, array("I", prompt(40)), 9, 0, 999, array("i"), t.Sampling(**sampling))


@needs_kernels
@pytest.mark.parametrize("size", [300, 5000])
def test_the_sampling_kernel_chooses_what_the_sampler_chooses(size: int) -> None:
    """Also among equals: bfloat16 has few values."""
    wheel = random.Random(size)
    sequences = [
        _sequence(
            temperature=wheel.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=wheel.choice([0, 0, 1, 7, 50, 10_000]),
            top_p=wheel.choice([1.0, 1.0, 0.9, 0.5, 0.01, 0.999]),
            min_p=wheel.choice([0.0, 0.0, 0.1, 1.0]),
            seed=wheel.getrandbits(63),
            logprobs=wheel.choice([None, 0, 3]),
            repetition_penalty=wheel.choice([1.0, 1.0, 1.4]),
            frequency_penalty=wheel.choice([0.0, 0.0, 0.7]),
            no_repeat_ngram_size=wheel.choice([0, 0, 1]),
        )
        for _ in range(30)
    ]
    torch.manual_seed(size)
    logits = (torch.randn(34, size) * 3).bfloat16().float()
    places = wheel.sample(range(34), 30)
    rows = [(sequence, wheel.randrange(10**6)) for sequence in sequences]
    expected = sampler.choose(logits[places], rows)
    drawn = kernel_ops().choose(logits.to(DEVICE), places, rows)
    found = drawn.choices()
    assert [choice.token for choice in found] == [choice.token for choice in expected]
    assert drawn.tokens.tolist() == [choice.token for choice in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.chosen is None) == (theirs.chosen is None)
        if mine.chosen and theirs.chosen:
            assert mine.chosen.logprob == pytest.approx(theirs.chosen.logprob, abs=1e-5)
            assert [s.logprob for s in mine.chosen.top] == pytest.approx(
                [s.logprob for s in theirs.chosen.top], abs=1e-5
            )


@needs_kernels
def test_the_sampling_kernel_says_why_it_chose_nothing() -> None:
    logits = torch.randn(4, 50)
    logits[0] = float("-inf")
    logits[1, 3] = float("nan")
    logits[2, 4] = float("inf")
    rows = [(_sequence(temperature=1.0), 5) for _ in range(3)]
    rows.append(
        (Sequence(1, array("I", range(50)), 0, 0, 99, array("i"), t.Sampling(no_repeat_ngram_size=1)), 5)
    )
    expected = [sampler.NOT_FINITE] * 3 + [sampler.NOTHING_LEFT]
    for operators in (kernel_ops(), TorchOps()):
        drawn = operators.choose(logits.to(DEVICE), [0, 1, 2, 3], rows)
        assert [choice.error for choice in drawn.choices()] == expected
        assert bool((drawn.tokens < 0).all())


# -- quantised weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_", "error"), [("int8", 0.01), ("float8", 0.04), ("int4", 0.12)])
def test_quantised_weights_are_near_what_they_were(format_: str, error: float) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 96), torch.randn(48), torch.randn(5, 96)
    weight[3] = 0.0  # a row without a scale
    layer = quantised.quantise(weight, bias, format_, TorchOps())
    kept = layer.weight(torch.float32)
    assert kept.shape == weight.shape
    assert float((kept - weight).norm() / weight.norm()) < error
    torch.testing.assert_close(layer(x), x @ kept.T + bias)
    assert layer.nbytes < weight.nbytes / (5 if format_ == "int4" else 3)


def test_rows_that_are_no_whole_groups_stay_in_8_bits() -> None:
    layer = quantised.quantise(torch.randn(16, 40), None, "int4", TorchOps())
    assert layer.nbytes == 16 * 40 + 16 * 4


def test_float8_products_of_many_rows_are_near_the_kept_weight() -> None:
    torch.manual_seed(0)
    operators: Any = TorchOps()
    operators.multiplies_float8 = True
    weight, bias, x = (torch.randn(*size).bfloat16().to(DEVICE) for size in ((48, 96), (48,), (19, 96)))
    layer = quantised.quantise(weight, bias, "float8", operators)
    expected = x.float() @ layer.weight(torch.float32).T + bias
    try:
        found = layer(x)
    except RuntimeError as problem:
        if CUDA or "per-tensor scaling" not in str(problem):
            raise
        pytest.skip("this torch scales no rows on a CPU")
    assert found.shape == (19, 48)
    assert float((found - expected).norm() / expected.norm()) < 0.05


@needs_kernels
@pytest.mark.parametrize("format_", quantised.FORMATS)
@pytest.mark.parametrize(("rows", "wide", "deep"), [(1, 48, 96), (19, 70, 608), (70, 40, 64)])
def test_the_quantised_kernel_multiplies_the_kept_weight(
    format_: str, rows: int, wide: int, deep: int
) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*size).to(DEVICE) for size in ((wide, deep), (wide,), (rows, deep)))
    layer = quantised.quantise(weight, bias, format_, kernel_ops())
    expected = x @ layer.weight(torch.float32).T + bias
    torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("format_", "error"), [("int8", 0.05), ("float8", 0.2), ("int4", 0.5)])
def test_a_quantised_model_computes_nearly_the_same(
    tiny: Callable[[str], Tiny], format_: str, error: float
) -> None:
    for name in ("llama", "llama-tied", "gpt2"):
        checkpoint = Checkpoint(tiny(name).files)
        config = Config(checkpoint.config)
        device = torch.device("cpu")
        with torch.inference_mode():
            model = models.build(config, checkpoint, device, torch.float32, format_)
            hidden = torch.randn(4, 64)
            plain = models.build(config, Checkpoint(tiny(name).files), device, torch.float32, "")
            found, expected = model.logits(hidden), plain.logits(hidden)
        assert float((found - expected).norm() / expected.norm()) < error
        assert model.weights_bytes < plain.weights_bytes


def test_quantised_weights_are_for_devices_with_kernels(kernel_of: Callable[..., Kernel]) -> None:
    driver = kernel_of("llama").driver
    with pytest.raises(errors.UnsupportedModel, match="int4"):
        driver.load(base.LoadSpec(2, {}, "int4", 0.05))


# -- on a device -----------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_captured_graphs_decode_what_transformers_decodes(tiny: Callable[[str], Tiny], name: str) -> None:
    driver = TorchDriver("cuda")
    kernel = start(driver, tiny(name).files)
    assert "CUDA graphs, Triton paged attention, float32" in kernel.loaded.engine
    for count in (1, 3, 9):
        prompts = [prompt(5 + 9 * n, seed=n) for n in range(count)]
        found = kernel.generate([kernel.open(tokens) for tokens in prompts], 12)
        assert found == [tiny(name).greedy(tokens, 12) for tokens in prompts]
    driver.close()


@needs_cuda
@pytest.mark.parametrize("dtype", ["bfloat16", *quantised.FORMATS])
def test_weights_of_fewer_bits_run_on_the_device(tiny: Callable[[str], Tiny], dtype: str) -> None:
    driver = TorchDriver("cuda")
    if dtype not in driver.describe().dtypes:
        pytest.skip(f"this device has no {dtype}")
    kernel = start(driver, tiny("llama").files, dtype)
    assert f"{dtype} weights" in kernel.loaded.engine
    tokens = prompt(300 % 200)
    [alone] = kernel.generate([kernel.open(tokens)], 8)
    assert len(alone) == 8
    seq = kernel.open(tokens)
    kernel.step([(seq, len(tokens))])
    steps = [kernel.submit([(seq, 1)])]
    for _ in range(5):
        steps.append(kernel.submit([(seq, 1)], ahead=1))
        kernel.collect(steps.pop(0))
    kernel.collect(steps.pop(0))
    assert seq.tokens[len(tokens) :] == alone[:7]
    driver.close()
