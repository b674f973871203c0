"""A device group that serves: ranks that compute a part of each model each, together one device.

Rank 0 is the kernel's worker. It tells the others every verb before it does it itself, so that all do the
same in the same order; they sample alike too, from the same logits with the same seeds. That they really do
is checked one step late, when it costs nothing: each step tells what the one before it has chosen.

While nothing is asked, rank 0 says so every BEAT_S, for nobody waits forever. A step that fails on one rank
leaves the others waiting inside it, so the whole group ends; the supervisor starts it again."""

from __future__ import annotations

import threading
import zlib
from contextlib import suppress

import msgspec
from llmasos.syscalls import errors
from msgspec import Struct
from msgspec.structs import replace

from ..base import Batch, Description, Encode, Encoded, File, Interrupt, Loaded, LoadSpec, StepResult
from ..launcher import BEAT_S, Place, end
from . import host
from .executor import TorchDriver
from .ranks import Ranks


class _Load(Struct, tag="load"):
    spec: LoadSpec


class _Unload(Struct, tag="unload"):
    handle: int


class _LoadAdapter(Struct, tag="load-adapter"):
    handle: int
    adapter: int
    files: dict[str, File]


class _UnloadAdapter(Struct, tag="unload-adapter"):
    handle: int
    adapter: int


class _Step(Struct, tag="step"):
    """`before`: the checksum of what was chosen in the step before."""

    batch: Batch
    before: int


class _Read(Struct, tag="read"):
    handle: int
    blocks: list[int]


class _Write(Struct, tag="write"):
    handle: int
    blocks: list[int]
    data: bytes


class _Beat(Struct, tag="beat"):
    pass


class _Leave(Struct, tag="leave"):
    pass


_Verb = _Load | _Unload | _LoadAdapter | _UnloadAdapter | _Step | _Read | _Write | _Beat | _Leave
_verb = msgspec.msgpack.Decoder(_Verb)


class _Rank:
    """What every rank does. All are asked for the same."""

    def __init__(self, kind: str, place: Place) -> None:
        own = f"cuda:{place.local}" if kind == "cuda" else kind
        self.ranks = Ranks(place, host.device_of(own))
        self.driver = TorchDriver(own, static=False, ranks=self.ranks)
        self.chosen = 0  # the checksum of the last step's tokens
        self.loaded: dict[int, Loaded] = {}  # as the kernel sees them
        self._sizes: dict[int, list[int]] = {}  # by handle: bytes of a KV block on each rank

    def load(self, spec: LoadSpec) -> Loaded:
        """Raises the same on all ranks."""
        self.unload(spec.handle)
        try:
            each = self.ranks.agree(lambda: self.driver.load(spec), Loaded)
        except errors.LLMasOSError:
            self.driver.unload(spec.handle)
            raise
        own, size = each[self.ranks.rank], self.ranks.size
        self._sizes[spec.handle] = [part.block_bytes for part in each]
        self.loaded[spec.handle] = replace(
            own,
            engine=f"{own.engine}, tensor parallel on {size} ranks",
            blocks=min(part.blocks for part in each),
            block_bytes=sum(self._sizes[spec.handle]),
            weights_bytes=sum(part.weights_bytes for part in each),
            kv_layout=f"{own.kv_layout} of {size} ranks",
        )
        return self.loaded[spec.handle]

    def unload(self, handle: int) -> None:
        self.loaded.pop(handle, None)
        self.driver.unload(handle)

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        """Raises the same on all ranks."""
        try:
            return sum(self.ranks.agree(lambda: self.driver.load_adapter(handle, adapter, files), int))
        except errors.LLMasOSError:
            if handle in self.loaded:
                self.driver.unload_adapter(handle, adapter)
            raise

    def step(self, batch: Batch, before: int) -> StepResult:
        if before != self.chosen:
            raise errors.DeviceFault("the ranks have chosen different tokens")
        result = self.driver.collect(self.driver.submit(batch))
        self.chosen = zlib.crc32(msgspec.msgpack.encode([out.tokens for out in result.outputs]))
        return result

    def read(self, handle: int, blocks: list[int]) -> bytes:
        """The parts of all ranks, one behind the other."""
        return b"".join(self.ranks.gather(self.driver.export_blocks(handle, blocks)))

    def write(self, handle: int, blocks: list[int], data: bytes) -> None:
        sizes, rank = self._sizes[handle], self.ranks.rank
        first = sum(sizes[:rank]) * len(blocks)
        self.driver.import_blocks(handle, blocks, data[first : first + sizes[rank] * len(blocks)])


