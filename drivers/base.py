"""What a device must be able to do, and the messages between the kernel and a device's worker.

A driver holds tensors and a mirror of each running sequence (tokens, block table, sampling); it knows no
tenants, no names and no text. Everything it holds can be rebuilt from what the kernel knows.

A sequence's KV lives in blocks of BLOCK_TOKENS positions; position p of a sequence is slot
`blocks[p // 16] * 16 + p % 16`. The kernel alone decides which block belongs to whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from llmasos.syscalls import errors, training
from llmasos.syscalls import types as t
from msgspec import Struct

BLOCK_TOKENS = t.BLOCK_TOKENS

MOST_RANKS = 64
"""Devices of a group, that compute a model together."""

MOST_LAYERS = 512
LONGEST_CONTEXT = 1 << 24
_LAYERS = {"n_layer", "n_layers", "num_layers", "num_hidden_layers", "decoder_layers"}
_CONTEXTS = {"n_ctx", "n_positions"}


def check_sizes(config: Mapping[str, Any], tensors: int = MOST_LAYERS, values: int = 2**31) -> None:
    """Raises Corrupt for a size in config.json, a stranger's file, that no model of so many `tensors` with so
    many `values` in all can have. Called before anything is built from a config, so that what is built is
    bounded by files that are really there."""
    maps: list[Mapping[str, Any]] = [config]
    while maps:
        for key, value in maps.pop().items():
            if isinstance(value, dict):
                maps.append(value)
                continue
            if key in _LAYERS:
                most = min(tensors, MOST_LAYERS)
            elif key in _CONTEXTS or key.endswith("_position_embeddings"):
                most = LONGEST_CONTEXT
            elif key.startswith(("n_", "num_", "d_")) or key.endswith(("_size", "_dim")) or key == "dim":
                most = values
            else:
                continue
            each = value if isinstance(value, list) else [value]  # some models give a size for each layer
            if not all(v is None or (isinstance(v, int | float) and 0 <= v <= most) for v in each):
                raise errors.Corrupt(
                    f"config.json: {key} is {repr(value)[:40]}; this model can have {most} at most",
                    hint="the file is damaged, or was made to do harm",
                    file="config.json",
                    option=key[:64],
                )


class Description(Struct, frozen=True):
    """What a device is and what it can do. Sizes in bytes; `step_tokens` is the most tokens a step may
    carry at all. `dtypes` are those of weights that may be asked for."""

    driver: str
    text: str
    memory_total: int
    memory_free: int
    dtypes: list[str]
    step_tokens: int
    max_sequences: int


class File(Struct, frozen=True):
    """A file of a model: where it lies and what it must hash to ("sha256:…")."""

    path: str
    digest: str
    size: int


class LoadSpec(Struct, frozen=True):
    """A model to load. `files` maps the manifest's names (config.json, tensors.json, weight files).
    `dtype` of the weights, empty: what suits how they are stored; `kv_dtype` likewise. `kv_fraction` is the
    share of the device's free memory that KV blocks may take. `derived` is a folder where the driver keeps
    what it made from the files (packed weights), each file named after what it was made from; what lies
    there may vanish between loads. Empty: keep nothing."""

    handle: int
    files: dict[str, File]
    dtype: str
    kv_fraction: float
    kv_dtype: str = ""
    derived: str = ""


class Loaded(Struct, frozen=True):
    """A resident model. `blocks` is the number of KV blocks in its pool, all free. `engine` says in a line
    what computes it and, where it is not the fastest that the device has, why. `kv_layout` names how a
    block's bytes are laid out: devices of one layout can take each other's blocks. `repeats`: its steps are
    done in as many rounds as a batch asks for, else in one. `interruptible`: a batch that overtakes need not
    wait for the end of one of its steps. One that `encodes` is an encoder: it makes rows
    of `width` numbers, has no blocks and takes no steps."""

    handle: int
    dtype: str
    kv_dtype: str
    engine: str
    context_length: int
    vocab_size: int
    blocks: int
    block_bytes: int
    weights_bytes: int
    kv_layout: str = ""
    repeats: bool = False
    encodes: t.Encodes | None = None
    width: int = 0
    interruptible: bool = False


class SeqOpen(Struct, frozen=True, array_like=True):
    """Sets the mirror of sequence `seq`, whatever was there before. `tokens` (packed u32) are all tokens
    known; the first `prompt_length` of them were given, the rest generated (penalties tell them apart). The
    KV of the first `computed` positions is in `blocks` already. Generation ends when `limit` tokens are
    known. `sampling.seed` is set. `adapter` is one that is loaded, 0: the model as it is."""

    seq: int
    tokens: bytes
    prompt_length: int
    computed: int
    limit: int
    blocks: list[int]
    sampling: t.Sampling
    adapter: int = 0


class Work(Struct, frozen=True, array_like=True):
    """Append `tokens` and `blocks` to the mirror of `seq`, then compute the next `count` positions that are
    not computed yet. Where they begin is the mirror's to know: a step may be planned before the result of
    the one before it is back.

    If that reaches the end of the tokens known and `sample`, the next token is chosen and appended to the
    mirror too. With `draft` > 0 up to so many further tokens may be guessed, computed in the same step as far
    as there are blocks, and kept where they are what would have been chosen. `beams` > 0 asks instead for the
    best `beams` continuations: logprobs are log-softmax first, processors after (Hugging Face's order), and
    nothing is appended.

    A sequence that has chosen a stop token or reached its limit is over: work for it does nothing."""

    seq: int
    count: int
    tokens: list[int]
    blocks: list[int]
    sample: bool
    beams: int = 0
    draft: int = 0


class Batch(Struct, frozen=True, array_like=True):
    """One step of one model. Applied in this order: closes, opens, copies (source block, target block),
    work. At most one Work a sequence. A batch may be sent before the result of the one before it is back;
    they are computed in the order sent.

    `rounds` > 1: whoever chose a token may go on with it, at most so many times in all, as if the same work
    had been sent again; together with its guesses by no more than `draft` + `rounds` - 1 further positions.
    Only for models that have `repeats`.

    One that `overtakes` need not wait for those before it: what they do is nothing to its sequences and
    blocks. Where a device cannot interrupt a step it comes in its turn. One that `cuts` is waited for: of the
    step before it no further round begins."""

    ticket: int
    handle: int
    closes: list[int]
    opens: list[SeqOpen]
    copies: list[tuple[int, int]]
    work: list[Work]
    rounds: int = 1
    overtakes: bool = False
    cuts: bool = False


class SeqOut(Struct, frozen=True, array_like=True):
    """What one Work produced. `computed`: so many positions have valid KV now. `tokens` were chosen: none,
    one, or more when guesses were right or it took part in several `rounds`; `stop` says that the last is one
    of the stop token ids. `chosen` is parallel to `tokens` when logprobs were asked for. `prompt` scores the
    tokens at positions start+1 … start+count that were already known, when `prompt_logprobs` is on. `beams`
    holds the best continuations, best first. `drafted` counts the tokens guessed, `rounds` those that it took
    part in. `error` not empty: this sequence alone failed; `code` is the error's of syscalls.errors."""

    seq: int
    computed: int = 0
    tokens: list[int] = []
    stop: bool = False
    chosen: list[t.Chosen] = []
    prompt: list[t.Chosen] = []
    beams: list[t.TokenLogprob] = []
    drafted: int = 0
    error: str = ""
    rounds: int = 1
    code: int = errors.DeviceFault.code


class StepResult(Struct, frozen=True):
    """Results in the order of the batch's work. `seconds` is the time on the device, of all `rounds`."""

    ticket: int
    outputs: list[SeqOut]
    seconds: float
    rounds: int = 1


class Encode(Struct, frozen=True, tag="encode"):
    """A step of an encoder. `tokens` (packed u32) are sequences one behind the other, `lengths` how many
    tokens each has, and `pairs` where in each the second of two texts begins, 0: there is none. Answered by
    Encoded, or Failed."""

    ticket: int
    handle: int
    tokens: bytes
    lengths: list[int]
    pairs: list[int]


class Encoded(Struct, frozen=True, tag="encoded"):
    """Rows of float32 (little-endian), of Loaded.width numbers each: one a sequence in their order, or one a
    token where the model encodes tokens. `seconds` is the time on the device."""

    ticket: int
    data: bytes
    seconds: float


@dataclass(slots=True)
class Interrupt:
    """What may come while a step is computed: when `fd` is readable it is to be taken, and other steps, of
    other sequences, may be computed meanwhile. It is to be taken as soon as the step has begun if `due`.
    `fd` is -1 when nothing can come any more; `seconds` is the time that it took. A step that `is_cut` begins
    no further round."""

    fd: int
    serve: Callable[[], None]
    due: bool = False
    is_cut: bool = False
    seconds: float = 0.0

    def take(self) -> None:
        self.due = False
        begun = time.perf_counter()
        self.serve()
        self.seconds += time.perf_counter() - begun


class Driver(Protocol):
    """A device. Methods raise errors of `llmasos.syscalls.errors`: UnsupportedModel, Corrupt, NeverFits
    (the memory cannot hold the weights, or not one context), DeviceFault."""

    def describe(self) -> Description: ...

    def load(self, spec: LoadSpec) -> Loaded:
        """Loads weights (digests verified) and makes the KV pool."""

    def unload(self, handle: int) -> None: ...

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        """Makes a LoRA adapter (peft's adapter_config.json and adapter_model.safetensors, digests verified)
        ready for sequences of a model, under a number above 0. Returns the bytes that it takes."""

    def unload_adapter(self, handle: int, adapter: int) -> None:
        """Sequences that are open may still have it; they are closed with the next step, and not computed."""

    def submit(self, batch: Batch) -> int:
        """Starts a step and returns its ticket. Steps end in the order they were submitted, but for those
        submitted in an interrupt."""

    def collect(self, ticket: int, interrupt: Interrupt | None = None) -> StepResult:
        """Waits for a step. Only models that are Loaded.interruptible heed an `interrupt`, whose time is not
        the step's."""

    def encode(self, encode: Encode) -> Encoded:
        """Runs an encoder over whole sequences, behind the steps that were submitted."""

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        """The KV of `blocks` in a format that `import_blocks` of the same driver, model and dtype takes."""

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None: ...

    def close(self) -> None: ...


# The driver bus: length-prefixed msgpack over a private Unix socket, one worker a connection.


class Resident(Struct, frozen=True):
    """A model that a worker has loaded, as asked and as it came to be, the sequences that are open, and its
    adapters."""

    spec: LoadSpec
    loaded: Loaded
    sequences: list[int]
    adapters: list[int] = []


class Attach(Struct, frozen=True, tag="attach"):
    """A worker's first message on a connection. `residents`: what it kept from an earlier one."""

    device: str
    pid: int
    description: Description
    residents: list[Resident] = []


class Load(Struct, frozen=True, tag="load"):
    spec: LoadSpec


class Unload(Struct, frozen=True, tag="unload"):
    handle: int


class Step(Struct, frozen=True, tag="step"):
    batch: Batch


class KvStamp(Struct, frozen=True):
    """Whose KV a file holds: the model's digest, a hash of the tokens, and how many of them are computed."""

    model: str
    history: bytes
    positions: int


class Export(Struct, frozen=True, tag="export"):
    """Write the KV of `blocks`, as it is when all that was sent before is done, to a new file at `path`
    (kv_file.py). `durable`: the answer comes when it survives a power cut."""

    ticket: int
    handle: int
    path: str
    stamp: KvStamp
    blocks: list[int]
    durable: bool = False


class Import(Struct, frozen=True, tag="import"):
    """Make the block copies (source, target), then fill `blocks` with those of the file at `path` from its
    block `skip` on. What is sent after it may read them."""

    ticket: int
    handle: int
    path: str
    stamp: KvStamp
    skip: int
    blocks: list[int]
    copies: list[tuple[int, int]]


class Relay(Struct, frozen=True, tag="relay"):
    """Copy the KV file at `source` to a new one at `path`, verifying it on the way."""

    ticket: int
    source: str
    path: str
    durable: bool = False


class LoadAdapter(Struct, frozen=True, tag="load-adapter"):
    """Answered by Moved (the bytes that it takes), or Failed."""

    ticket: int
    handle: int
    adapter: int
    files: dict[str, File]


class UnloadAdapter(Struct, frozen=True, tag="unload-adapter"):
    handle: int
    adapter: int


class LoadDone(Struct, frozen=True, tag="loaded"):
    loaded: Loaded
    memory_free: int
    seconds: float


class StepDone(Struct, frozen=True, tag="stepped"):
    result: StepResult


class Moved(Struct, frozen=True, tag="moved"):
    """An Export, Import or Relay is done: so many bytes of files in so many seconds."""

    ticket: int
    bytes: int
    seconds: float


class Failed(Struct, frozen=True, tag="failed"):
    """The verb for `handle` (load) or `ticket` (the others) raised; `error` is errors.to_wire's map."""

    handle: int
    ticket: int
    error: dict[str, str | int | dict[str, str | int | float]]


class Note(Struct, frozen=True, tag="note"):
    """A line for dmesg."""

    level: str
    text: str


# Training: a run has a process of its own, the trainer (drivers/trainer/), which attaches to the same bus. It
# computes only while it holds a grant; the kernel gives one grant at a time and calls it in when somebody is
# to go first. A trainer that dies is started again and goes on from its last checkpoint.


class TrainSpec(Struct, frozen=True):
    """A run. `files` are the base model's (as in LoadSpec), `derived` likewise. `data` is a folder with the
    prepared data set (training.DataHead), `folder` the run's own: the trainer keeps checkpoints/,
    metrics.jsonl and, when it is done, result/ there. `name` is what the result will be called."""

    name: str
    device: str
    files: dict[str, File]
    derived: str
    recipe: training.Recipe
    data: str
    folder: str


class AttachTrainer(Struct, frozen=True, tag="attach-trainer"):
    """A trainer's first message. `run` is the number that it was started with."""

    run: int
    pid: int


class Train(Struct, frozen=True, tag="train"):
    """The kernel's first message to a trainer."""

    spec: TrainSpec


class Grant(Struct, frozen=True, tag="grant"):
    """Compute, until called in. Answered by Granted."""

    ticket: int


class CallIn(Struct, frozen=True, tag="call-in"):
    """Stop computing within milliseconds. The kernel does not wait for it: a trainer runs at the lowest
    priority that the operating system has, so that who goes first loses nothing to it meanwhile."""

    ticket: int


class Leave(Struct, frozen=True, tag="leave"):
    """Make the state of the last whole step durable, free everything and end with status 0: the run is
    stopped for long, or its memory is wanted. Needs no grant."""


class TrainReady(Struct, frozen=True, tag="train-ready"):
    """All is loaded and the first grant may come. `step` of `steps` are done (by an earlier trainer), and
    the evaluation of `eval_step`. `memory` is bytes of tensors."""

    step: int
    steps: int
    memory: int
    eval_step: int = 0


class Granted(Struct, frozen=True, tag="granted"):
    """The grant is over: called in, or the run is done. `seconds` of it were computed."""

    ticket: int
    seconds: float


class Trained(Struct, frozen=True, tag="trained"):
    """An event of the run, as it was appended to metrics.jsonl. One of phase `save` tells that the state
    after `step` is durable."""

    event: training.TrainEvent


class TrainDone(Struct, frozen=True, tag="train-done"):
    """result/ is whole and durable: adapter_config.json and adapter_model.safetensors, or config.json and
    model.safetensors. The trainer ends. `result` lacks what the kernel fills in: model, digest."""

    result: training.TrainResult


class MergeSpec(Struct, frozen=True):
    """What drivers/merge.py reads on its standard input: the files of a model and of an adapter of it, the
    folder where config.json and model.safetensors are to be, and the bytes that they may take."""

    base: dict[str, File]
    adapter: dict[str, File]
    folder: str
    room: int


ToWorker = (
    Load
    | Unload
    | LoadAdapter
    | UnloadAdapter
    | Step
    | Encode
    | Export
    | Import
    | Relay
    | Train
    | Grant
    | CallIn
    | Leave
)
FromWorker = (
    Attach
    | LoadDone
    | StepDone
    | Encoded
    | Moved
    | Failed
    | Note
    | AttachTrainer
    | TrainReady
    | Granted
    | Trained
    | TrainDone
)

to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)
