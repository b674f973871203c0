"""kill -9 of each part of a real daemon."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import pytest
from llmasos.drivers.null import next_token
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

TINY = {"llmasos_null_blocks": 64, "max_position_embeddings": 512}


def infer(tokens: list[int], new: int) -> table.Infer:
    return table.Infer(model="tiny", tokens=t.pack_tokens(tokens), max_tokens=new)


def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_kernel_is_back_and_its_streams_go_on(daemons):
    daemon = daemons('devices=["null"]', tiny=TINY)
    with daemon.client() as client:
        boot_id = client.boot_id
        stream = client.stream(infer([1], 500), window=2)
        made = list(next(stream).tokens)
        daemon.kernel().kill()
        assert [row.generated > 0 for row in client.ps()] == [True]  # asked again already
        assert client.boot_id != boot_id
        made += [token for event in stream for token in event.tokens]
        assert (stream.reply.generated_tokens, stream.reply.context) == (500, 501)
        history = [1]
        for token in made:
            assert token == next_token(history)
            history.append(token)
        assert len(history) == 501
        assert client.call(infer([1, 2], 5)).generated_tokens == 5


def test_a_worker_killed_again_and_again_costs_only_time(daemons):
    daemon = daemons('devices=["null"]', "crash_limit=100", tiny={**TINY, "llmasos_null_step_seconds": 0.01})
    with daemon.client() as client, client.stream(infer([7], 200), window=1024) as stream:
        made = list(next(stream).tokens)
        for _ in range(3):
            until(lambda: bool(daemon.children("null")))
            daemon.children("null")[0].kill()
            made += next(stream).tokens
        made += [token for event in stream for token in event.tokens]
        history = [7]
        for token in made:
            assert token == next_token(history)
            history.append(token)
        assert len(made) == 200


def test_what_kills_its_driver_twice_is_refused_and_others_go_on(daemons):
    daemon = daemons('devices=["null"]', tiny={**TINY, "llmasos_null_step_seconds": 0.2})
    with daemon.client() as client:
        stream = client.stream(infer([7], 400), window=1024)
        next(stream)
        for _ in range(2):
            until(lambda: client.call(table.Lsdev()).devices[0].state == "busy" and bool(client.ps()))
            until(lambda: any(p.state == t.State.RUNNING for p in client.ps()))
            daemon.children("null")[0].kill()
            until(lambda: client.call(table.Lsdev()).devices[0].state != "busy")
        with pytest.raises(errors.DeviceFault, match="died 2 times"):
            stream.result()
        assert client.call(infer([1], 2)).generated_tokens == 2


def test_a_killed_supervisor_leaves_no_orphans(daemons):
    daemon = daemons('devices=["null"]', tiny=TINY)
    until(lambda: len(psutil.Process(daemon.process.pid).children(recursive=True)) == 2)
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    daemon.process.kill()
    _, alive = psutil.wait_procs(children, timeout=2)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE], alive
    daemon.process.wait()
    again = daemons('devices=["null"]', home=daemon.home)
    with again.client() as client:
        assert client.call(infer([1], 2)).generated_tokens == 2
