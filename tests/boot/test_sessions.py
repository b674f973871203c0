"""Snapshots on a real daemon: they survive a reboot, and two devices of one kind share them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llmasos.drivers.null import next_token
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client

from .conftest import add_null_model

PROMPT = list(range(1, 101))


def generate(client: Client, pid: int, tokens: list[int], count: int) -> list[int]:
    with client.stream(table.Infer(pid, tokens=t.pack_tokens(tokens), max_tokens=count)) as stream:
        return [token for event in stream for token in event.tokens]


def right(tokens: list[int], count: int) -> list[int]:
    made: list[int] = []
    for _ in range(count):
        made.append(next_token([*tokens, *made]))
    return made


def test_a_process_is_saved_moved_and_comes_back_after_a_reboot(daemons: Callable) -> None:
    home = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))
    try:
        add_null_model(home, "tiny")
        first = daemons('devices=["null", "null:1"]', home=home)
        with first.client() as client:
            pid = client.call(table.SpawnModel("tiny", device="null")).pid
            made = generate(client, pid, PROMPT, 10)
            assert client.call(table.Snapshot(pid, "kept")).details["kv_tokens"] == 109
            moved = client.call(table.Migrate(pid, "null:1"))
            assert (moved.device, moved.kept, moved.recomputed) == ("null:1", 109, "")
            assert generate(client, pid, [5], 4) == right([*PROMPT, *made, 5], 4)
            stream = client.stream(table.Infer(pid, tokens=t.pack_tokens([6]), max_tokens=3000))
            held = list(next(stream).tokens)
            assert client.call(table.Migrate(pid, "null")).device == "null"
            held += [token for event in stream for token in event.tokens]
            assert len(held) == 3000
            context = [*PROMPT, *made, 5, *right([*PROMPT, *made, 5], 4), 6]
            assert held[:40] == right(context, 40)
            assert held[-1] == next_token([*context, *held[:-1]])
        assert first.stop() == 0
        second = daemons('devices=["null", "null:1"]', home=home)
        with second.client() as client:
            assert [entry.path for entry in client.ls("/sessions")] == ["/sessions/kept"]
            for device in ("null", "null:1"):
                reply = client.call(table.Restore("kept", device=device))
                assert (reply.kept, reply.recomputed, reply.device) == (109, "", device)
                assert generate(client, reply.pid, [7], 6) == right([*PROMPT, *made, 7], 6)
            client.call(table.Discard("kept"))
            assert client.ls("/sessions") == []
    finally:
        shutil.rmtree(home, ignore_errors=True)
