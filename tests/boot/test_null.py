"""The whole path of a syscall over a real daemon with the null driver."""

from __future__ import annotations

import time

import pytest
from llmasos.drivers.null import next_token
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client


@pytest.fixture(scope="module")
def daemon(daemons):
    return daemons(
        'devices=["null"]',
        tiny={"llmasos_null_blocks": 512},
        small={"llmasos_null_blocks": 8, "max_position_embeddings": 128},
    )


@pytest.fixture
def client(daemon):
    with daemon.client() as client:
        yield client


def reference(tokens: list[int], count: int) -> list[int]:
    """What a right kernel must generate after `tokens`."""
    made: list[int] = []
    for _ in range(count):
        made.append(next_token([*tokens, *made]))
    return made


def generate(client: Client, **arguments) -> tuple[list[int], table.InferReply]:
    arguments["tokens"] = t.pack_tokens(arguments["tokens"])
    with client.stream(table.Infer(**arguments)) as stream:
        tokens = [token for event in stream for token in event.tokens]
    return tokens, stream.reply


def test_one_shot_infer_streams_what_the_driver_makes_and_leaves_nothing(client):
    tokens, reply = generate(client, model="tiny", tokens=[1, 2, 3], max_tokens=20)
    assert tokens == reference([1, 2, 3], 20)
    assert (reply.finish, reply.prompt_tokens, reply.generated_tokens) == (t.Finish.LENGTH, 3, 20)
    assert client.ps() == []


def test_a_process_keeps_its_context_over_infers(client):
    pid = client.call(table.SpawnModel(model="tiny")).pid
    first, _ = generate(client, pid=pid, tokens=[5, 6], max_tokens=17)
    second, reply = generate(client, pid=pid, tokens=[7], max_tokens=5)
    assert second == reference([5, 6, *first, 7], 5)
    assert reply.context == 2 + 17 + 1 + 5
    assert t.unpack_tokens(client.read_file(f"/proc/{pid}/tokens")) == [5, 6, *first, 7, *second]
    client.kill(pid)
    assert client.wait(pid).exit_code == 143
    with pytest.raises(errors.NoSuchProcess):
        client.kill(pid)


def test_forks_diverge_and_share_memory(client):
    pid = client.call(table.SpawnModel(model="tiny")).pid
    prompt = list(range(1, 41))
    generate(client, pid=pid, tokens=prompt, max_tokens=0)
    children = client.call(table.Fork(pid, count=3)).pids
    for number, child in enumerate(children):
        tokens, _ = generate(client, pid=child, tokens=[100 + number], max_tokens=10)
        assert tokens == reference([*prompt, 100 + number], 10)
    tokens, _ = generate(client, pid=pid, tokens=[], max_tokens=10)
    assert tokens == reference(prompt, 10)
    for each in (pid, *children):
        client.kill(each, "KILL")
        assert client.wait(each).exit_code == 137


def test_truncate_goes_back_in_time(client):
    pid = client.call(table.SpawnModel(model="tiny")).pid
    made, _ = generate(client, pid=pid, tokens=[9] * 30, max_tokens=30)
    client.call(table.Truncate(pid, 35))
    again, _ = generate(client, pid=pid, tokens=[1], max_tokens=10)
    assert again == reference([9] * 30 + made[:5] + [1], 10)
    client.call(table.Truncate(pid, 33))
    more, _ = generate(client, pid=pid, tokens=[], max_tokens=10)
    assert more == reference([9] * 30 + made[:3], 10)
    client.kill(pid)
    client.wait(pid)


def test_what_can_never_fit_is_refused_with_the_reason(client):
    beams = t.Beams(num_beams=4)
    with pytest.raises(errors.NeverFits, match="KV blocks"):
        generate(client, model="small", tokens=[1], max_tokens=100, beams=beams)
    with pytest.raises(errors.ContextOverflow, match="context is 4096"):
        generate(client, model="tiny", tokens=[1], max_tokens=5000)
    with pytest.raises(errors.NoSuchModel, match="tiny2"):
        client.call(table.SpawnModel(model="tiny2"))
    assert client.ps() == []


def test_more_work_than_memory_is_preempted_and_right(client):
    """Three processes of 6 blocks each on 8 blocks."""
    prompts = [[n] * 40 for n in (1, 2, 3)]
    calls = [table.Infer(model="small", tokens=t.pack_tokens(p), max_tokens=50) for p in prompts]
    made = {0: [], 1: [], 2: []}
    for index, event in client.gather(calls):
        made[index] += event.tokens
    assert made == {n: reference(p, 50) for n, p in enumerate(prompts)}


