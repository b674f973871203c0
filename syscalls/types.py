"""The types that travel: arguments, replies and stream items of the syscall table.

Structs are maps on the wire; unknown fields are refused, ranges are part of the type, so a bad request
is named before it costs anything. Token ids travel as raw little-endian u32 (`pack_tokens`) wherever
there may be many of them.
"""

from __future__ import annotations

import array
import enum
import sys
from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

BLOCK_TOKENS = 16
"""Tokens in one KV block."""

Text = Annotated[str, Meta(max_length=256)]
Path_ = Annotated[str, Meta(min_length=1, max_length=512)]
Pid = Annotated[int, Meta(ge=1, le=2**53)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]

Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Place = Annotated[int, Meta(ge=0, le=2**53)]
"""Of something in a file, a stream or a list."""

Nice = Annotated[int, Meta(ge=-20, le=19)]
Device = Annotated[str, Meta(max_length=32)]
Dtype = Annotated[str, Meta(pattern="^(|float32|bfloat16|float8|int8|int4)$")]
Label = Annotated[str, Meta(max_length=64)]

_SNAPSHOT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z"
_TENANT = r"^[a-z0-9][a-z0-9._-]*\Z"
_OWNER = r"^[^/]+(/[^/]+)*\Z"
_KEY = r"^[0-9a-f]{64}\Z"
SnapshotName = Annotated[str, Meta(pattern=_SNAPSHOT)]
Tenant = Annotated[str, Meta(max_length=64, pattern=_TENANT)]
OwnerPath = Annotated[str, Meta(max_length=256, pattern=_OWNER)]
PublicKey = Annotated[str, Meta(max_length=64, pattern=_KEY)]
"""32 bytes in hexadecimal: what a shell passes on as it is, unlike Z85."""

IN_WORDS = {
    _SNAPSHOT: "a name: letters, digits, `.`, `_`, `-`, at most 96, the first a letter or a digit",
    _TENANT: "a name: small letters, digits, `.`, `_`, `-`, at most 64, the first a letter or a digit",
    _OWNER: "a tenant, or names below it with a `/` between them, as alice/agent",
    _KEY: "64 hexadecimal digits",
}
"""What a value has to be, by the pattern that it did not match."""


class Wire(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of everything that travels."""


class Capability(enum.StrEnum):
    """Rights that a caller may hold. Every call names the one that it needs (`Call.needs`)."""

    CONNECT = "connect"  # say hello and ask who one is: whoever is let in at all
    SEE = "see"  # list and read what the caller may see: models, devices, its own processes
    INFER = "infer"  # generate
    PROCESS = "process"  # start processes and command its own
    TRAIN = "train"  # bring in data sets and train on them
    MODELS = "models"  # bring in models and give them further names
    FILES = "files"  # bring in models from files that the daemon can read
    PRIORITY = "priority"  # class realtime, negative nice values
    AUDIT = "audit"  # read the kernel's log and the audit log
    ADMIN = "admin"  # everything, others' processes included


Rights = Annotated[tuple[Capability, ...], Meta(max_length=16)]

TENANT_RIGHTS: Rights = (Capability.SEE, Capability.INFER, Capability.PROCESS)
"""What a tenant holds of whom nothing else was said."""


class SchedClass(enum.StrEnum):
    """Scheduling classes, strongest first."""

    REALTIME = "realtime"
    INTERACTIVE = "interactive"
    BATCH = "batch"
    IDLE = "idle"


class State(enum.StrEnum):
    """Process states (design.md section 4)."""

    NEW = "new"
    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    SWAPPED = "swapped"
    STOPPED = "stopped"
    ZOMBIE = "zombie"


class Signal(enum.StrEnum):
    """What `kill` can send."""

    TERM = "TERM"
    KILL = "KILL"
    STOP = "STOP"
    CONT = "CONT"


class Finish(enum.StrEnum):
    """Why an `infer` ended."""

    STOP = "stop"  # a stop token
    LENGTH = "length"  # max_tokens or the context is full
    CANCELLED = "cancelled"  # the caller cancelled the request
    KILLED = "killed"  # a signal ended the process
    DEADLINE = "deadline"  # its `deadline_ms` passed


class GrammarKind(enum.StrEnum):
    """What a grammar's text is."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the whole text, as Rust's regex crate has it
    CHOICE = "choice"  # a JSON list of strings, one of which is the text
    LARK = "lark"  # EBNF as llguidance reads it


class Grammar(Wire, frozen=True):
    """What generated text has to match: whatever is chosen, it stays a prefix of a text that does. A stop
    token may come only where the text is complete, and must come where nothing can follow."""

    kind: GrammarKind
    text: Annotated[str, Meta(min_length=1, max_length=32768)]


class Sampling(Wire, frozen=True):
    """How the next token is chosen. Defaults are greedy.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `repetition_penalty` counts the
    whole context (Hugging Face's meaning), `presence_penalty` and `frequency_penalty` what was generated
    (OpenAI's). Noise depends on (seed, position) alone, so a recomputed process repeats itself.
    `logprobs` n returns the n most likely tokens of each step besides the chosen one;
    `prompt_logprobs` scores the input tokens too. `grammar` counts from the first generated token, and needs
    a stop token.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-100, le=100)] = 0.0
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    min_new_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] = []
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    prompt_logprobs: bool = False
    grammar: Grammar | None = None

    @property
    def follows_text(self) -> bool:
        """Whether penalties or bans change with every token: nothing can be chosen for several positions at
        once."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.no_repeat_ngram_size > 0
        )


