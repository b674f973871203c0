"""A few kills of a real daemon's parts while a client works: the short form of `make faults`."""

from __future__ import annotations

import random
import threading

from llmasos.drivers.null import next_token
from llmasos.syscalls import table
from llmasos.syscalls import types as t

TINY = {"llmasos_null_blocks": 128, "max_position_embeddings": 1024, "llmasos_null_step_seconds": 0.002}


def test_kills_at_random_moments_cost_time_and_nothing_else(daemons):
    daemon = daemons('devices=["null"]', "crash_limit=1000", tiny=TINY)
    done, dice, problems = threading.Event(), random.Random(3), []

    def work(number: int) -> None:
        try:
            with daemon.client() as client:
                client.connection.timeout_s = 30
                pid = client.call(table.SpawnModel(model="tiny")).pid
                context: list[int] = []
                while not done.is_set():
                    given = [number, len(context) % 50]
                    if len(context) > 600:
                        client.call(table.Truncate(pid, 100))
                        del context[100:]
                    call = table.Infer(pid=pid, tokens=t.pack_tokens(given), max_tokens=60)
                    with client.stream(call, window=8) as stream:
                        made = [token for event in stream for token in event.tokens]
                    context += given
                    for token in made:
                        assert token == next_token(context)
                        context.append(token)
                    assert (len(made), stream.reply.context) == (60, len(context))
                    (child,) = client.call(table.Fork(pid)).pids
                    assert t.unpack_tokens(client.read_file(f"/proc/{child}/tokens")) == context
                    client.kill(child)
                    assert client.wait(child).exit_code == 143
                assert [row.pid for row in client.ps() if row.parent == pid] == []
        except BaseException as problem:
            problems.append(problem)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for what in ("kernel", "null", "kernel", "both", "kernel"):
        done.wait(dice.uniform(0.3, 1.2))
        for name in ("--kernel", "null"):
            if what == "both" or what in name:
                for victim in daemon.children(name):
                    victim.kill()
    done.wait(1)
    done.set()
    for thread in threads:
        thread.join(60)
    assert not problems
    with daemon.client() as client:
        assert client.ps() == []
