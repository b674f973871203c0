"""LoRA adapters as peft writes them: the drivers compute what peft computes, in any mixture, and refuse by
name what they do not compute."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import peft
import pytest
import torch
from llmasos.drivers import adapter as reader
from llmasos.drivers import base, merge, null
from llmasos.drivers.checkpoint import Checkpoint
from llmasos.drivers.families import describe
from llmasos.drivers.model_config import Config
from llmasos.drivers.native.executor import NativeDriver
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.syscalls import errors
from safetensors.torch import load_file, save_file

from .conftest import DEVICES, NONSENSE, VOCAB, Kernel, Seq, Tiny, files_of, index_of, nonsense, start

# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


class Adapter(Tiny):
    """One that peft wrote; `reference` is peft's model with it."""

    @property
    def files(self) -> dict[str, base.File]:
        return {name: file for name, file in files_of(self.folder).items() if name.startswith("adapter_")}


def make_adapter(model: Tiny, folder: Path, seed: int = 1, **config: Any) -> Adapter:
    """A random adapter, strong enough to change what is said."""
    torch.manual_seed(seed)
    base_model = type(model.reference).from_pretrained(model.folder).eval()
    gpt2 = "gpt2" in type(base_model).__name__.lower()
    config = {"target_modules": GPT2 if gpt2 else LLAMA, "fan_in_fan_out": gpt2} | config
    adapted = peft.get_peft_model(base_model, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return Adapter(folder, adapted)


@pytest.fixture(params=["native", *DEVICES], ids=lambda device: "torch" if device == "cpu" else device)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(kernel: Kernel, number: int, adapter: Adapter) -> None:
    assert kernel.driver.load_adapter(1, number, adapter.files) > 0


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"r": 8, "lora_alpha": 16}),
    "two of three that are packed as one": (
        "llama",
        {"r": 5, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    ),
    "ranks and scalings by pattern": (
        "llama-tied",
        {"r": 4, "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    ),
    "rank-stabilised, some layers": ("llama", {"r": 6, "use_rslora": True, "layers_to_transform": [0, 2]}),
    "padded heads": ("qwen3", {"r": 8}),
    "Conv1D": ("gpt2", {"r": 8}),
    "a window": ("mistral", {"r": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_is_what_peft_says(
    case: str, device: str, tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    family, config = CASES[case]
    model = tiny(family)
    adapter = make_adapter(model, tmp_path, **config)
    kernel = kernel_of(family, "float32", device)
    load(kernel, 3, adapter)
    tokens = prompt(37)
    said = adapter.greedy(tokens, 12)
    assert said != model.greedy(tokens, 12)
    assert kernel.generate([kernel.open(tokens, adapter=3)], 12, chunk=16) == [said]
    seq = kernel.open(tokens, adapter=3, prompt_logprobs=True, logprobs=0)
    scores = [score.logprob for score in kernel.step([(seq, len(tokens))])[0].prompt]
    wanted = adapter.logits(tokens).log_softmax(-1)[range(36), tokens[1:]]
    torch.testing.assert_close(torch.tensor(scores), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("by", ["peft", "us"])
def test_merged_weights_say_the_same(
    family: str,
    by: str,
    device: str,
    tiny: Callable[[str], Tiny],
    kernel_of: Callable[..., Kernel],
    tmp_path: Path,
) -> None:
    adapter = make_adapter(tiny(family), tmp_path / "adapter")
    kernel = kernel_of(family, "float32", device)
    load(kernel, 1, adapter)
    merged = Tiny(tmp_path / "merged", adapter.reference.merge_and_unload())
    if by == "peft":
        merged.reference.save_pretrained(merged.folder)
    else:
        merged.folder.mkdir()
        spec = base.MergeSpec(tiny(family).files, adapter.files, str(merged.folder), room=1 << 30)
        merge.merge(spec, lambda done, total: None)
    (merged.folder / "tensors.json").write_text(json.dumps(index_of(merged.folder / "model.safetensors")))
    plain = start(NativeDriver(lambda *_: None) if device == "native" else TorchDriver(device), merged.files)
    tokens = prompt(50)
    options = {"prompt_logprobs": True, "logprobs": 0}
    scores = [
        kernel.step([(kernel.open(tokens, adapter=1, **options), 50)])[0].prompt,
        plain.step([(plain.open(tokens, **options), 50)])[0].prompt,
    ]
    left, right = (torch.tensor([score.logprob for score in part]) for part in scores)
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)
    said = plain.generate([plain.open(tokens)], 24)
    assert kernel.generate([kernel.open(tokens, adapter=1)], 24) == said
    plain.driver.close()


def stored_in(dtype: torch.dtype, model: Tiny, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a copy of `model` in `folder`, whose weights are in `dtype`."""
    plain = {name: tensor.to(dtype) for name, tensor in load_file(model.folder / "model.safetensors").items()}
    folder.mkdir()
    (folder / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    save_file(plain, folder / "model.safetensors")
    (folder / "tensors.json").write_text(json.dumps(index_of(folder / "model.safetensors")))
    return plain


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_merging_rounds_as_torch_does(
    stored: str, tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
    folder, out = tmp_path / "base", tmp_path / "out"
    plain = stored_in(dtype, model, folder)
    out.mkdir()
    adapter = make_adapter(model, tmp_path / "adapter", r=4, lora_alpha=4)
    monkeypatch.setattr(merge, "_AT_ONCE", 100)  # a row or two at a time
    steps: list[tuple[int, int]] = []
    merge.merge(
        base.MergeSpec(files_of(folder), adapter.files, str(out), 1 << 30), lambda *step: steps.append(step)
    )
    size = (out / "model.safetensors").stat().st_size
    assert steps[-1] == (size, size)
    merged, added = load_file(out / "model.safetensors"), load_file(adapter.folder / reader.WEIGHTS)
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        halves = [added.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{h}.weight") for h in "AB"]
        wanted = tensor if halves[0] is None else (tensor.float() + halves[1] @ halves[0]).to(dtype)
        assert merged[name].dtype == dtype
        if halves[0] is None:
            assert torch.equal(merged[name], wanted)
        # A sum in another order may be on the other side of a rounding.
        torch.testing.assert_close(merged[name], wanted, rtol=0.008, atol=1e-6)
        assert stored == "F32" or (merged[name] == wanted).float().mean() > 0.99


def test_a_merged_model_without_numbers_or_room_is_not_made(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tiny("llama"), tmp_path / "adapter")
    tensors = load_file(adapter.folder / reader.WEIGHTS)
    tensors[next(name for name in tensors if "lora_B" in name)].fill_(1e7)
    save_file(tensors, adapter.folder / reader.WEIGHTS)
    (tmp_path / "out").mkdir()
    stored_in(torch.float16, tiny("llama"), tmp_path / "half")
    spec = base.MergeSpec(files_of(tmp_path / "half"), adapter.files, str(tmp_path / "out"), 1 << 30)
    with pytest.raises(errors.UnsupportedModel, match="does not hold"):
        merge.merge(spec, lambda done, total: None)
    with pytest.raises(errors.StorageFailed, match="there is room for 7"):
        merge.merge(msgspec.structs.replace(spec, room=7), lambda done, total: None)
    (tmp_path / "full").mkdir()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=full))
    with pytest.raises(errors.StorageFailed, match="No space left"):
        merge.merge(msgspec.structs.replace(spec, folder=str(tmp_path / "full")), lambda done, total: None)


def scored(kernel: Kernel, seqs: list[Seq], count: int, chunk: int) -> list[list[Any]]:
    """The scores of the prompts and of `count` tokens generated for each, all in the same steps."""
    found: dict[int, list[Any]] = {seq.id: [] for seq in seqs}
    while left := [seq for seq in seqs if len(seq.tokens) < seq.prompt_length + count]:
        work = [(seq, min(chunk, len(seq.tokens) - seq.computed)) for seq in left]
        for seq, out in zip(left, kernel.step(work), strict=True):
            assert not out.error
            found[seq.id] += [*out.prompt, *out.chosen]
    return list(found.values())


def opened(kernel: Kernel, number: int) -> Seq:
    """A sequence of adapter number % 4."""
    tokens = prompt(20 + 7 * number, seed=number)
    return kernel.open(tokens, adapter=number % 4, prompt_logprobs=True, logprobs=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_batch_of_several_adapters_changes_not_a_bit(
    dtype: str, tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    kernel = kernel_of("llama", dtype, "native")
    for number, config in enumerate(
        [{"r": 8}, {"r": 3}, {"r": 16, "target_modules": ["q_proj", "v_proj"]}], 1
    ):
        load(kernel, number, make_adapter(tiny("llama"), tmp_path / str(number), seed=number, **config))
    alone = [scored(kernel, [opened(kernel, number)], 8, chunk=1000)[0] for number in range(9)]
    assert scored(kernel, [opened(kernel, number) for number in range(9)], 8, chunk=11) == alone
    backwards = scored(kernel, [opened(kernel, number) for number in reversed(range(9))], 8, chunk=5)
    assert backwards[::-1] == alone


def test_a_batch_of_several_adapters_says_what_each_says(
    device: str, tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    model, kernel = tiny("gpt2"), kernel_of("gpt2", "float32", device)
    adapters = {n: make_adapter(model, tmp_path / str(n), seed=n, r=2 * n) for n in (1, 2, 3)}
    for number, adapter in adapters.items():
        load(kernel, number, adapter)
    prompts = [prompt(5 + 9 * n, seed=n) for n in range(7)]
    seqs = [kernel.open(tokens, adapter=n % 4) for n, tokens in enumerate(prompts)]
    said = [(adapters[n % 4] if n % 4 else model).greedy(tokens, 10) for n, tokens in enumerate(prompts)]
    assert kernel.generate(seqs, 10, chunk=6) == said


def test_guesses_and_penalties_see_the_adapter_too(
    tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny("llama"), tmp_path)
    kernel = kernel_of("llama", "float32", "native")
    load(kernel, 1, adapter)
    tokens = prompt(8) * 4
    seqs = [kernel.open(tokens, adapter=number) for number in (0, 1)]
    assert kernel.generate(seqs, 30, draft=8) == [
        tiny("llama").greedy(tokens, 30),
        adapter.greedy(tokens, 30),
    ]


def test_adapters_come_and_go_while_others_are_served(
    device: str, tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    model, kernel = tiny("llama"), kernel_of("llama", "float32", device)
    first, second = (make_adapter(model, tmp_path / str(n), seed=n, r=4 * n) for n in (1, 2))
    tokens = prompt(30)
    load(kernel, 1, first)
    running = [kernel.open(tokens), kernel.open(tokens, adapter=1)]
    said = kernel.generate(running, 5)
    load(kernel, 2, second)
    fresh = kernel.open(tokens, adapter=2)
    assert kernel.generate([*running, fresh], 5)[2] == second.greedy(tokens, 5)
    kernel.driver.unload_adapter(1, 2)
    out = kernel.step([(fresh, 1), (running[0], 1), (running[1], 1)])
    assert "adapter 2 is not loaded" in out[0].error
    assert [other.error for other in out[1:]] == ["", ""]
    load(kernel, 1, second)  # under a number that was another's
    assert kernel.generate([kernel.open(tokens, adapter=1)], 5) == [second.greedy(tokens, 5)]
    load(kernel, 2, first)
    kernel.driver.unload_adapter(1, 1)
    again = kernel.open(tokens, adapter=2)
    assert kernel.generate([again], 5) == [first.greedy(tokens, 5)]
    assert said == [model.greedy(tokens, 5), first.greedy(tokens, 5)]
    assert kernel.step([(kernel.open(tokens, adapter=7), 30)])[0].error == "adapter 7 is not loaded"


def test_unloading_the_model_takes_its_adapters_along(
    device: str, tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    kernel = kernel_of("llama", "float32", device)
    adapter = make_adapter(tiny("llama"), tmp_path)
    load(kernel, 1, adapter)
    kernel.driver.unload(1)
    with pytest.raises(errors.DeviceFault, match="no model"):
        kernel.driver.load_adapter(1, 1, adapter.files)
    kernel = start(kernel.driver, tiny("llama").files)
    assert "not loaded" in kernel.step([(kernel.open([1], adapter=1), 1)])[0].error


def edited(adapter: Adapter, **change: Any) -> dict[str, base.File]:
    path = adapter.folder / reader.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return adapter.files


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["experts"]),
        ("peft_type", "LOHA"),
        ("something_new", {"scale": 2}),
        ("r", 0),
        ("r", "8"),
        ("lora_alpha", "much"),
        ("lora_alpha", True),
        ("use_rslora", "yes"),
        ("rank_pattern", {"(q+)+_proj": 3}),
        ("alpha_pattern", {"\\": 3}),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(
    option: str, value: Any, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    model = tiny("llama")
    files = edited(make_adapter(model, tmp_path), **{option: value})
    with pytest.raises(errors.UnsupportedModel, match=option) as caught:
        read(model, files)
    assert caught.value.details["option"] == option
    assert caught.value.hint


def test_nonsense_in_any_option_is_refused_or_does_not_matter(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    model = tiny("llama")
    adapter = make_adapter(model, tmp_path)
    good = json.loads((tmp_path / reader.CONFIG).read_text())
    more = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "use_dora"}
    bad = [*nonsense(good, {*good, *more}), *({**good, "alpha_pattern": {"q_proj": one}} for one in NONSENSE)]
    for config in bad:
        (tmp_path / reader.CONFIG).write_text(json.dumps(config))
        with suppress(errors.ModelError):
            assert read(model, adapter.files)


def read(model: Tiny, files: dict[str, base.File]) -> dict[str, reader.Lora]:
    checkpoint = Checkpoint(model.files)
    return reader.read(files, describe(Config(checkpoint.config)))


Tensors = dict[str, torch.Tensor]
_Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def _nan(tensors: Tensors) -> None:
    tensors[_Q.format("A")][0, 0] = float("nan")


HARM: dict[str, tuple[Callable[[Tensors], Any], type[errors.LLMasOSError], str]] = {
    "half is missing": (lambda x: x.pop(_Q.format("B")), errors.Corrupt, "q_proj"),
    "another model's": (lambda x: x.update({_Q.format("A"): torch.ones(8, 60)}), errors.Corrupt, "q_proj"),
    "another rank": (lambda x: x.update({_Q.format("A"): torch.ones(7, 64)}), errors.Corrupt, "rank 8"),
    "not a number": (_nan, errors.Corrupt, "no numbers"),
    "a magnitude": (
        lambda x: x.update({_Q.format("magnitude_vector"): torch.ones(64)}),
        errors.UnsupportedModel,
        "magnitude",
    ),
    "a product beyond numbers": (
        lambda x: x.update(
            {_Q.format("A"): torch.full((8, 64), 1e25), _Q.format("B"): torch.full((64, 8), 1e25)}
        ),
        errors.Corrupt,
        "q_proj",
    ),
    "a scaling beyond numbers": (lambda x: x[_Q.format("B")].fill_(1e38), errors.Corrupt, "q_proj"),
    "empty": (
        lambda x: x.update({_Q.format("A"): torch.ones(0, 64), _Q.format("B"): torch.ones(64, 0)}),
        errors.UnsupportedModel,
        "q_proj",
    ),
    "of the head": (
        lambda x: x.update({"base_model.model.lm_head.lora_A.weight": torch.ones(8, 64)}),
        errors.UnsupportedModel,
        "lm_head",
    ),
    "of whole numbers": (
        lambda x: x.update({_Q.format("A"): torch.ones(8, 64, dtype=torch.int8)}),
        errors.UnsupportedModel,
        "I8",
    ),
    "nothing": (lambda x: x.clear(), errors.Corrupt, "no tensors"),
    "too much": (
        lambda x: x.update({_Q.format("A"): torch.ones(20_000, 6_400)}),
        errors.Corrupt,
        "another model",
    ),
}


@pytest.mark.parametrize("harm", HARM)
def test_tensors_that_do_not_fit_are_refused(harm: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = make_adapter(model, tmp_path)
    change, error, text = HARM[harm]
    path = tmp_path / reader.WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(error) as caught:
        read(model, adapter.files)
    assert text in f"{caught.value} {caught.value.hint}"


def test_files_that_are_damaged_or_missing_are_refused(
    device: str, tiny: Callable[[str], Tiny], kernel_of: Callable[..., Kernel], tmp_path: Path
) -> None:
    kernel = kernel_of("llama", "float32", device)
    adapter = make_adapter(tiny("llama"), tmp_path)
    files, weights = adapter.files, tmp_path / reader.WEIGHTS
    for name in files:
        with pytest.raises(errors.Corrupt, match=name):
            kernel.driver.load_adapter(1, 1, {key: file for key, file in files.items() if key != name})
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.Corrupt, match="digest"):
        kernel.driver.load_adapter(1, 1, files)
    weights.write_bytes(data[:-1])
    with pytest.raises(errors.Corrupt, match=reader.WEIGHTS):
        kernel.driver.load_adapter(1, 1, adapter.files)
    assert kernel.generate([kernel.open(prompt(9))], 3) == [tiny("llama").greedy(prompt(9), 3)]


def test_half_precision_is_read(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model = tiny("llama")
    adapter = make_adapter(model, tmp_path)
    before = read(model, adapter.files)
    path = tmp_path / reader.WEIGHTS
    tensors = load_file(path)
    for dtype, error in ((torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
        for name, lora in read(model, adapter.files).items():
            torch.testing.assert_close(
                torch.tensor(lora.b), torch.tensor(before[name].b), atol=error, rtol=error
            )


@pytest.fixture
def null_kernel() -> Iterator[Kernel]:
    driver = null.NullDriver()
    yield start(driver, {})
    driver.close()


def test_the_null_driver_tells_adapters_apart(null_kernel: Kernel) -> None:
    files = [{"adapter_config.json": base.File("", f"sha256:{n}", 10)} for n in range(2)]
    for number, own in enumerate(files, 1):
        assert null_kernel.driver.load_adapter(1, number, own) == 10
    tokens = prompt(20)
    said = null_kernel.generate([null_kernel.open(tokens, adapter=n) for n in range(3)], 4, chunk=6)
    for mark, continued in zip([0, *map(null.adapter_mark, files)], said, strict=True):
        known = list(tokens)
        for token in continued:
            assert null.next_token(known, mark=mark) == token
            known.append(token)
    assert len({tuple(continued) for continued in said}) == 3
    null_kernel.driver.unload_adapter(1, 2)
    assert "not loaded" in null_kernel.step([(null_kernel.open(tokens, adapter=2), 20)])[0].error
