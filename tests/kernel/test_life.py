"""Random life with two steps in flight: whatever comes between sending a step and its result, every answer is
right, and nothing is left over. The null driver's tokens depend on every slot of the history, read through
the block table: a block that was given away too early, a stale mirror or a lost result shows as wrong tokens.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llmasos.drivers.null import next_token
from llmasos.kernel import newcomers, planning, swapping
from llmasos.syscalls import table, wire
from llmasos.syscalls import types as t

from .conftest import ROOT, World, infer

BLOCKS, CONTEXT, VOCAB = 14, 160, 7


@dataclass
class Asked:
    """An infer and what it went on from. `pid` None: one-shot."""

    pid: int | None
    context: list[int]
    count: int
    sampling: t.Sampling
    beams: bool
    made: list[int] = field(default_factory=list)


class Life:
    def __init__(self, home: Path, dice: random.Random, memory: int, **settings: object) -> None:
        self.world = World(home, crash_limit=1000, aging_s=0.3, **settings)
        self.world.model(
            "tiny",
            llmasos_null_blocks=BLOCKS,
            llmasos_null_memory=memory,
            max_position_embeddings=CONTEXT,
            vocab_size=VOCAB,
        )
        self.world.attach()
        self.dice, self.memory, self.workers = dice, memory, 1
        self.asked: dict[int, Asked] = {}  # open requests
        self.pids: list[int] = []
        for _ in range(3):
            self.pids.append(self.world.spawn())
        self.world.holds_steps = True
        self.accepted = 0
        self.saving: list[int] = []  # snapshots under way, by request

    # What may happen

    def ask(self) -> None:
        """An infer on an idle process, or a one-shot; often with a prefix that others have."""
        dice, idle = self.dice, self.idle()
        pid = dice.choice(idle) if idle and dice.random() < 0.6 else None
        before = self.tokens(pid) if pid is not None else []
        start = dice.choice([[], [1] * 40, [2] * 33])
        given = (start if not before else []) + dice.choices(range(3), k=dice.randint(1, 30))
        beams = pid is None and dice.random() < 0.15
        count = dice.choice([0, 1, 2, 17, 30]) if not beams else dice.randint(1, 12)
        if len(before) + len(given) + count > CONTEXT:
            return
        sampling = t.Sampling(
            temperature=0.0 if beams else dice.choice([0.0, 0.8]),
            seed=dice.randrange(3),
            stop_token_ids=dice.choice([[], [], [3]]),
            min_new_tokens=dice.choice([0, 0, 4]),
            repetition_penalty=dice.choice([1.0, 1.0, 1.2]),  # which the null driver has not: but no guesses
            logprobs=dice.choice([None, None, 1]),
            prompt_logprobs=not beams and dice.random() < 0.1,
        )
        call = infer(
            given,
            **({"pid": pid} if pid is not None else {"model": "tiny"}),
            max_tokens=count,
            sampling=sampling,
            beams=t.Beams(num_beams=2) if beams else None,
            sched_class=dice.choice(list(t.SchedClass)) if pid is None else t.SchedClass.INTERACTIVE,
        )
        id_ = self.world.send(call, credits_=dice.choice([0, 1, 3, 999]))
        self.asked[id_] = Asked(pid, before + given, count, sampling, beams)

    def land(self) -> None:
        if self.world.held:
            self.world.land(late=self.dice.random() < 0.2)

    def fail(self) -> None:
        if self.world.held and self.dice.random() < 0.5:
            self.world.land(fails=True)

    def die(self) -> None:
        if self.dice.random() < 0.1:
            self.world.die(self.workers)
            self.workers += 1
            self.world.attach(self.workers)

    def cancel(self) -> None:
        """And asks again, while the steps of what was cancelled are in flight."""
        if self.asked:
            id_ = self.dice.choice(sorted(self.asked))
            self.world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))
            self.world.flush()
            self.check()
            self.dice.choice([self.ask, self.cut, self.fork, self.fail])()

    def credit(self) -> None:
        for id_ in self.asked:
            self.world.kernel.message(b"\0a", ROOT, wire.encode_credit(id_, self.dice.randint(1, 3)))

    def signal(self) -> None:
        pid = self.dice.choice(self.pids)
        self.world.send(table.Kill(pid, self.dice.choice([t.Signal.STOP, t.Signal.CONT])))

    def kill(self) -> None:
        if self.dice.random() < 0.5:
            pid = self.dice.choice(self.pids)
            self.world.send(table.Kill(pid))
            self.world.send(table.Wait(pid))
            self.pids.remove(pid)
            if self.dice.random() < 0.5 or not self.pids:
                spawned = self.world.send(table.SpawnModel(model="tiny"))
                self.world.flush()
                self.pids.append(int(self.world.result(spawned).body["pid"]))

    def cut(self) -> None:
        if idle := self.idle():
            pid = self.dice.choice(idle)
            self.world.send(table.Truncate(pid, self.dice.randint(0, len(self.tokens(pid)))))

    def fork(self) -> None:
        if (idle := self.idle()) and len(self.pids) < 8:
            fork = self.world.send(table.Fork(self.dice.choice(idle)))
            self.world.flush()
            self.pids += self.world.result(fork).body["pids"]

    def save(self) -> None:
        self.saving.append(self.world.send(table.Snapshot(self.dice.choice(self.pids), "s")))

    def restore(self) -> None:
        """Its KV, if it has any, is the KV of its tokens: what it generates tells."""
        if len(self.pids) < 8:
            id_ = self.world.send(table.Restore("s"))
            self.world.flush()
            final = self.world.answers(id_)
            if final and final[0].kind == wire.Kind.REPLY:
                self.pids.append(int(final[0].body["pid"]))
            else:
                self.world.kernel.message(b"\0a", ROOT, wire.encode_cancel(id_))

    def disk(self) -> None:
        """Breaks, or is mended."""
        self.world.fail_moves = self.dice.random() < 0.3

    def act(self) -> None:
        acts = [self.ask] * 3 + [self.land] * 7 + [self.credit] * 2
        acts += [self.fail, self.die, self.cancel, self.signal, self.kill, self.cut, self.fork]
        acts += [self.save, self.restore, self.disk]
        self.dice.choice(acts)()
        self.world.now += 0.01
        if self.dice.random() < 0.7:
            self.world.flush()
        self.check()

    # What has to be so

    def tokens(self, pid: int) -> list[int]:
        return list(next(p.tokens for p in self.world.kernel.processes if p.pid == pid))

    def idle(self) -> list[int]:
        busy = {asked.pid for asked in self.asked.values()}
        rows = {p.pid: p for p in self.world.kernel.processes}
        return [p for p in self.pids if p not in busy and rows[p].infer is None]

    def check(self) -> None:
        (pool,) = self.world.kernel.devices["null"].pools
        pool.memory.check([p.table for p in pool.processes])
        for p in pool.processes:
            assert 0 <= p.flights <= 2
            assert min(p.ahead, p.coming, p.guesses) >= 0
            if p.ahead:
                assert p.reach(0)[1] <= 16 * len(p.table.blocks), "a step may write where it has no block"
        for id_ in [id_ for id_ in self.asked if self.ended(id_)]:
            self.judge(id_, self.asked.pop(id_))

    def ended(self, id_: int) -> bool:
        return any(a.kind != wire.Kind.ITEMS for a in self.world.answers(id_))

    def judge(self, id_: int, asked: Asked) -> None:
        final, made = self.world.result(id_), self.world.tokens(id_)
        if final.kind == wire.Kind.ERROR:
            killed = asked.pid is not None and asked.pid not in self.pids  # while it waited for its model
            ended = [f"process {asked.pid} has ended"] if killed else []
            assert final.body["message"] in ("raised", "cancelled", *ended), final.body
        if asked.beams:
            return
        context = list(asked.context)
        for token in made:
            assert token == self.next(context, asked), "a wrong token"
            context.append(token)
        for item in (a.body for a in self.world.answers(id_) if a.kind == wire.Kind.ITEMS):
            wanted = len(item["tokens"]) if asked.sampling.logprobs is not None else 0
            assert len(item["logprobs"]) == wanted
        if final.kind == wire.Kind.REPLY:
            total = final.body["generated_tokens"]
            while len(context) < len(asked.context) + total:
                context.append(self.next(context, asked))
            match final.body["finish"]:
                case "length":
                    assert len(made) == asked.count
                case "stop":
                    assert made[-1] in asked.sampling.stop_token_ids
            assert not set(made[:-1]) & set(asked.sampling.stop_token_ids)
            assert final.body["context"] == len(context)
            if asked.pid in self.pids:
                assert self.tokens(asked.pid) == context

    def next(self, context: list[int], asked: Asked) -> int:
        return next_token(context, VOCAB, asked.sampling, len(asked.context), self.memory)

    def end(self) -> None:
        """Everything comes to its end once readers read and nobody is stopped."""
        for pid in self.pids:
            self.world.send(table.Kill(pid, t.Signal.CONT))
        for _ in range(5000):
            self.world.now += 0.01
            self.world.flush()
            self.land()
            for id_ in self.asked:
                self.world.kernel.message(b"\0a", ROOT, wire.encode_credit(id_, 9))
            self.check()
            if not self.asked and not self.world.held:
                break
        assert not self.asked, "somebody waits for ever"
        (pool,) = self.world.kernel.devices["null"].pools
        self.accepted = sum(p.accepted for p in pool.processes)
        for pid in self.pids:
            self.world.send(table.Kill(pid, t.Signal.KILL))
            self.world.send(table.Wait(pid))
        self.world.flush()
        assert len(self.world.kernel.processes) == 0
        assert pool.memory.free == pool.memory.total
        assert all(self.ended(id_) for id_ in self.saving)
        assert not any(tier.used for tier in self.world.kernel.tiers.tiers)
        left = [path.name for path in self.world.store.folder.rglob("*") if path.suffix in (".kv", ".link")]
        assert len(left) <= 1, "files of contexts that are gone"


@pytest.mark.parametrize(
    ("memory", "draft_tokens", "rounds"), [(0, 8, 1), (1, 8, 1), (1, 0, 1), (1, 8, 4), (0, 0, 4)]
)
@given(seed=st.integers(0, 2**32))
@example(seed=209)  # a snapshot written from blocks that a failed read had not filled
@example(seed=119)  # these three: an end that came late, of what no longer was to be overtaken
@example(seed=251)
@example(seed=271)
@example(seed=14283)  # killed while its infer waited for the model to be loaded anew
@settings(max_examples=40, deadline=None)
def test_whatever_comes_between_a_step_and_its_result(
    memory: int, draft_tokens: int, rounds: int, seed: int
) -> None:
    """Contexts, forks, beams, signals, preemption, swapping, snapshots, cancels, failures and deaths in any
    order; with text that repeats itself (memory 1), so that guesses come true, and without guesses; with
    repeated steps."""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MOST_ROUNDS", rounds)
        if seed % 2 == 0:  # no step is sent ahead, so the one that runs may be overtaken
            patch.setattr(planning, "LEAD_S", float("-inf"))
            patch.setattr(newcomers, "gain", lambda *_: True)  # here no step takes any time
        dice = random.Random(seed)
        patch.setattr(swapping, "worth_saving", lambda kernel, process: dice.random() < 0.8)
        life = Life(Path(home), dice, memory, draft_tokens=draft_tokens)
        for _ in range(120):
            life.act()
        life.end()
