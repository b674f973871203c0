"""The native engine: a row's result is its own, bit for bit, in every dtype; choosing; what runs where."""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llmasos.drivers import base, cpu
from llmasos.drivers.mirror import Sequence
from llmasos.drivers.native import library
from llmasos.drivers.native.executor import NativeDriver
from llmasos.drivers.torch import sampler
from llmasos.syscalls import types as t
from msgspec.structs import replace

from .conftest import Kernel, Seq, Tiny, file_of, files_of, index_of, start

VOCAB = 97
DTYPES = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", "int8"),
    ("int4", "bfloat16"),
    ("int4", "float32"),
]


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def scored(
    kernel: Kernel, seq: Seq, count: int, chunk: int = 1000, beside: list[Seq] | None = None
) -> list[Any]:
    """The scores of the prompt and of `count` tokens generated, exactly as they come."""
    found: list[Any] = []
    while len(seq.tokens) < seq.prompt_length + count:
        work = [(other, min(7, len(other.tokens) - other.computed)) for other in beside or ()]
        work.append((seq, min(chunk, len(seq.tokens) - seq.computed)))
        out = kernel.step(work)[-1]
        assert not out.error
        found += [*out.prompt, *out.chosen]
    return found


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral"])
def test_neither_batch_nor_chunks_change_a_bit(
    family: str, dtype: str, kv_dtype: str, kernel_of: Callable[..., Kernel]
) -> None:
    kernel = kernel_of(family, dtype, "native", kv_dtype)
    tokens = prompt(170)  # more than the positions whose softmax is taken at once
    options = {"logprobs": 3, "prompt_logprobs": True}
    alone = scored(kernel, kernel.open(tokens, **options), 20)
    assert scored(kernel, kernel.open(tokens, **options), 20, chunk=13) == alone
    crowd = [kernel.open(prompt(n, seed=n)) for n in (1, 5, 40, 100, 130, 160, 17, 3)]
    for other in crowd:
        other.limit = 10**6
    assert scored(kernel, kernel.open(tokens, **options), 20, chunk=50, beside=crowd) == alone


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_a_shared_prefix_is_read_once_and_changes_nothing(
    dtype: str, kv_dtype: str, kernel_of: Callable[..., Kernel]
) -> None:
    kernel = kernel_of("llama", dtype, "native", kv_dtype)
    parent = kernel.open(prompt(150))
    kernel.step([(parent, 150)], sample=False)
    parent.computed = 150
    forks = []
    for number in range(9):
        fork = kernel.fork(parent, logprobs=2)
        fork.tokens += [number, number + 1]
        kernel._announce(fork)
        forks.append(fork)
    together: dict[int, list[Any]] = {fork.id: [] for fork in forks}
    for count in (2, 1, 1, 1, 1):
        for out in kernel.step([(fork, count) for fork in forks]):
            together[out.seq] += out.chosen
    for fork in forks:
        alone = kernel.open(fork.tokens[:152], logprobs=2)
        assert scored(kernel, alone, 5) == together[fork.id]


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_guesses_change_nothing(dtype: str, kv_dtype: str, kernel_of: Callable[..., Kernel]) -> None:
    kernel = kernel_of("llama", dtype, "native", kv_dtype)
    tokens = prompt(5) * 8  # repeats itself, so that there is something to guess
    for sampling in ({}, {"temperature": 0.7, "seed": 3}):
        plain = kernel.generate([kernel.open(tokens, **sampling)], 40)
        guessing = kernel.open(tokens, **sampling)
        drafted = 0
        while len(guessing.tokens) < len(tokens) + 40:
            [out] = kernel.step([(guessing, len(guessing.tokens) - guessing.computed)], draft=5)
            drafted += out.drafted
        assert guessing.tokens[len(tokens) :][:40] == plain[0]
        assert drafted


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_an_interrupted_step_and_the_one_that_interrupts_change_nothing(
    dtype: str, kv_dtype: str, kernel_of: Callable[..., Kernel]
) -> None:
    kernel = kernel_of("llama", dtype, "native", kv_dtype)
    options = {"logprobs": 3, "prompt_logprobs": True}
    alone = {n: scored(kernel, kernel.open(prompt(n, seed=n), **options), 4) for n in (40, 170)}
    here, there = os.pipe()
    served = 0

    def serve() -> None:
        nonlocal served
        served += 1
        if served % 2:  # the other time there is nothing to compute
            assert scored(kernel, kernel.open(prompt(40, seed=40), **options), 4) == alone[40]
        if served >= 5:
            os.read(here, 1)

    os.write(there, b"!")
    seq, found = kernel.open(prompt(170, seed=170), **options), []
    while len(seq.tokens) < 174:
        step = kernel.submit([(seq, len(seq.tokens) - seq.computed)])
        interrupt = base.Interrupt(here, serve)
        begun = time.perf_counter()
        [out] = kernel.collect(step, interrupt)
        assert not out.error
        assert interrupt.seconds < time.perf_counter() - begun
        found += [*out.prompt, *out.chosen]
    os.close(here)
    os.close(there)
    assert found == alone[170]
    assert served == 5, "between layers, so several times a step"


