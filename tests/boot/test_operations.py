"""The daemon as an operator sees it: signals, exit codes, --check, systemd, what a death leaves behind."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from llmasos.kernel import config, main
from llmasos.kernel.journal import Journal
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

TINY = {"llmasos_null_blocks": 64, "max_position_embeddings": 512}
SLOW = {**TINY, "llmasos_null_step_seconds": 0.05}


def llmasosd(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LLMASOS_HOME": str(home)}
    environment.pop("LLMASOS_SOCKET", None)
    command = [sys.executable, "-m", "llmasos.kernel.main", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def until(what: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def log(client) -> str:
    with client.stream(table.Dmesg()) as lines:
        return "\n".join(line.text for line in lines)


def infer(new: int) -> table.Infer:
    return table.Infer(model="slow", tokens=t.pack_tokens([1]), max_tokens=new)


# Signals and exit codes


def test_sigterm_lets_answers_end_and_exits_with_0(daemons):
    daemon = daemons('devices=["null"]', slow=SLOW)
    with daemon.client() as client:
        stream = client.stream(infer(30), window=1024)
        next(stream)
        daemon.process.send_signal(signal.SIGTERM)
        assert stream.result().generated_tokens == 30
    assert daemon.process.wait(10) == 0


def test_a_second_signal_does_not_wait_and_is_no_success(daemons):
    daemon = daemons('devices=["null"]', slow=SLOW)
    with daemon.client() as client:
        stream = client.stream(infer(400), window=1024)
        next(stream)
        daemon.process.send_signal(signal.SIGTERM)
        until(lambda: "shutting down" in log(client))
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(10) == 70


def test_an_unexpected_death_of_the_kernel_is_never_the_end(daemons):
    daemon = daemons('devices=["null"]', slow=SLOW)
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT):
        before = daemon.kernel().pid
        os.kill(before, number)
        until(lambda before=before: any(c.pid != before for c in daemon.children("--kernel")))
        assert daemon.process.poll() is None


def test_it_stops_also_between_two_kernels(daemons):
    daemon = daemons('devices=["null"]', slow=SLOW)
    for _ in range(3):  # the pause grows
        before = daemon.kernel().pid
        os.kill(before, signal.SIGKILL)
        until(lambda before=before: any(c.pid != before for c in daemon.children("--kernel")))
    daemon.kernel().kill()
    time.sleep(0.1)
    daemon.process.terminate()
    assert daemon.process.wait(5) == 70


def test_a_signal_that_came_while_the_kernel_started_does_not_kill_it(daemons):
    """It is passed on at the moment of readiness."""
    daemon = daemons('devices=["null"]', slow=SLOW)
    for _ in range(6):
        before = daemon.kernel().pid
        os.kill(before, signal.SIGKILL)
        until(lambda before=before: any(c.pid != before for c in daemon.children("--kernel")))
        daemon.process.send_signal(signal.SIGHUP)
        with daemon.client() as client:
            until(lambda client=client: "configuration reloaded" in log(client))
    assert b"kernel ended with -1" not in (daemon.home / "log").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--set", "kv_fraction=2"], 2, "see --set kv_fraction and"),
        (["--set", "nonsense=1"], 2, "see --set nonsense and"),
        (["--nonsense"], 2, "usage"),
        (["--fsck"], 0, ""),
        (["--version"], 0, ""),
    ],
)
def test_exit_codes(tmp_path, words, code, says):
    done = llmasosd(tmp_path, *words)
    assert done.returncode == code
    assert says in done.stderr


def test_fsck_tells_of_garbage_which_is_no_problem(tmp_path):
    blobs = tmp_path / "modelfs" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"sha256-{'0' * 64}").write_bytes(b"nobody's")
    done = llmasosd(tmp_path, "--fsck")
    assert done.returncode == 0
    assert "no model needs it" in done.stdout
    assert "is clean" in done.stdout


def test_fsck_of_a_home_that_is_not_there_is_1_and_makes_none(tmp_path):
    done = llmasosd(tmp_path / "typo", "--fsck")
    assert done.returncode == 1
    assert "there is no folder" in done.stderr
    assert not (tmp_path / "typo").exists()


def test_fsck_of_a_backup_that_cannot_be_written_to(tmp_path, monkeypatch):
    """As on a disk that is mounted read-only, which root could not have otherwise."""
    store = ModelFS(tmp_path)
    store.gc(set())
    monkeypatch.setattr(os, "access", lambda *_: False)
    opened = Path.open

    def open_(self, mode="r", *rest, **named):
        if "a" in mode:
            raise OSError(30, "Read-only file system", str(self))
        return opened(self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", open_)
    assert store.garbage() == []


@pytest.mark.parametrize(
    "setting", ['listen="tcp://192.0.2.1:5570"', 'listen="tcp://127.0.0.1:{port}"', 'socket_group="nobodys"']
)
def test_an_address_that_cannot_be_had_is_told_once_and_is_1(tmp_path, setting):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--set", setting.format(port=taken.getsockname()[1]), "--set", 'devices=["null"]']
        done = llmasosd(tmp_path, *words)
        assert done.returncode == 1
        assert done.stderr.count("cannot listen: ") == 1
        assert "Traceback" not in done.stderr
        done = llmasosd(tmp_path, "--check", *words)
        assert done.returncode == 1
        assert done.stdout.count("\nbad") == 1


@pytest.mark.parametrize("where", ["ipc://", "ipc://@llmasos"])
def test_a_socket_without_a_file_is_refused_as_everybody_could_connect(tmp_path, monkeypatch, where):
    monkeypatch.setattr("llmasos.syscalls.address.socket_address", lambda: where)
    with pytest.raises(errors.InvalidArgument, match="names no file"):
        main._endpoint()


def test_a_home_that_cannot_be_made_is_1(tmp_path):
    (tmp_path / "file").write_text("")
    done = llmasosd(tmp_path / "file" / "home")
    assert done.returncode == 1
    assert "llmasosd:" in done.stderr


# Configuration


def test_sighup_takes_a_new_configuration_whole_or_not_at_all(daemons, tmp_path):
    daemon = daemons(slow=SLOW, home=_home(tmp_path, 'devices = ["null"]\n'))
    file = daemon.home / "config.toml"

    def reload(text: str | None, says: str) -> None:
        if text is not None:
            file.write_text(text)
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: says in log(client))

    with daemon.client() as client:
        reload('devices = ["null"]\nmax_processes = 1\n', "configuration reloaded: max_processes = 1")
        first = client.call(table.SpawnModel("slow"))
        with pytest.raises(Exception, match="processes"):
            client.call(table.SpawnModel("slow"))
        reload('devices = ["null"]\nmax_processes = 9\nlog_lines = 7\n', "log_lines cannot change")
        reload(
            'devices = ["null"]\nmax_processes = "many"\n', "configuration not reloaded, the old one stays: c"
        )
        for text in ('devices = ["null"\n', "\xff", f"quotas = {'[' * 20_000}", "log_lines = 1e9"):
            file.write_bytes(text.encode("latin-1"))
            reload(None, "configuration not reloaded, the old one stays: configuration: ")
        file.unlink()
        file.mkdir()
        reload(None, "is no file")
        file.rmdir()
        with pytest.raises(Exception, match="processes"):
            client.call(table.SpawnModel("slow"))
        reload('devices = ["null"]\n', "max_processes = 4096")
        client.call(table.SpawnModel("slow"))
        assert first.pid in {row.pid for row in client.ps()}, "nothing was restarted"


@pytest.mark.parametrize("text", ["nonsense", 'devices = ["null:1"]\n', "max_processes = 9\n"])
def test_a_kernel_that_is_started_again_has_the_configuration_that_counted(daemons, tmp_path, text):
    """Whatever the file holds by then: nobody asked for that to be read."""
    daemon = daemons(slow=SLOW, home=_home(tmp_path, 'devices = ["null"]\n'))
    file = daemon.home / "config.toml"
    with daemon.client() as client:
        file.write_text('devices = ["null"]\nmax_processes = 1\n')
        daemon.process.send_signal(signal.SIGHUP)
        until(lambda: "max_processes = 1" in log(client))
        client.call(table.SpawnModel("slow"))
        file.write_text(text)
        before = daemon.kernel().pid
        os.kill(before, signal.SIGKILL)
        until(lambda: any(child.pid != before for child in daemon.children("--kernel")))
        assert [device.name for device in client.call(table.Lsdev()).devices] == ["null"]
        with pytest.raises(Exception, match="processes"):
            client.call(table.SpawnModel("slow"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"step_ms = 50.0 # \xff", "is no text in TOML"),
        (b"quotas = " + b"[" * 20_000, "is no text in TOML"),
        (b'devices = ["abacus"]', "there is no kind 'abacus'"),
        (b'devices = ["cpu", "cpu"]', "names cpu twice"),
        (b'devices = ["cpu*1"]', "a group has 2 to 64 devices, not cpu*1"),
        (b'listen = "tcp://127.0.0.1:99999"', "a port from 1 to 65535"),
        (b'listen = "tcp://*:0"', "a port from 1 to 65535"),
        (b"flight_steps = 9223372036854775808", "`flight_steps` has a number that does not fit"),
        (b"[quotas.alice]\ndisk_bytes = 9223372036854775808", "`quotas` has a number that does not fit"),
        (b"[quotas.'alice/']\nqueue = 1", "quotas"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_2_and_a_sentence(tmp_path, text, says):
    (tmp_path / "config.toml").write_bytes(text)
    done = llmasosd(tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert llmasosd(tmp_path, "--check").returncode == 1


def test_what_is_live_is_a_setting():
    assert set(config.Config.__struct_fields__) >= config.LIVE
    assert "devices" not in config.LIVE


def _home(tmp_path: Path, text: str) -> Path:
    (tmp_path / "config.toml").write_text(text)
    return tmp_path


# --check


def test_check_says_what_is_good(tmp_path):
    done = llmasosd(tmp_path / "new", "--check", "--set", 'devices=["cpu"]')
    assert done.returncode == 0, done.stdout
    assert "bad" not in done.stdout
    assert "home: " in done.stdout
    assert "(will be made)" in done.stdout
    assert "another daemon: none" in done.stdout
    assert not (tmp_path / "new").exists(), "it changes nothing"


def test_check_says_what_is_wrong_and_what_to_do(tmp_path):
    done = llmasosd(tmp_path, "--check", "--set", 'devices=["cpu", "cuda:77"]')
    assert done.returncode == 1
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad")]
    assert len(bad) == 1
    assert "/dev/nvidia77; load its driver or change `devices`" in bad[0]
    (tmp_path / "config.toml").write_text("step_ms = 'fast'")
    done = llmasosd(tmp_path, "--check")
    assert done.returncode == 1
    assert "step_ms" in done.stdout
    assert str(tmp_path / "config.toml") in done.stdout
    (tmp_path / "blocked").write_text("")
    done = llmasosd(tmp_path / "blocked" / "home", "--check")
    assert done.returncode == 1
    assert "cannot be written to" in done.stdout


def test_check_sees_a_journal_that_a_start_would_refuse(tmp_path):
    journal = Journal(tmp_path / "journal", 7)
    journal.commit({"process 1": b""})
    journal.close()
    before = {file: file.read_bytes() for file in (tmp_path / "journal").iterdir()}
    done = llmasosd(tmp_path, "--check", "--set", 'devices=["null"]')
    assert done.returncode == 1
    assert "bad  journal: the journal in" in done.stdout
    assert {file: file.read_bytes() for file in (tmp_path / "journal").iterdir()} == before
    assert llmasosd(tmp_path, "--set", 'devices=["null"]').returncode == 65


def test_check_sees_a_running_daemon(daemons):
    daemon = daemons('devices=["null"]', slow=SLOW)
    done = llmasosd(daemon.home, "--check", "--set", 'devices=["null"]')
    assert done.returncode == 0
    assert "another daemon: runs" in done.stdout


# systemd


def waiting(heard: socket.socket) -> list[bytes]:
    """What was sent and not yet read."""
    found = []
    while select.select([heard], [], [], 0)[0]:
        found.append(heard.recv(64))
    return found


def test_systemd_hears_of_readiness_life_and_stopping(daemons, monkeypatch, tmp_path):
    heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    heard.bind(str(tmp_path / "notify"))
    heard.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    daemon = daemons('devices=["null"]', slow=SLOW)
    monkeypatch.undo()
    states = {heard.recv(64).decode() for _ in range(4)}
    assert states == {"READY=1", "WATCHDOG=1"}
    os.kill(daemon.kernel().pid, signal.SIGSTOP)  # its loop does not turn
    waiting(heard)
    time.sleep(0.5)
    assert waiting(heard) == []
    os.kill(daemon.kernel().pid, signal.SIGCONT)
    assert heard.recv(64) == b"WATCHDOG=1"
    assert daemon.stop() == 0
    assert b"STOPPING=1" in waiting(heard)


def test_the_unit_is_one_that_systemd_accepts(tmp_path):
    done = llmasosd(tmp_path, "--systemd-unit")
    assert done.returncode == 0
    for line in ("Type=notify", "WatchdogSec=60", "ExecReload=/bin/kill -HUP $MAINPID"):
        assert line in done.stdout.splitlines()
    unit = tmp_path / "llmasosd.service"
    unit.write_text(done.stdout)
    try:
        verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no systemd-analyze here")
    complaints = [line for line in verified.stderr.splitlines() if "llmasosd" in line]
    assert not complaints, verified.stderr


# What a death leaves behind


def test_a_dead_worker_leaves_the_last_decisions(daemons):
    daemon = daemons('devices=["null"]', slow=SLOW)
    folder = daemon.home / "state" / "flight"
    with daemon.client() as client, client.stream(infer(40), window=1024) as stream:
        next(stream)
        daemon.children("null")[0].kill()
        stream.result()
        until(lambda: list(folder.glob("*.jsonl")))
        assert str(folder) in log(client)
        (dump,) = folder.glob("*.jsonl")
        decisions = [json.loads(line) for line in dump.read_text().splitlines()]
        assert decisions[-1]["outcome"] == "lost"
        assert decisions[0]["outcome"] == "done"