class GroupDriver:
    """Rank 0 of a group on `kind` ("cpu", "cuda"); the others `follow`. See base.Driver."""

    def __init__(self, kind: str, place: Place) -> None:
        self._place = place
        self._rank = _Rank(kind, place)
        self._ranks = self._rank.ranks
        self._results: dict[int, StepResult] = {}
        self._order = threading.Lock()  # one verb, or beat, at a time
        self._idle, self._left = True, threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="beats").start()

    def describe(self) -> Description:
        found = self._rank.driver.describe()
        return replace(found, text=f"{self._place.size} ranks, tensor parallel, each: {found.text}")

    def load(self, spec: LoadSpec) -> Loaded:
        with self._order:
            self._tell(_Load(spec))
            return self._rank.load(spec)

    def unload(self, handle: int) -> None:
        with self._order:
            self._tell(_Unload(handle))
            self._rank.unload(handle)

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        with self._order:
            self._known(handle, [])
            self._tell(_LoadAdapter(handle, adapter, files))
            return self._rank.load_adapter(handle, adapter, files)

    def unload_adapter(self, handle: int, adapter: int) -> None:
        with self._order:
            self._known(handle, [])
            self._tell(_UnloadAdapter(handle, adapter))
            self._rank.driver.unload_adapter(handle, adapter)

    def submit(self, batch: Batch) -> int:
        with self._order:
            self._known(batch.handle, [])
            self._tell(_Step(batch, self._rank.chosen))
            try:
                self._results[batch.ticket] = self._rank.step(batch, self._rank.chosen)
            except Exception as problem:
                end(f"rank 0 failed in a step: {_text(problem)}")
        return batch.ticket

    def collect(self, ticket: int, interrupt: Interrupt | None = None) -> StepResult:
        if (result := self._results.pop(ticket, None)) is None:
            raise errors.DeviceFault(f"no step with ticket {ticket} was submitted")
        return result

    def encode(self, encode: Encode) -> Encoded:
        raise errors.DeviceFault("a group computes no encoders")

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        with self._order:
            self._known(handle, blocks)
            self._tell(_Read(handle, blocks))
            return self._rank.read(handle, blocks)

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None:
        with self._order:
            size = self._known(handle, blocks).block_bytes * len(blocks)
            if len(data) != size:
                raise errors.Corrupt(f"{len(data)} bytes for {len(blocks)} blocks, {size} expected")
            self._tell(_Write(handle, blocks, data))
            self._rank.write(handle, blocks, data)

    def close(self) -> None:
        self._left.set()
        with self._order:
            self._tell(_Leave())
            self._rank.driver.close()
            self._ranks.close()
        self._place.leave()

    def _known(self, handle: int, blocks: list[int]) -> Loaded:
        """Raises what every rank would raise, before any is told."""
        if (loaded := self._rank.loaded.get(handle)) is None:
            raise errors.DeviceFault(f"no model is loaded under handle {handle}")
        if blocks and not (min(blocks) >= 0 and max(blocks) < loaded.blocks):
            raise errors.DeviceFault(f"a block is outside the pool of {loaded.blocks}")
        return loaded

    def _tell(self, verb: _Verb) -> None:
        self._idle = False
        try:
            self._ranks.tell(msgspec.msgpack.encode(verb))
        except RuntimeError as problem:
            end(f"the others do not answer: {_text(problem)}")

    def _beat(self) -> None:
        while not self._left.wait(BEAT_S):
            if self._idle:
                with self._order:
                    self._tell(_Beat())
            self._idle = True


def follow(kind: str, place: Place) -> None:
    """Does what rank 0 tells, until it tells to leave. Does not return when something fails."""
    try:
        rank = _Rank(kind, place)
        while True:
            match _verb.decode(rank.ranks.tell()):
                case _Load(spec):
                    with suppress(errors.LLMasOSError):  # rank 0 answers
                        rank.load(spec)
                case _Unload(handle):
                    rank.unload(handle)
                case _LoadAdapter(handle, adapter, files):
                    with suppress(errors.LLMasOSError):
                        rank.load_adapter(handle, adapter, files)
                case _UnloadAdapter(handle, adapter):
                    rank.driver.unload_adapter(handle, adapter)
                case _Step(batch, before):
                    rank.step(batch, before)
                case _Read(handle, blocks):
                    rank.read(handle, blocks)
                case _Write(handle, blocks, data):
                    rank.write(handle, blocks, data)
                case _Beat():
                    continue
                case _Leave():
                    rank.ranks.close()
                    return
    except Exception as problem:
        end(f"rank {place.rank} failed: {_text(problem)}")


def _text(problem: Exception) -> str:
    """For people, without a foreign exception's text, which may quote a prompt."""
    return str(problem) if isinstance(problem, errors.LLMasOSError) else type(problem).__name__
