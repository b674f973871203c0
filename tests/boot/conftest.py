"""A real daemon, driven only through syscalls."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.store import Manifest, ManifestFile, ModelFS
from llmasos.userland.client import Client


class Daemon:
    """llmasosd in a home of its own."""

    def __init__(self, home: Path, *settings: str) -> None:
        self.home = home
        self.address = f"ipc://{home}/run/kernel.sock"
        command = [sys.executable, "-m", "llmasos.kernel.main"]
        for setting in settings:
            command += ["--set", setting]
        self.log = (home / "log").open("wb")
        env = {**os.environ, "LLMASOS_HOME": str(home), "OMP_NUM_THREADS": "2"}
        env.pop("LLMASOS_SOCKET", None)
        self.started = time.monotonic()
        self.process = subprocess.Popen(command, env=env, stderr=self.log, stdin=subprocess.DEVNULL)
        while b"ready" not in (home / "log").read_bytes():
            assert self.process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < self.started + 20
            time.sleep(0.005)
        self.ready_s = time.monotonic() - self.started

    def client(self, label: str = "") -> Client:
        return Client(self.address, label=label)

    def children(self, what: str) -> list[psutil.Process]:
        """The daemon's processes whose command line holds `what`: "--kernel" or a device name."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it is ending
                if what in child.cmdline():
                    found.append(child)
        return found

    def kernel(self) -> psutil.Process:
        return self.children("--kernel")[0]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        self.log.close()
        return code


def add_null_model(home: Path, name: str, *, tokenizer: str = "", **config: object) -> None:
    """A model for the null driver: a config.json, and a tokenizer.json if it is given."""
    store = ModelFS(home)
    texts = {"config.json": json.dumps({"model_type": "null", **config})}
    if tokenizer:
        texts["tokenizer.json"] = tokenizer
    manifest = Manifest(
        schema=1,
        source="test",
        architecture="null",
        parameters=0,
        quantization="",
        context_length=4096,
        license="",
        created=time.time(),
        files=[ManifestFile(path, *store.put_bytes(text.encode())) for path, text in texts.items()],
    )
    store.commit(parse_name(name), manifest)


@pytest.fixture(scope="module")
def daemons() -> Iterator[Callable[..., Daemon]]:
    """Starts daemons; stops what is left of them and checks that they end with code 0."""
    running: list[Daemon] = []
    homes: list[Path] = []

    def start(*settings: str, home: Path | None = None, **models: dict[str, object]) -> Daemon:
        if home is None:
            home = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))
            homes.append(home)
        for name, config in models.items():
            add_null_model(home, name, **config)
        daemon = Daemon(home, *settings)
        running.append(daemon)
        return daemon

    yield start
    codes = [daemon.stop() for daemon in running]
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
    # A test may have killed one on purpose, or not waited for its drain.
    assert all(code in (0, -signal.SIGKILL, 70) for code in codes), codes