class Beams(Wire, frozen=True):
    """Beam search, with the meanings of Hugging Face `generate`.

    `early_stopping`: "true" ends when enough hypotheses are finished, "false" uses the heuristic, "never"
    only ends when no running beam can win.
    """

    num_beams: Annotated[int, Meta(ge=2, le=16)]
    num_return_sequences: Annotated[int, Meta(ge=1, le=16)] = 1
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] = 1.0
    early_stopping: Annotated[str, Meta(pattern="^(true|false|never)$")] = "false"


class TokenLogprob(Wire, frozen=True, array_like=True):
    """One token with its natural-log probability."""

    token: int
    logprob: float


class Chosen(Wire, frozen=True, array_like=True):
    """The score of one token of the context and, if asked for, the best alternatives at its place."""

    logprob: float
    top: list[TokenLogprob] = []


class InferEvent(Wire, frozen=True):
    """Stream item of `infer`: tokens generated since the last item.

    `logprobs` is parallel to `tokens` when logprobs were asked for. `prompt_logprobs` comes with the first
    item that follows the input: one entry an input token (the first token of a context has none: NaN).
    """

    tokens: list[int] = []
    logprobs: list[Chosen] = []
    prompt_logprobs: list[Chosen] = []


class Sequence(Wire, frozen=True):
    """One result of beam search: generated tokens, Hugging Face's length-normalised score, reason."""

    tokens: list[int]
    score: float
    finish: Finish


class ProcessInfo(Wire, frozen=True):
    """A row of `ps`. Of one that trains, `context` are its steps, `computed` those that are done, `generated`
    the tokens that it was trained on."""

    pid: int
    parent: int
    owner: str
    name: str
    model: str
    device: str
    sched_class: SchedClass
    nice: int
    state: State
    waiting_for: str
    context: int  # tokens known
    computed: int  # tokens whose KV is in a device's memory
    blocks: int
    generated: int
    tokens_per_s: float
    queue_place: int  # 0: not queued
    age_s: float
    drafted: int = 0  # tokens guessed while generating
    accepted: int = 0  # of them came true
    preemptions: int = 0  # how often others took its memory while an infer ran


class Encodes(enum.StrEnum):
    """What an encoder makes of a sequence: the one thing that it was trained for."""

    EMBED = "embed"  # one vector, pooled and normalised as the model's own files say
    CLASSIFY = "classify"  # a logit for each label (of a cross-encoder: one, the score of a pair)
    TOKENS = "tokens"  # for each token a logit for each label


ENCODED_BY = {
    Encodes.EMBED: "it makes vectors: embed() in Python, `llsh embed`, /v1/embeddings",
    Encodes.CLASSIFY: "it scores texts: encode() in Python, /v1/classify; a cross-encoder pairs: /v1/rerank",
    Encodes.TOKENS: 'it labels tokens: encode(…, "tokens") in Python',
}
"""What tells somebody who asked an encoder for something else how it is used, wherever he asked."""


