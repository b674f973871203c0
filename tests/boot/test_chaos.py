"""Random life on a real daemon: nothing is lost, nothing is left over, every answer is right."""

from __future__ import annotations

import random

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmasos.drivers.null import next_token
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client

ROUNDS, STEPS = 10, 100


@pytest.fixture(scope="module")
def daemon(daemons):
    """Few blocks, so that preemption is part of life."""
    return daemons('devices=["null"]', tiny={"llmasos_null_blocks": 64, "max_position_embeddings": 512})


class Life:
    """A model of what the daemon must hold: the tokens of every process."""

    def __init__(self, client: Client, dice: random.Random) -> None:
        self.client = client
        self.dice = dice
        self.contexts: dict[int, list[int]] = {}

    def any(self) -> int | None:
        return self.dice.choice(sorted(self.contexts)) if self.contexts else None

    def spawn(self) -> None:
        if len(self.contexts) < 24:
            self.contexts[self.client.call(table.SpawnModel(model="tiny")).pid] = []

    def infer(self) -> None:
        """Several at once, on different processes."""
        pids = self.dice.sample(sorted(self.contexts), min(len(self.contexts), self.dice.randint(1, 4)))
        inputs = [[self.dice.randrange(3) for _ in range(self.dice.randint(1, 40))] for _ in pids]
        calls = [
            table.Infer(pid=pid, tokens=t.pack_tokens(tokens), max_tokens=self.dice.randint(0, 20))
            for pid, tokens in zip(pids, inputs, strict=True)
        ]
        if any(len(self.contexts[p]) > 400 for p in pids):
            return
        made: dict[int, list[int]] = {n: [] for n in range(len(pids))}
        for n, event in self.client.gather(calls):
            made[n] += event.tokens
        for n, pid in enumerate(pids):
            self.contexts[pid] += inputs[n]
            for token in made[n]:
                assert token == next_token(self.contexts[pid])
                self.contexts[pid].append(token)

    def fork(self) -> None:
        pid = self.any()
        if pid is not None and len(self.contexts) < 24:
            for child in self.client.call(table.Fork(pid, count=self.dice.randint(1, 3))).pids:
                self.contexts[child] = list(self.contexts[pid])

    def truncate(self) -> None:
        pid = self.any()
        if pid is not None:
            length = self.dice.randint(0, len(self.contexts[pid]))
            self.client.call(table.Truncate(pid, length))
            del self.contexts[pid][length:]

    def kill(self) -> None:
        pid = self.any()
        if pid is not None:
            self.client.kill(pid, self.dice.choice(["TERM", "KILL"]))
            if self.dice.random() < 0.8:
                self.client.wait(pid)
            del self.contexts[pid]

    def abandon(self) -> None:
        """A stream that is left in the middle of its answer."""
        call = table.Infer(model="tiny", tokens=t.pack_tokens([1, 2]), max_tokens=400)
        with self.client.stream(call, window=self.dice.randint(1, 8)) as stream:
            next(stream)

    def step(self) -> None:
        self.dice.choice(
            [self.spawn, self.infer, self.infer, self.fork, self.kill, self.truncate, self.abandon]
        )()


def footprint(daemon, client: Client) -> dict[str, int]:
    """What a leak would show in."""
    kernel, (worker,) = daemon.kernel(), daemon.children("null")
    pool = client.call(table.Df()).pools[0]
    return {
        "free blocks": pool.blocks_free,
        "processes": len(client.ps()),
        "model processes": pool.processes,
        "kernel fds": kernel.num_fds(),
        "worker fds": worker.num_fds(),
        "children": len(psutil.Process(daemon.process.pid).children(recursive=True)),
        "blobs": client.call(table.Df()).blobs,
    }


@given(seed=st.integers(0, 2**32))
@settings(max_examples=ROUNDS, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_thousand_random_acts_leave_no_trace(daemon, seed):
    with daemon.client() as watcher:
        watcher.call(table.Infer(model="tiny", tokens=t.pack_tokens([1]), max_tokens=1))
        before = footprint(daemon, watcher)
        with daemon.client() as client:
            life = Life(client, random.Random(seed))
            for _ in range(STEPS):
                life.step()
            for pid, tokens in life.contexts.items():
                assert t.unpack_tokens(client.read_file(f"/proc/{pid}/tokens")) == tokens
        deadline = 100
        while footprint(daemon, watcher) != before and deadline:
            deadline -= 1
            watcher.call(table.Whoami())
        assert footprint(daemon, watcher) == before


def test_clients_that_vanish_mid_answer_leave_no_trace(daemon):
    with daemon.client() as watcher:
        watcher.call(table.Infer(model="tiny", tokens=t.pack_tokens([1]), max_tokens=1))
        before = footprint(daemon, watcher)
        for _ in range(20):
            client = daemon.client()
            streams = [
                client.stream(table.Infer(model="tiny", tokens=t.pack_tokens([n]), max_tokens=400))
                for n in range(3)
            ]
            next(streams[0])
            client.close()
        for _ in range(200):
            if footprint(daemon, watcher) == before:
                break
            watcher.call(table.Whoami())
        assert footprint(daemon, watcher) == before
        with pytest.raises(errors.LLMasOSError):
            streams[0].result()
