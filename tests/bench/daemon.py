"""A daemon of its own for a measurement: started in a home that holds the model, stopped afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def running(home: Path, *overrides: str) -> Iterator[psutil.Process]:
    """The supervisor's process; $LLMASOS_HOME points clients of this process at it."""
    os.environ["LLMASOS_HOME"] = str(home)
    os.environ.pop("LLMASOS_SOCKET", None)
    from llmasos.syscalls.address import socket_address
    from llmasos.userland.daemon import is_listening

    if is_listening(socket_address()):
        raise RuntimeError(f"a daemon serves {home} already: LLMASOS_HOME={home} llsh shutdown")
    words = [word for one in ['devices=["cpu"]', *overrides] for word in ("--set", one)]
    with (home / "bench.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmasos.kernel.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        while not is_listening(socket_address()):
            if process.poll() is not None:
                raise RuntimeError(f"llmasosd exited with {process.returncode}, see {home / 'bench.log'}")
            time.sleep(0.02)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def parts(supervisor: psutil.Process) -> dict[str, psutil.Process]:
    """The daemon's processes by name: supervisor, kernel, and a worker a device."""
    found = {"supervisor": supervisor}
    for child in supervisor.children():
        words = child.cmdline()
        if "--kernel" in words:
            found["kernel"] = child
        elif "--device" in words:
            found[f"worker {words[words.index('--device') + 1]}"] = child
    return found