def test_what_is_due_is_taken_though_nothing_can_be_read(kernel_of: Callable[..., Kernel]) -> None:
    kernel = kernel_of("llama", device="native")
    alone = {n: scored(kernel, kernel.open(prompt(n, seed=n), logprobs=3), 1) for n in (40, 170)}
    found = []

    def serve() -> None:
        found.append(scored(kernel, kernel.open(prompt(40, seed=40), logprobs=3), 1))

    interrupt = base.Interrupt(-1, serve, due=True)
    [out] = kernel.collect(kernel.submit([(kernel.open(prompt(170, seed=170), logprobs=3), 170)]), interrupt)
    assert found == [alone[40]]
    assert out.chosen == alone[170]


def test_what_can_come_no_more_interrupts_no_more(kernel_of: Callable[..., Kernel]) -> None:
    kernel = kernel_of("llama", device="native")
    here, there = os.pipe()
    os.close(there)  # always readable from now on
    calls = []

    def serve() -> None:
        calls.append(1)
        interrupt.fd = -1

    interrupt = base.Interrupt(here, serve)
    kernel.collect(kernel.submit([(kernel.open(prompt(20)), 20)]), interrupt)
    os.close(here)
    assert len(calls) == 1


def test_more_than_a_call_of_the_engine_takes(
    kernel_of: Callable[..., Kernel], tiny: Callable[..., Any]
) -> None:
    kernel = kernel_of("llama", device="native")
    lengths = [200, 190, 180, 3, 5, 60] + [2] * 70
    seqs = [kernel.open(prompt(length, seed=i)) for i, length in enumerate(lengths)]
    made = kernel.generate(seqs, 2)
    for i in (0, 1, 2, 5, 75):
        assert made[i] == tiny("llama").greedy(prompt(lengths[i], seed=i), 2)


