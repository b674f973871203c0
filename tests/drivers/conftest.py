"""Tiny random models of every family with a reference, and a small kernel to drive a driver with."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from llmasos.drivers import base, null
from llmasos.drivers.launcher import Local
from llmasos.drivers.model_config import Config
from llmasos.drivers.native.executor import NativeDriver
from llmasos.drivers.simulated import SimulatedDriver
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.drivers.torch.group import GroupDriver
from llmasos.syscalls import types as t

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
"""Of the torch driver, on this machine."""

VOCAB = 97
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=256,
        n_embd=64,
        n_layer=3,
        n_head=4,
        initializer_range=0.25,
        scale_attn_by_inverse_layer_idx=True,
        eos_token_id=None,
        bos_token_id=None,
    ),
    "llama": lambda: transformers.LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: transformers.LlamaConfig(
        **_SMALL,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=11),
    "qwen2": lambda: transformers.Qwen2Config(
        **_SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL, head_dim=24),
    "smollm3": lambda: transformers.SmolLM3Config(**_SMALL, no_rope_layer_interval=2),
}


NONSENSE: list[Any] = [
    *([], [1], ["x"], [[1]], {}, {"a": 1}, {"a": {"b": 1}}, "", "x", "1", True, False),
    *(-1, 0, 1, 0.5, -0.5, 1e-300, 1e300, 2**31, 2**64, 10**400),
]
"""What a stranger may write into any field of a JSON file."""


def nonsense(values: dict[str, Any], names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """`values` with nonsense in each of the fields `names`."""
    return (values | {name: value} for name in sorted(names) for value in NONSENSE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The fields of a Config that were asked for so far."""
    names: set[str] = set()
    get = Config.get

    def note(config: Config, name: str, default: Any = None) -> Any:
        names.add(name)
        return get(config, name, default)

    monkeypatch.setattr(Config, "get", note)
    return names


def file_of(path: Path) -> base.File:
    data = path.read_bytes()
    return base.File(str(path), f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def index_of(path: Path) -> dict[str, Any]:
    """The tensors.json of a safetensors file."""
    raw = path.read_bytes()
    start = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + start])
    header.pop("__metadata__", None)
    return {
        "tensors": {
            name: {
                "file": path.name,
                "type": entry["dtype"],
                "shape": entry["shape"],
                "offset": 8 + start + entry["data_offsets"][0],
                "nbytes": entry["data_offsets"][1] - entry["data_offsets"][0],
            }
            for name, entry in header.items()
        }
    }


def files_of(folder: Path) -> dict[str, base.File]:
    return {path.name: file_of(path) for path in folder.iterdir()}


