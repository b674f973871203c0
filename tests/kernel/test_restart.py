"""Random life with a kernel that dies at any moment: before what it did was durable, after that but before
anybody heard of it, or in the middle of a stream. The clients are the real ones without their sockets; a
worker keeps what it has loaded. Everybody must be answered once, with what an undisturbed kernel would have
answered."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.drivers import base
from llmasos.drivers.null import next_token
from llmasos.kernel.config import Config
from llmasos.kernel.effects import ToWorker
from llmasos.kernel.loop import Kernel
from llmasos.kernel.sessions import Send
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.session import Failed, Item, Replied, Session

from .conftest import ROOT, World, infer

VOCAB = 11


@dataclass
class Call:
    """A call under way, and what came of it. `expected` are the tokens that it must bring."""

    call: table.Call
    expected: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: int = 0
    scores: int = 0
    reply: Any = None
    error: errors.LLMasOSError | None = None


class Clients(World):
    """Clients with sessions instead of sockets, and a kernel that can be replaced."""

    def __init__(self, home: Path, dice: random.Random, clients: int) -> None:
        super().__init__(home, crash_limit=1000)
        self.model("tiny", llmasos_null_blocks=64, max_position_embeddings=400, vocab_size=VOCAB)
        self.dice = dice
        self.rows: dict[str, bytes] = {}
        self.sessions = [Session(token=f"{number:032x}") for number in range(clients)]
        self.calls: list[dict[int, Call]] = [{} for _ in range(clients)]
        self.boots = 0
        self.attach()
        self.connect()

    def connect(self) -> None:
        for session in self.sessions:
            session.online()

    def route(self, number: int) -> bytes:
        return b"\0%d-%d" % (self.boots, number)

    def ask(self, number: int, call: table.Call, expected: list[int] | None = None) -> Call:
        id_ = self.sessions[number].request(call, 8 if call.Item else 0)
        made = self.calls[number][id_] = Call(call, expected or [])
        return made

    def round(self, dies: bool = False) -> None:
        """Messages in, one turn, messages out; or the kernel dies somewhere in between."""
        when = self.dice.choice(["before", "durable"]) if dies else ""
        for number, session in enumerate(self.sessions):
            for frames in session.outgoing():
                self.kernel.message(self.route(number), ROOT, frames)
        self.kernel.tick()
        self.now += 0.01
        effects = self.kernel.take_effects()
        for effect in effects:
            if isinstance(effect, ToWorker) and not dies:
                self.carry_out(effect)
        if when != "before":
            for name, data in self.kernel.ledger.take().items():
                self.rows.pop(name, None)
                if data is not None:
                    self.rows[name] = data
        if dies:
            # Some of what was sent still arrives, from the front.
            sends = [effect for effect in effects if isinstance(effect, Send)] if when == "durable" else []
            self.hear(sends[: self.dice.randint(0, len(sends))])
            self.reboot()
        else:
            self.hear([effect for effect in effects if isinstance(effect, Send)])

    def hear(self, sends: list[Send]) -> None:
        for send in sends:
            number = int(send.session.rpartition(b"-")[2])
            for event in self.sessions[number].receive(send.frames):
                self.note(number, event)

    def note(self, number: int, event: object) -> None:
        match event:
            case Item(id_, item):
                call = self.calls[number][id_]
                assert isinstance(item, t.InferEvent)
                call.tokens += item.tokens
                call.logprobs += len(item.logprobs)
                call.scores += len(item.prompt_logprobs)
                self.sessions[number].grant(id_, 1)
            case Replied(id_, reply):
                call = self.calls[number][id_]
                assert call.reply is None
                call.reply = reply
            case Failed(id_, error):
                self.calls[number][id_].error = error

    def reboot(self) -> None:
        self.boots += 1
        (device,) = self.kernel.devices.values()
        residents = []
        for pool in device.pools:
            if pool.loaded:
                spec = base.LoadSpec(pool.handle, pool.files, pool.dtype, 0.4)
                residents.append(base.Resident(spec, pool.loaded, list(range(2, 90))))
        config = Config(crash_limit=1000)
        self.kernel = Kernel(
            config, self.store, ["null"], lambda: self.now, seed=self.boots, rows=dict(self.rows), epoch=7.0
        )
        if self.dice.random() < 0.7:
            attach = base.Attach("null", 101, self.drivers[1].describe(), residents)
            self.kernel.worker_message(1, attach)
        else:  # the worker died with it
            self.attach()
        for number, session in enumerate(self.sessions):
            for event in session.offline():
                self.note(number, event)
        self.connect()

    def settle(self) -> None:
        for _ in range(400):
            if not any(session.waiting for session in self.sessions):
                return
            self.round()
        raise AssertionError([c for calls in self.calls for c in calls.values() if not (c.reply or c.error)])


def continuation(context: list[int], count: int, sampling: t.Sampling) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        made.append(next_token([*context, *made], VOCAB, sampling, len(context)))
        if made[-1] in sampling.stop_token_ids:
            break
    return made


@given(seed=st.integers(0, 2**32), dies=st.sampled_from([0.05, 0.2, 0.4]))
@settings(max_examples=40, deadline=None)
def test_a_kernel_that_dies_again_and_again_answers_everybody_once(seed: int, dies: float) -> None:
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        world = Clients(Path(folder), dice, clients=2)
        contexts: list[dict[int, list[int]]] = [{}, {}]
        for _ in range(10):
            asked: list[tuple[int, int | None, Call]] = []
            for number in range(2):
                asked += [(number, pid, call) for pid, call in acts(world, dice, number, contexts[number])]
            for _ in range(12):
                world.round(dies=dice.random() < dies)
            world.settle()
            for number, pid, call in asked:
                book(number, pid, call, contexts)
                if isinstance(call.call, table.Infer) and call.call.exit:
                    waited = world.ask(number, table.Wait(pid or 0))
                    for _ in range(3):
                        world.round(dies=dice.random() < dies)
                    world.settle()
                    book(number, pid, waited, contexts)
        for number in range(2):
            for pid, context in contexts[number].items():
                read = world.ask(number, table.Read(f"/proc/{pid}/tokens"))
                world.settle()
                assert t.unpack_tokens(read.reply.data) == context
        listed = world.ask(0, table.Ps())
        world.settle()
        assert [row.pid for row in listed.reply.processes] == sorted([*contexts[0], *contexts[1]])


def acts(
    world: Clients, dice: random.Random, number: int, contexts: dict[int, list[int]]
) -> list[tuple[int | None, Call]]:
    """Some calls at once, each on a process of its own."""
    made: list[tuple[int | None, Call]] = [(None, world.ask(number, table.SpawnModel(model="tiny")))]
    pids = dice.sample(sorted(contexts), min(len(contexts), 3))
    for pid in [*pids, None]:
        context = contexts.get(pid, []) if pid else []
        given = dice.choices(range(VOCAB), k=dice.randint(1, 20))
        sampling = t.Sampling(
            temperature=dice.choice([0.0, 1.0]),
            seed=dice.randrange(4),
            stop_token_ids=dice.choice([[], [3]]),
            min_new_tokens=dice.choice([0, 3]),
            logprobs=dice.choice([None, 2]),
            prompt_logprobs=dice.random() < 0.3,
        )
        act = dice.choice(["infer", "infer", "whole", "fork", "truncate", "kill"]) if pid else "infer"
        if act == "infer" and len(context) < 300:
            count = dice.choice([0, 1, 9, 20])
            whom: dict[str, Any] = {"pid": pid, "exit": dice.random() < 0.1} if pid else {"model": "tiny"}
            call = infer(given, max_tokens=count, sampling=sampling, **whom)
            expected = continuation([*context, *given], count, sampling)
            made.append((pid, world.ask(number, call, expected)))
        elif act == "whole" and pid:
            count = dice.choice([0, 9, 20])
            wanted = context[: dice.randint(0, len(context))][:280] + given
            call = infer(wanted, pid=pid, whole=True, max_tokens=count, sampling=sampling)
            made.append((pid, world.ask(number, call, continuation(wanted, count, sampling))))
        elif act == "fork" and pid:
            made.append((pid, world.ask(number, table.Fork(pid, dice.randint(1, 2)))))
        elif act == "truncate" and pid:
            made.append((pid, world.ask(number, table.Truncate(pid, dice.randint(0, len(context))))))
        elif act == "kill" and pid:
            made.append((pid, world.ask(number, table.Kill(pid))))
            made.append((pid, world.ask(number, table.Wait(pid))))
    return made


def book(number: int, pid: int | None, done: Call, contexts: list[dict[int, list[int]]]) -> None:
    """Checks an answer, and books what it changed."""
    assert done.error is None, done
    own, call, reply = contexts[number], done.call, done.reply
    match call:
        case table.SpawnModel():
            assert reply.pid not in contexts[0] | contexts[1]
            own[reply.pid] = []
        case table.Infer():
            given = t.unpack_tokens(call.tokens)
            assert done.tokens == done.expected
            assert reply.generated_tokens == len(done.tokens)
            if call.whole and pid is not None:
                same = next(
                    (n for n, (a, b) in enumerate(zip(own[pid], given[:-1], strict=False)) if a != b),
                    min(len(own[pid]), len(given) - 1),
                )
                del own[pid][same:]
                given = given[same:]
            assert reply.prompt_tokens == len(given)
            assert done.logprobs == (len(done.tokens) if call.sampling.logprobs is not None else 0)
            assert done.scores == (len(given) if call.sampling.prompt_logprobs else 0)
            if pid is not None:
                own[pid] += given + done.tokens
                assert reply.context == len(own[pid])
        case table.Fork():
            assert pid is not None
            for child in reply.pids:
                assert child not in contexts[0] | contexts[1]
                own[child] = list(own[pid])
        case table.Truncate():
            assert pid is not None
            del own[pid][call.length :]
        case table.Wait():
            assert reply.reason.startswith(("signal TERM", "infer ended"))
            assert pid is not None
            del own[pid]


def test_a_full_disk_is_an_error_for_what_needs_more_of_it(tmp_path: Path) -> None:
    world = Clients(tmp_path, random.Random(1), clients=1)
    pid = world.ask(0, table.SpawnModel(model="tiny"))
    world.settle()

    def full() -> None:
        raise errors.Unavailable("the disk is full")

    world.store.require_room = full  # type: ignore[method-assign]
    refused = [world.ask(0, table.SpawnModel(model="tiny")), world.ask(0, table.Fork(pid.reply.pid))]
    frees = [world.ask(0, table.Kill(pid.reply.pid)), world.ask(0, table.Wait(pid.reply.pid))]
    world.settle()
    assert [type(call.error) for call in refused] == [errors.Unavailable] * 2
    assert [call.error for call in frees] == [None] * 2


def test_who_does_not_return_after_a_restart_is_forgotten(tmp_path: Path) -> None:
    world = Clients(tmp_path, random.Random(1), clients=2)
    mine, other = (world.ask(number, table.SpawnModel(model="tiny")) for number in range(2))
    loose = world.ask(0, table.SpawnModel(model="tiny", detached=True))
    world.settle()
    world.round(dies=True)
    gone = world.sessions.pop(0)
    gone.offline()
    world.sessions.insert(0, Session(token="f" * 32))
    world.sessions[0].online()
    world.calls[0] = {}
    listed = world.ask(1, table.Ps())
    world.settle()
    assert [row.pid for row in listed.reply.processes] == sorted(c.reply.pid for c in (mine, other, loose))
    world.now += 31
    world.round()
    listed = world.ask(1, table.Ps())
    world.settle()
    assert [row.pid for row in listed.reply.processes] == sorted([other.reply.pid, loose.reply.pid])
    assert not any(
        name.startswith("answer") and b"0" * 32 in bytes(data) for name, data in world.rows.items()
    )