def test_a_broken_row_fails_its_sequence_and_leaves_no_nan(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    place = index_of(model.folder / "model.safetensors")["tensors"]["model.embed_tokens.weight"]["offset"]
    data = bytearray((model.folder / "model.safetensors").read_bytes())
    data[place + 5 * 256 : place + 6 * 256] = np.full(64, np.nan, np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    files = {**model.files, "model.safetensors": file_of(tmp_path / "model.safetensors")}
    driver = NativeDriver(lambda *_: None)
    kernel = start(driver, files)
    good, bad = kernel.open([1, 2, 3]), kernel.open([5] * 20)
    first, second = kernel.step([(good, 3), (bad, 20)])
    assert first.tokens == model.greedy([1, 2, 3], 1)
    assert "finite" in second.error
    assert np.isfinite(np.frombuffer(driver.export_blocks(1, good.blocks + bad.blocks), np.float32)).all()
    driver.close()


# Choosing


@pytest.fixture(scope="module")
def engine() -> Iterator[tuple[Any, int]]:
    functions = library.load().functions
    pool = functions.llk_pool_new(1, None)
    yield functions, pool
    functions.llk_pool_free(pool)


def choose(engine: tuple[Any, int], logits: torch.Tensor, sequence: Sequence, **asks: Any) -> Any:
    functions, pool = engine
    vocab = logits.shape[0]
    row = np.full(-(-vocab // 16) * 16, 7e7, np.float32)  # what lies behind the vocabulary is never chosen
    row[:vocab] = logits.numpy()
    sampling = sequence.sampling
    stops = array("i", [s for s in sampling.stop_token_ids if s < vocab])
    ids, values = (ctypes.c_int32 * 64)(), (ctypes.c_float * 64)()
    pick = library.Pick(
        tokens=sequence.tokens.buffer_info()[0],
        known=len(sequence.tokens),
        prompt_length=sequence.prompt_length,
        stops=stops.buffer_info()[0],
        stop_count=len(stops),
        forbid_stops=sequence.generated < sampling.min_new_tokens,
        seed=sampling.seed,
        position=len(sequence.tokens),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        ngram=sampling.no_repeat_ngram_size,
        ids=ids,
        values=values,
        **{"top": -1, **asks},
    )
    picks = (library.Pick * 1)(pick)
    assert functions.llk_choose(pool, library.Model(vocab=vocab), row.ctypes.data, picks, 1) == 0
    return picks[0]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 3.0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 5.0, "top_p": 0.99},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.8},
    {"temperature": 1.0, "repetition_penalty": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.3},
    {"temperature": 1.0, "no_repeat_ngram_size": 2},
    {"temperature": 1.0, "min_new_tokens": 99, "stop_token_ids": [3, 4, 10**6]},
]


@pytest.mark.parametrize("options", SAMPLINGS)
@pytest.mark.parametrize("vocab", [300, 5003])
def test_choices_are_those_of_the_torch_sampler(
    options: dict[str, Any], vocab: int, engine: tuple[Any, int]
) -> None:
    tokens = random.Random(2).choices(range(20), k=40)
    for seed in range(25):
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
        one = Sequence(1, array("I", tokens), 10, 0, 999, array("i"), t.Sampling(seed=seed, **options))
        [expected] = sampler.choose(logits[None], [(one, len(tokens))])
        assert choose(engine, logits, one).token == expected.token


def test_scores_and_alternatives_are_those_of_the_torch_sampler(engine: tuple[Any, int]) -> None:
    one = Sequence(1, array("I", [1, 2]), 2, 0, 999, array("i"), t.Sampling(seed=1))
    logits = torch.randn(1003, generator=torch.Generator().manual_seed(1)) * 4
    pick = choose(engine, logits, one, top=20)
    [expected] = sampler.score(logits[None], [pick.token], [20])
    assert pick.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [pick.ids[i] for i in range(pick.listed)] == [score.token for score in expected.top]
    assert [pick.values[i] for i in range(20)] == pytest.approx([s.logprob for s in expected.top], abs=1e-5)
    punished = Sequence(
        1, array("I", [1, 2]), 2, 0, 999, array("i"), t.Sampling(seed=1, repetition_penalty=3.0)
    )
    beams = choose(engine, logits, punished, beams=30)
    best = sampler.best_continuations(logits, punished, 30)
    assert [beams.ids[i] for i in range(beams.listed)] == [score.token for score in best]


def test_what_cannot_be_chosen_from_is_told(engine: tuple[Any, int]) -> None:
    one = Sequence(
        1, array("I", [0, 1, 2, 3]), 4, 0, 999, array("i"), t.Sampling(seed=0, no_repeat_ngram_size=1)
    )
    assert choose(engine, torch.zeros(4), one).token == -1
    for broken in (float("nan"), float("inf")):
        logits = torch.zeros(300)
        logits[299] = broken
        assert choose(engine, logits, one).token == -2


# What runs where


def notes() -> tuple[list[tuple[str, str]], Callable[[str, str], None]]:
    found: list[tuple[str, str]] = []
    return found, lambda level, text: found.append((level, text))


def test_what_the_engine_does_not_compute_goes_to_torch(tiny: Callable[..., Any], tmp_path: Path) -> None:
    config = transformers.PhiConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    reference = transformers.PhiForCausalLM(config).eval()
    reference.save_pretrained(tmp_path)
    (tmp_path / "tensors.json").write_text(json.dumps(index_of(tmp_path / "model.safetensors")))
    lines, note = notes()
    driver = cpu.CpuDriver(note)
    assert "native engine" in driver.load(base.LoadSpec(1, tiny("llama").files, "", 0.05)).engine
    loaded = driver.load(base.LoadSpec(2, files_of(tmp_path), "", 0.05))
    assert "transformers' own code" in loaded.engine
    assert "phi" in loaded.engine
    assert any("torch computes it" in text for _, text in lines)
    native, other = Kernel(driver, replace(loaded, handle=1)), Kernel(driver, loaded)
    assert native.generate([native.open([1, 2, 3])], 3) == [tiny("llama").greedy([1, 2, 3], 3)]
    assert other.generate([other.open([1, 2, 3])], 3) == [Tiny(tmp_path, reference).greedy([1, 2, 3], 3)]
    driver.close()


def test_without_an_engine_torch_computes_and_says_why(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(variant: str = "") -> library.Engine:
        raise library.NoEngine("no compiler here")

    monkeypatch.setattr(library, "load", none)
    lines, note = notes()
    driver = cpu.CpuDriver(note)
    assert driver.describe().text.startswith("torch")
    assert "no compiler here" in driver.describe().text
    loaded = driver.load(base.LoadSpec(1, tiny("llama").files, "float32", 0.05))
    assert "no compiler here" in loaded.engine
    assert any(level == "warn" and "no compiler here" in text for level, text in lines)
    kernel = Kernel(driver, loaded)
    assert kernel.generate([kernel.open([1, 2, 3])], 3) == [tiny("llama").greedy([1, 2, 3], 3)]
    driver.close()


def test_the_native_path_imports_no_torch(tiny: Callable[..., Any]) -> None:
    code = (
        "import sys; from llmasos.drivers import cpu; cpu.CpuDriver(print).describe(); "
        "assert not {'torch', 'gguf', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=dict(os.environ))


def test_memory_of_a_step_is_taken_at_load(kernel_of: Callable[..., Kernel]) -> None:
    kernel = kernel_of("llama", "int4", "native")
    seqs = [kernel.open(prompt(20, seed=n)) for n in range(8)]

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    kernel.generate(seqs, 60)
    before = resident()
    kernel.generate(seqs, 150)
    assert (resident() - before) * 4096 < 1 << 20
