"""Finds the user's daemon, or starts it in the background and waits until it answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from llmasos.syscalls import address as addresses
from llmasos.syscalls import errors

from .client import Client

START_TIMEOUT_S = 15.0
COMMAND = [sys.executable, "-m", "llmasos.kernel.main"]
ANOTHER_RUNS = 75
"""llmasosd's exit code when another daemon has the lock of this home."""
_TAIL_BYTES = 2000


def is_listening(address: str) -> bool:
    """Whether something accepts connections at a local address. True for a remote one: only asking tells."""
    if not address.startswith("ipc://"):
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return False
    return True


def ensure_daemon(
    address: str | None = None, *, label: str = "", timeout_s: float = START_TIMEOUT_S
) -> Client:
    """A client of the daemon at `address`, which is started first if it is local and nothing answers.

    Raises DaemonUnreachable, with the end of the log when the daemon exits before it answers.
    """
    where = address or addresses.socket_address()
    addresses.check(where)
    if is_listening(where):
        return Client(where, label=label)
    return _started(where, label, timeout_s)


def _started(address: str, label: str, timeout_s: float) -> Client:
    log = addresses.log_file()
    before = log.stat().st_size if log.exists() else 0
    daemon = _start(address, log)
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if is_listening(address):
            return Client(address, label=label, timeout_s=max(1.0, until - time.monotonic()))
        # Two clients may start a daemon at the same moment: one makes way, and both wait for the other.
        if daemon.poll() not in (None, ANOTHER_RUNS):
            tail = log.read_bytes()[before:][-_TAIL_BYTES:].decode("utf-8", "replace").strip()
            raise errors.DaemonUnreachable(
                f"llmasosd exited with status {daemon.returncode} before it answered:\n{tail}",
                hint=f"its log is {log}",
            )
        time.sleep(0.02)
    if daemon.poll() == ANOTHER_RUNS:
        raise errors.DaemonUnreachable(
            f"the llmasosd of {addresses.home_folder()} runs, but does not listen at {address}",
            hint=f"leave the address out, or set {addresses.HOME_VARIABLE} for a daemon of its own",
        )
    raise errors.DaemonUnreachable(
        f"llmasosd was started but did not answer in {timeout_s:g} s", hint=f"its log is {log}"
    )


def _start(address: str, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, addresses.SOCKET_VARIABLE: address}
    with open(log, "ab") as output:
        return subprocess.Popen(
            COMMAND,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=environment,
        )
