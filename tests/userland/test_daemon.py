"""Finding or starting the daemon. The real one is started by tests/boot."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from llmasos.syscalls import errors
from llmasos.userland import daemon


def test_a_running_daemon_is_used(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "COMMAND", ["/nonexistent"])
    with daemon.ensure_daemon(kernel.address) as client:
        assert client.hello.subject == "me"


def test_a_daemon_that_fails_shows_its_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(folder / "home"))
    monkeypatch.setattr(daemon, "COMMAND", [sys.executable, "-c", "print('no room on the disk'); exit(3)"])
    with pytest.raises(errors.DaemonUnreachable, match=r"status 3(.|\n)*no room on the disk") as caught:
        daemon.ensure_daemon(f"ipc://{folder}/none.sock")
    assert "llmasosd.log" in caught.value.hint
    with pytest.raises(errors.DaemonUnreachable) as again:
        daemon.ensure_daemon(f"ipc://{folder}/none.sock")
    assert str(again.value).count("no room") == 1, "what an earlier one wrote is not why this one ended"


def test_a_daemon_that_hangs_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(folder / "home"))
    monkeypatch.setattr(daemon, "COMMAND", [sys.executable, "-c", "import time; time.sleep(2)"])
    with pytest.raises(errors.DaemonUnreachable, match=r"did not answer in 0\.3 s"):
        daemon.ensure_daemon(f"ipc://{folder}/none.sock", timeout_s=0.3)


def test_a_daemon_that_makes_way_for_another_is_no_failure(
    kernel: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(folder / "home"))
    monkeypatch.setattr(daemon, "COMMAND", [sys.executable, "-c", "exit(75)"])
    kernel.stop()
    threading.Timer(0.5, kernel.start).start()
    with daemon.ensure_daemon(kernel.address) as client:
        assert client.hello.subject == "me"


def test_a_daemon_that_listens_elsewhere_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMASOS_HOME", str(folder / "home"))
    monkeypatch.setattr(daemon, "COMMAND", [sys.executable, "-c", "exit(75)"])
    with pytest.raises(errors.DaemonUnreachable, match="runs, but does not listen at"):
        daemon.ensure_daemon(f"ipc://{folder}/other.sock", timeout_s=0.5)
