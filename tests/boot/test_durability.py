"""kill -9 of the kernel under a real daemon: what was acknowledged is there afterwards."""

from __future__ import annotations

import time

import psutil
import pytest
from llmasos.drivers.null import next_token
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client

TINY = {"llmasos_null_blocks": 64, "max_position_embeddings": 512}


@pytest.fixture
def daemon(daemons):
    return daemons('devices=["null"]', "session_grace_s=2", tiny=TINY)


def infer(pid: int, tokens: list[int], new: int) -> table.Infer:
    return table.Infer(pid=pid, tokens=t.pack_tokens(tokens), max_tokens=new)


def context(client: Client, pid: int) -> list[int]:
    return t.unpack_tokens(client.read_file(f"/proc/{pid}/tokens"))


def kill_kernel(daemon) -> float:
    """Returns how many seconds it took until the next one listened."""
    kernel = daemon.kernel()
    kernel.kill()
    begun = time.monotonic()
    kernel.wait(5)
    with daemon.client() as client:
        client.call(table.Whoami())
    return time.monotonic() - begun


def test_processes_are_back_with_their_pids_and_histories_and_nothing_is_loaded_again(daemon):
    with daemon.client() as client, daemon.client() as other:
        mine = client.call(table.SpawnModel(model="tiny", label="mine", nice=5)).pid
        loose = client.call(table.SpawnModel(model="tiny", detached=True)).pid
        client.call(infer(mine, [1, 2, 3], 4))
        client.call(infer(loose, [9], 2))
        (child,) = client.call(table.Fork(mine)).pids
        client.call(table.Truncate(child, 2))
        client.kill(child, "STOP")
        client.call(table.SetPriority(loose, sched_class=t.SchedClass.BATCH))
        dead = other.call(table.SpawnModel(model="tiny")).pid
        other.kill(dead)
        waited = client.call(table.SpawnModel(model="tiny")).pid
        client.kill(waited)
        client.wait(waited)
        before = client.ps()
        contexts = {row.pid: context(client, row.pid) for row in before}
        (worker,) = daemon.children("null")

        assert kill_kernel(daemon) < 2

        after = client.ps()
        kept = ("pid", "parent", "owner", "name", "model", "device", "sched_class", "nice", "generated")
        for old, new in zip(before, after, strict=True):
            assert [getattr(old, name) for name in kept] == [getattr(new, name) for name in kept]
            assert context(client, new.pid) == contexts[new.pid]
        assert {row.pid: row.state for row in after}[child] == t.State.STOPPED
        assert other.wait(dead).exit_code == 143
        assert daemon.children("null") == [worker]
        log = [line.text for line in client.stream(table.Dmesg())]
        assert any("is resident already" in line for line in log)
        assert not any("loading model" in line for line in log)
        # They go on where they were, and nobody gets a pid that was somebody's.
        reply = client.call(infer(mine, [5], 1))
        assert context(client, mine)[-1] == next_token([*contexts[mine], 5])
        assert reply.context == len(contexts[mine]) + 2
        assert client.call(table.SpawnModel(model="tiny")).pid > waited
        client.kill(loose)


def test_who_does_not_come_back_loses_his_processes_after_a_while(daemon):
    with daemon.client() as watcher:
        client = daemon.client()
        pid = client.call(table.SpawnModel(model="tiny")).pid
        kernel = daemon.kernel()
        kernel.suspend()
        client.close()  # which the kernel does not live to see
        kernel.kill()
        assert pid in [row.pid for row in watcher.ps()]
        deadline = time.monotonic() + 10
        while pid in [row.pid for row in watcher.ps()]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(errors.NoSuchProcess):
            watcher.wait(pid)
    assert len(psutil.Process(daemon.process.pid).children(recursive=True)) == 2