class KeyInfo(Wire, frozen=True):
    """A public key that may come in over tcp, as whom, and with which rights."""

    tenant: Tenant
    public: PublicKey
    rights: Rights = TENANT_RIGHTS


class Quota(Wire, frozen=True):
    """What an owner and those below it may use together. None: no limit of its own.

    `weight` is a tenant's share of the devices against others' of its class. KV blocks are of each model on
    each device: up to `kv_min` nobody of the same class takes them away.
    """

    weight: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0
    kv_min: Annotated[int, Meta(ge=0)] = 0
    kv_max: Annotated[int, Meta(ge=1)] | None = None
    tokens_in: Annotated[int, Meta(ge=1)] | None = None  # a minute, of input
    tokens_out: Annotated[int, Meta(ge=1)] | None = None  # a minute, generated
    processes: Annotated[int, Meta(ge=0)] | None = None
    queue: Annotated[int, Meta(ge=0)] | None = None  # infers that run or wait
    disk_bytes: Annotated[int, Meta(ge=0)] | None = None  # of snapshots, data sets, models made


class QuotaInfo(Wire, frozen=True):
    """A node of the quota tree: its own limits, if it has any, and what it and those below it use.

    `tokens_in` and `tokens_out` are what is left of this minute's, below 0 when more was used; None: no
    limit.
    """

    path: str
    limit: Quota | None
    blocks: int
    processes: int
    queue: int
    disk_bytes: int
    tokens_in: int | None = None
    tokens_out: int | None = None


class FileKind(enum.StrEnum):
    FOLDER = "folder"
    FILE = "file"
    MODEL = "model"
    SESSION = "session"
    DATASET = "dataset"


class FileInfo(Wire, frozen=True):
    """An entry of the model filesystem. `modified` is seconds since the epoch."""

    path: str
    kind: FileKind
    size: int
    digest: str = ""
    modified: float = 0.0
    details: dict[str, str | int | float] = {}


class PoolInfo(Wire, frozen=True):
    """A model resident on a device and its KV blocks. `model` is "(private N)" where it is another tenant's
    and nobody else's to know."""

    model: str
    dtype: str
    kv_dtype: str
    engine: str  # what computes it, and why nothing faster does
    weights_bytes: int
    block_bytes: int
    blocks_total: int
    blocks_free: int
    processes: int
    encodes: Encodes | None = None  # an encoder: it has no KV


class DeviceInfo(Wire, frozen=True):
    """A device as `lsdev` shows it."""

    name: str
    driver: str
    state: str  # starting, ready, busy, down
    description: str
    memory_total: int
    memory_free: int
    worker_pid: int
    restarts: int
    step_ms: float  # median of recent steps
    pools: list[PoolInfo]
    running_s: float = 0.0  # age of the step that is being computed
    idle_s: float | None = None  # since a step ended last


class LogLine(Wire, frozen=True):
    """One kernel log line. `time` is seconds since boot."""

    seq: int
    time: float
    level: str
    text: str


class PullEvent(Wire, frozen=True):
    """Progress of an import: bytes `done` of `total` (0 if unknown) in `phase`."""

    phase: str
    file: str = ""
    done: int = 0
    total: int = 0


class FamilyKind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Sample(Wire, frozen=True, array_like=True):
    """A value for these values of the family's labels. Of a histogram `value` is the sum; `buckets` counts
    what lies at or below each bound and above the one before, and last what is above all."""

    labels: list[str]
    value: float
    buckets: list[int] = []


class Family(Wire, frozen=True):
    """Samples of one kind, as Prometheus has them; counters only grow, until the kernel starts anew."""

    name: str
    kind: FamilyKind
    help: str
    labels: list[str]
    samples: list[Sample]
    bounds: list[float] = []


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian u32. Raises OverflowError or TypeError on anything else."""
    packed = array.array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """Inverse of `pack_tokens`. Raises ValueError when the length is not a multiple of four."""
    unpacked = array.array("I")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked.tolist()