@dataclass(frozen=True)
class Tiny:
    """A random model on disk; `reference` is the dense model of transformers that wrote it."""

    folder: Path
    reference: Any
    _followed: dict[tuple[int, ...], int] = field(default_factory=dict, compare=False)

    @property
    def files(self) -> dict[str, base.File]:
        return files_of(self.folder)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), vocab]"""
        with torch.inference_mode():
            return self.reference(torch.tensor([tokens])).logits[0].float()

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        out = list(tokens)
        for _ in range(count):
            key = tuple(out)
            if key not in self._followed:  # tests ask for the same of every driver
                self._followed[key] = int(self.logits(out)[-1].argmax())
            out.append(self._followed[key])
        return out[len(tokens) :]


def characters() -> str:
    """A tokenizer.json of VOCAB tokens: the printable characters of ASCII, and two special ones."""
    byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = [byte.pre_tokenize_str(chr(code))[0][0] for code in range(32, 127)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({text: n for n, text in enumerate(shown)}, []))
    made.pre_tokenizer, made.decoder = byte, tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<|other|>"])
    return str(made.to_str())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
            with torch.no_grad():  # zero biases and unit norms would hide a forgotten one
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(folder)
            (folder / "tensors.json").write_text(json.dumps(index_of(folder / "model.safetensors")))
            (folder / "tokenizer.json").write_text(characters())
            made[name] = Tiny(folder, model)
        return made[name]

    return make


@dataclass
class Seq:
    id: int
    tokens: list[int]
    prompt_length: int
    blocks: list[int]
    sampling: t.Sampling
    computed: int = 0
    adapter: int = 0
    limit: int = 10_000
    pending: list[base.SeqOpen] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Kernel:
    """Drives one loaded model as the kernel does, with blocks in random order."""

    def __init__(self, driver: base.Driver, loaded: base.Loaded) -> None:
        self.driver, self.loaded = driver, loaded
        self.free = list(range(min(loaded.blocks, 400)))
        random.Random(5).shuffle(self.free)
        self._ids = iter(range(1, 10_000))
        self._tickets = iter(range(1, 100_000))
        self._closes: list[int] = []

    def open(
        self, tokens: list[int], *, prompt_length: int | None = None, adapter: int = 0, **sampling: Any
    ) -> Seq:
        sampling.setdefault("seed", 0)
        blocks = [self.free.pop() for _ in range(-(-len(tokens) // 16))]
        length = len(tokens) if prompt_length is None else prompt_length
        seq = Seq(next(self._ids), list(tokens), length, blocks, t.Sampling(**sampling), adapter=adapter)
        self._announce(seq)
        return seq

    def _announce(self, seq: Seq) -> None:
        seq.pending = [
            base.SeqOpen(
                seq.id,
                t.pack_tokens(seq.tokens),
                seq.prompt_length,
                min(seq.computed, len(seq.tokens)),
                seq.limit,
                list(seq.blocks),
                seq.sampling,
                seq.adapter,
            )
        ]

    def close(self, seq: Seq) -> None:
        self._closes.append(seq.id)
        self.free += seq.blocks

    def fork(self, seq: Seq, **sampling: Any) -> Seq:
        """Shares the full blocks, copies the tail."""
        full = seq.computed // 16
        twin = Seq(
            next(self._ids),
            list(seq.tokens),
            seq.prompt_length,
            seq.blocks[:full] + [self.free.pop() for _ in seq.blocks[full:]],
            t.Sampling(**{"seed": 0, **sampling}),
            seq.computed,
        )
        twin.copies = list(zip(seq.blocks[full:], twin.blocks[full:], strict=True))
        self._announce(twin)
        return twin

    def reopen(self, seq: Seq) -> None:
        """As after a preemption: other blocks, nothing computed."""
        old, seq.blocks = seq.blocks, [self.free.pop() for _ in seq.blocks]
        self.free = old + self.free
        seq.computed = 0
        self._announce(seq)

    def step(
        self, counts: list[tuple[Seq, int]], *, sample: bool = True, beams: int = 0, draft: int = 0
    ) -> list[base.SeqOut]:
        """Computes the next `count` positions of each sequence; one result each, in this order."""
        return self.collect(self.submit(counts, sample=sample, beams=beams, draft=draft))

    def submit(
        self,
        counts: list[tuple[Seq, int]],
        *,
        sample: bool = True,
        beams: int = 0,
        draft: int = 0,
        ahead: int = 0,
    ) -> tuple[int, list[Seq]]:
        """Sends a step; `ahead` positions of each sequence are being computed by steps not yet collected."""
        works, opens, copies = [], [], []
        for seq, count in counts:
            opens += seq.pending
            copies += seq.copies
            seq.pending, seq.copies = [], []
            fresh = []
            while len(seq.blocks) * 16 < seq.computed + ahead + count + draft:
                fresh.append(self.free.pop())
                seq.blocks.append(fresh[-1])
            works.append(base.Work(seq.id, count, [], fresh, sample, beams, draft))
        batch = base.Batch(next(self._tickets), self.loaded.handle, self._closes, opens, copies, works)
        self._closes = []
        return self.driver.submit(batch), [seq for seq, _ in counts]

    def collect(
        self, step: tuple[int, list[Seq]], interrupt: base.Interrupt | None = None
    ) -> list[base.SeqOut]:
        ticket, seqs = step
        outputs = self.driver.collect(ticket, interrupt).outputs
        for seq, out in zip(seqs, outputs, strict=True):
            if not out.error:
                seq.computed = out.computed
                seq.tokens += out.tokens
        return outputs

    def generate(self, seqs: list[Seq], count: int, chunk: int = 10_000, draft: int = 0) -> list[list[int]]:
        """Prefills in chunks and generates `count` tokens for each; all in the same steps."""
        lengths = {seq.id: len(seq.tokens) for seq in seqs}
        while left := [seq for seq in seqs if len(seq.tokens) < lengths[seq.id] + count]:
            counts = [(seq, min(chunk, len(seq.tokens) - seq.computed)) for seq in left]
            outputs = self.step(counts, draft=draft)
            assert not [out.error for out in outputs if out.error]
        return [seq.tokens[lengths[seq.id] :][:count] for seq in seqs]


def start(
    driver: base.Driver, files: dict[str, base.File], dtype: str = "float32", kv_dtype: str = ""
) -> Kernel:
    return Kernel(driver, driver.load(base.LoadSpec(1, files, dtype, 0.05, kv_dtype)))


@pytest.fixture
def kernel_of(tiny: Callable[[str], Tiny]) -> Iterator[Callable[..., Kernel]]:
    """A kernel on a driver with one of the tiny models."""
    drivers: list[base.Driver] = []

    def make(name: str, dtype: str = "float32", device: str = "cpu", kv_dtype: str = "") -> Kernel:
        """`device` may be "native" too."""
        drivers.append(NativeDriver(lambda *_: None) if device == "native" else TorchDriver(device))
        return start(drivers[-1], tiny(name).files, dtype, kv_dtype)

    yield make
    for driver in drivers:
        driver.close()


@dataclass(frozen=True)
class Subject:
    """A driver under test and what is right: `greedy(tokens, count)` continues a context."""

    kernel: Kernel
    greedy: Callable[[list[int], int], list[int]]


def _null_greedy(tokens: list[int], count: int) -> list[int]:
    out = list(tokens)
    for _ in range(count):
        out.append(null.next_token(out, VOCAB))
    return out[len(tokens) :]


@pytest.fixture(scope="module")
def group_of() -> Iterator[Callable[[int], GroupDriver]]:
    """The group of so many ranks on the CPU; one is there at a time."""
    groups: dict[int, GroupDriver] = {}

    def end() -> None:
        for size in list(groups):
            groups.pop(size).close()

    def make(size: int) -> GroupDriver:
        if size not in groups:
            end()
            command = ["llmasos.drivers.worker", "--device", f"cpu*{size}", "--bus", "none"]
            groups[size] = GroupDriver("cpu", Local().join(size, command))
        return groups[size]

    yield make
    end()


@pytest.fixture(params=["null", "simulated", "native", "torch", "cuda", "group"])
def subject(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> Iterator[Subject]:
    model = tiny("llama")
    if request.param in ("null", "simulated"):
        driver: base.Driver = null.NullDriver() if request.param == "null" else SimulatedDriver()
        yield Subject(start(driver, model.files), _null_greedy)
    else:
        if request.param == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if request.param == "group":
            driver = request.getfixturevalue("group_of")(2)
        elif request.param == "native":
            driver = NativeDriver(lambda level, text: None)
        else:
            driver = TorchDriver("cpu" if request.param == "torch" else "cuda")
        yield Subject(start(driver, model.files), model.greedy)
    if request.param != "group":  # which takes seconds to start
        driver.close()
