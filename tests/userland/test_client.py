"""The sync client against a fake kernel: streams, cancelling, breaks and restarts."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.daemon import ensure_daemon


@pytest.fixture
def client(kernel: Any) -> Iterator[Client]:
    with Client(kernel.address, timeout_s=3) as made:
        yield made


def infer(n: int, model: str | None = "tiny:latest", pid: int | None = None) -> table.Infer:
    return table.Infer(pid, model, t.pack_tokens(range(n)))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it did not happen within 5 seconds"
        time.sleep(0.005)


def test_nobody_there_says_how_to_start_it(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(errors.DaemonUnreachable, match="llmasosd") as caught:
        Client(f"ipc://{folder}/none.sock")
    assert caught.value.hint == "start it with: llmasosd"
    assert time.monotonic() - started < 2  # without a socket there is nothing to wait for


@pytest.mark.parametrize(
    "address",
    ["run/kernel.sock", "http://localhost:8000", "tcp://localhost", "ipc://", f"ipc://{'x' * 108}", 5],
)
def test_what_is_no_address_is_refused(address: Any) -> None:
    before = threading.active_count()
    for connect in (Client, ensure_daemon):
        with pytest.raises(errors.InvalidArgument, match="ipc://PATH"):
            connect(address)
    assert threading.active_count() <= before


def test_a_kernel_that_does_not_answer_is_given_up(kernel: Any) -> None:
    kernel.silent = {"hello"}
    with pytest.raises(errors.DaemonUnreachable):
        Client(kernel.address, timeout_s=0.3)


def test_ps_takes_all_pages(client: Client) -> None:
    pids = [client.call(table.SpawnModel("tiny:latest")).pid for _ in range(8)]
    assert [row.pid for row in client.ps()] == pids


def test_errors_are_raised_as_in_the_kernel(client: Client) -> None:
    with pytest.raises(errors.NoSuchProcess) as caught:
        client.kill(99, "sigkill")
    assert caught.value.details == {"pid": 99}
    with pytest.raises(errors.InvalidArgument, match="TERM"):
        client.kill(99, "HUP")


def test_a_file_is_read_whole(client: Client, kernel: Any) -> None:
    data = bytes(range(256)) * 20
    kernel.models["tiny:latest"]["data"] = data
    assert client.read_file("/models/tiny:latest/data") == data
    kernel.models["tiny:latest"]["empty"] = b""
    assert client.read_file("/models/tiny:latest/empty") == b""


def test_a_stream_yields_every_item_then_its_reply(client: Client) -> None:
    with client.stream(infer(300), window=8) as stream:
        with pytest.raises(RuntimeError, match="not ended"):
            _ = stream.reply
        tokens = [token for event in stream for token in event.tokens]
    assert tokens == list(range(300))[::-1]
    assert stream.reply.finish is t.Finish.LENGTH
    assert list(stream) == []


def test_a_reader_that_stops_stalls_only_itself(client: Client, kernel: Any) -> None:
    stalled = client.stream(infer(300), window=8)
    next(stalled)
    assert len(list(client.stream(infer(300), window=8))) == 300
    (left,) = kernel.streams.values()
    assert left.seq <= 8 + 4
    assert len(list(stalled)) == 299


def test_closing_early_cancels_and_is_confirmed(client: Client, kernel: Any) -> None:
    with client.stream(infer(300), window=4) as stream:
        next(stream)
    assert stream.reply.finish is t.Finish.CANCELLED
    assert kernel.streams == {}


def test_a_stream_is_read_though_nobody_holds_its_client(kernel: Any) -> None:
    before = threading.active_count()
    streams = Client(kernel.address).stream(infer(300), window=8), Client(kernel.address).gather([infer(300)])
    assert [len(list(stream)) for stream in streams] == [300, 300]
    del streams
    until(lambda: threading.active_count() <= before)


def test_a_dropped_stream_is_cancelled(client: Client, kernel: Any) -> None:
    next(client.stream(infer(300), window=4))
    until(lambda: not kernel.streams)


def test_gather_reads_streams_together(client: Client, kernel: Any) -> None:
    kernel.script = lambda tokens, call: [len(tokens)] * 100
    streams = client.gather([infer(n) for n in (3, 5, 7)], window=4)
    counts = {0: 0, 1: 0, 2: 0}
    for index, event in streams:
        assert event.tokens == [(3, 5, 7)[index]]
        counts[index] += 1
    assert counts == {0: 100, 1: 100, 2: 100}
    assert all(reply is not None and reply.finish is t.Finish.LENGTH for reply in streams.replies)


def test_gather_raises_the_first_error_and_cancels_the_rest(client: Client, kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}
    with pytest.raises(errors.NoSuchProcess):
        list(client.gather([infer(3), infer(3, None, pid=99)]))
    assert kernel.streams == {}


def test_a_call_can_time_out(client: Client, kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}
    with pytest.raises(errors.TimedOut):
        client.call(infer(2), timeout_s=0.2)
    assert kernel.streams == {}


def test_many_threads_share_a_client(client: Client) -> None:
    results: dict[int, list[int]] = {}

    def work(n: int) -> None:
        results[n] = [token for event in client.stream(infer(n), window=8) for token in event.tokens]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(20, 36)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: list(range(n))[::-1] for n in range(20, 36)}


def test_a_stream_that_another_thread_reads_can_be_closed(client: Client, kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}
    stream = client.stream(infer(3))
    reader = threading.Thread(target=lambda: list(stream), daemon=True)
    closer = threading.Thread(target=stream.close, daemon=True)
    others = [threading.Thread(target=lambda: list(stream), daemon=True) for _ in range(3)]
    threads = [reader, *others, closer]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert stream.reply.finish is t.Finish.CANCELLED


def test_a_fork_is_told_to_connect_itself(client: Client, kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}
    stream = client.stream(infer(3))
    next(stream)
    forks = multiprocessing.get_context("fork")
    told: Any = forks.SimpleQueue()

    def use() -> None:
        for read in (client.ps, lambda: list(stream)):
            try:
                read()
            except errors.ConnectionLost as lost:
                told.put(str(lost))
        stream.close()
        client.close()

    child = forks.Process(target=use)
    child.start()
    child.join(5)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert f"belongs to process {os.getpid()}" in told.get()
    assert f"belongs to process {os.getpid()}" in told.get()
    assert kernel.cancelled == []
    assert len(client.ps()) == 1


def test_a_client_is_not_pickled(client: Client) -> None:
    with pytest.raises(TypeError, match="make a Client, or an LLM"):
        pickle.dumps(client)


def test_a_restarted_kernel_is_noticed_and_found_again(client: Client, kernel: Any) -> None:
    assert client.boot_id == "boot1"
    kernel.restart()
    assert client.ps() == []
    assert client.boot_id == "boot2"


def test_when_the_kernel_dies_streams_and_calls_go_on(client: Client, kernel: Any) -> None:
    kernel.silent = {"whoami"}
    stream = client.stream(infer(100), window=2)
    tokens = list(next(stream).tokens)
    answers: list[object] = []
    reader = threading.Thread(target=lambda: answers.append(client.call(table.Whoami())))
    reader.start()
    until(lambda: "whoami" in kernel.names())
    kernel.silent = set()
    kernel.restart()
    tokens += [token for event in stream for token in event.tokens]
    assert tokens == list(range(100))[::-1]
    assert stream.reply.generated_tokens == 100
    reader.join(5)
    assert isinstance(answers[0], table.WhoamiReply)


def test_noise_is_the_same_before_and_after(client: Client, kernel: Any) -> None:
    stream = client.stream(table.Infer(None, "tiny:latest", b"abcd" * 9, sampling=t.Sampling(1.0)), window=2)
    next(stream)
    kernel.restart()
    stream.result()
    first, again = [call for call in kernel.calls if isinstance(call, table.Infer)]
    assert first.sampling.seed == again.sampling.seed is not None


def test_who_only_waits_returns_too(client: Client, kernel: Any) -> None:
    kernel.restart()
    until(lambda: kernel.names().count("hello") == 2)
    hellos = [call for call in kernel.calls if isinstance(call, table.Hello)]
    assert hellos[0].token == hellos[1].token != ""


def test_a_kernel_that_stays_away_fails_what_waits(client: Client, kernel: Any) -> None:
    kernel.stop()
    client.connection.timeout_s = 0.3
    with pytest.raises(errors.DaemonUnreachable):
        client.call(table.Whoami())
    kernel.start()
    assert client.call(table.Whoami()).subject == "me"


def test_a_mangled_stream_is_never_shortened_in_silence(client: Client, kernel: Any) -> None:
    kernel.mangle = lambda seq: seq + (seq >= 3)
    with pytest.raises(errors.ConnectionLost, match="stream item 4 instead of 3"):
        list(client.stream(infer(10)))
    kernel.mangle = lambda seq: seq
    assert len(list(client.stream(infer(10)))) == 10


def test_a_closed_client_says_so(kernel: Any) -> None:
    kernel.endless = {"tiny:latest"}
    client = Client(kernel.address)
    stream = client.stream(infer(1))
    next(stream)
    client.close()
    client.close()
    with pytest.raises(errors.ConnectionLost):
        list(stream)
    with pytest.raises(errors.ConnectionLost, match="closed"):
        client.ps()


def test_an_oversized_call_is_refused_here(client: Client) -> None:
    with pytest.raises(errors.InvalidArgument, match="too big"):
        client.call(table.Infer(1, tokens=b"x" * 2**21))


def test_clients_leave_no_threads_or_descriptors(kernel: Any) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    Client(kernel.address).close()
    time.sleep(0.05)
    before, threads = descriptors(), threading.active_count()
    for _ in range(5):
        Client(kernel.address).close()
    time.sleep(0.1)  # the fake kernel's side closes its ends
    assert descriptors() <= before
    assert threading.active_count() == threads