def test_a_tenant_sees_only_its_own(daemon):
    with daemon.client("alice") as alice, daemon.client("bob") as bob, daemon.client() as root:
        pid = alice.call(table.SpawnModel(model="tiny")).pid
        assert [p.pid for p in alice.ps()] == [pid] == [p.pid for p in root.ps()]
        assert bob.ps() == []
        for call in (
            table.Kill(pid),
            table.Fork(pid),
            table.StatProcess(pid),
            table.Read(f"/proc/{pid}/tokens"),
        ):
            with pytest.raises(errors.NoSuchProcess):
                bob.call(call)
        with pytest.raises(errors.PermissionDenied):
            bob.call(table.Shutdown())
        assert alice.call(table.Whoami()).subject.endswith("/alice")


def test_a_client_that_vanishes_frees_its_processes(daemon, client):
    other = daemon.client()
    other.call(table.SpawnModel(model="tiny"))
    stream = other.stream(table.Infer(model="tiny", tokens=t.pack_tokens([1]), max_tokens=4000))
    next(stream)
    assert len(client.ps()) == 2
    other.close()
    deadline = time.monotonic() + 2
    while client.ps() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.ps() == []


def test_stop_and_cont(client):
    pid = client.call(table.SpawnModel(model="tiny")).pid
    with client.stream(table.Infer(pid=pid, tokens=t.pack_tokens([3]), max_tokens=300), window=4) as stream:
        made = next(stream).tokens
        client.kill(pid, "STOP")
        assert client.call(table.StatProcess(pid)).state == t.State.STOPPED
        client.kill(pid, "CONT")
        made += [token for event in stream for token in event.tokens]
    assert made == reference([3], 300)
    client.kill(pid)
    client.wait(pid)


def test_a_slow_reader_stalls_only_itself(client):
    slow = client.stream(table.Infer(model="tiny", tokens=t.pack_tokens([1]), max_tokens=200), window=2)
    made = next(slow).tokens
    time.sleep(0.2)
    (row,) = client.ps()
    assert (row.state, row.waiting_for) == (t.State.WAITING, "reader")
    tokens, _ = generate(client, model="tiny", tokens=[2], max_tokens=50)
    assert tokens == reference([2], 50)
    made += [token for event in slow for token in event.tokens]
    assert made == reference([1], 200)
    assert slow.reply.generated_tokens == 200


def test_kill_ends_a_stream_with_its_reason(client):
    pid = client.call(table.SpawnModel(model="tiny")).pid
    with client.stream(table.Infer(pid=pid, tokens=t.pack_tokens([3]), max_tokens=4000), window=8) as stream:
        next(stream)
        client.kill(pid)
        assert stream.result().finish == t.Finish.KILLED


def test_killed_drivers_are_invisible_but_for_a_pause(daemon, client):
    with client.stream(table.Infer(model="tiny", tokens=t.pack_tokens([4] * 20), max_tokens=1000)) as stream:
        made = list(next(stream).tokens)
        daemon.children("null")[0].kill()
        made += [token for event in stream for token in event.tokens]
    assert made == reference([4] * 20, 1000)
    assert client.call(table.Lsdev()).devices[0].restarts >= 1


def test_beams_run_and_give_their_memory_back(client):
    free = client.call(table.Df()).pools[0].blocks_free
    beams = t.Beams(num_beams=4, num_return_sequences=2)
    _, reply = generate(client, model="tiny", tokens=[1] * 20, max_tokens=30, beams=beams)
    assert len(reply.sequences) == 2
    assert reply.sequences[0].score >= reply.sequences[1].score
    assert client.ps() == []
    assert client.call(table.Df()).pools[0].blocks_free == free


def test_dmesg_tells_what_happened(client):
    lines = list(client.stream(table.Dmesg()))
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert any("attached" in line.text for line in lines)


def test_wait_times_out_and_hears_of_the_end(client):
    pid = client.call(table.SpawnModel(model="tiny")).pid
    with pytest.raises(errors.TimedOut):
        client.wait(pid, 0.05)
    generate(client, pid=pid, tokens=[1], max_tokens=3, exit=True)
    assert client.wait(pid).exit_code == 0


def test_the_kernel_is_small_and_quick(daemon):
    assert daemon.ready_s < 1.0
    assert daemon.kernel().memory_info().rss < 80e6
    assert not any("torch" in m.path for m in daemon.kernel().memory_maps())
