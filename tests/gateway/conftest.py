"""The gateway over real sockets, before a real daemon with the null driver, whose models speak in words, and
one in bytes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from llmasos.syscalls import table
from llmasos.syscalls import types as t
from llmasos.userland.client import Client
from llmasos.userland.daemon import ensure_daemon
from llmasos.userland.gateway.access import ApiKeys, folder
from llmasos.userland.gateway.app import build
from llmasos.userland.gateway.protocol import BoundedHeaders

from ..llsh.conftest import add_model, put_model
from ..userland.conftest import STOP, byte_tokenizer, model_files


@dataclass
class Gateway:
    """A gateway that serves at `url`. `keys` are by tenant."""

    url: str
    keys: dict[str, str]
    server: uvicorn.Server

    def http(self, tenant: str = "alice") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"} if self.keys else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)


def soon(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    until = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def serve(keys: dict[str, str]) -> Iterator[Gateway]:
    """A gateway in a thread, on a free port; without keys it asks for none."""
    app = build(None, ApiKeys(folder()) if keys else None)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, http=BoundedHeaders
    )
    server = uvicorn.Server(config)
    app.state.ending = lambda: server.should_exit
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Gateway(f"http://127.0.0.1:{listening.getsockname()[1]}", keys, server)
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def daemon(device: str) -> Iterator[Path]:
    """A daemon with this device, in a home of its own that is everybody's meanwhile."""
    made = Path(tempfile.mkdtemp(prefix="gw", dir="/tmp"))
    (made / "config.toml").write_text(f'devices = ["{device}"]\n')
    before = {name: os.environ.pop(name, None) for name in ("LLMASOS_HOME", "LLMASOS_SOCKET")}
    os.environ["LLMASOS_HOME"] = str(made)
    files = {path: data.decode() for path, data in model_files(byte_tokenizer()).items()}
    put_model(made, "bytes", files, {"vocab_size": STOP + 1, "max_position_embeddings": 4096})
    encoder = {"architectures": ["BertModel"], "llmasos_null_encodes": "embed"}
    put_model(made, "encoder", files, {"vocab_size": STOP + 1, "max_position_embeddings": 64, **encoder})
    with ensure_daemon() as client:
        soon(lambda: client.call(table.Lsdev()).devices[0].state == "ready", 30)
    yield made
    with Client() as client:
        client.call(table.Shutdown(0))
    os.environ.pop("LLMASOS_HOME")
    os.environ.update({name: value for name, value in before.items() if value is not None})
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    with daemon("null") as made:
        add_model(made, "tiny", max_position_embeddings=512)
        add_model(made, "plain", template="", max_position_embeddings=512)
        add_model(made, "slow", max_position_embeddings=512, llmasos_null_step_seconds=0.05)
        yield made


@pytest.fixture(scope="session")
def gateway(home: Path) -> Iterator[Gateway]:
    """One that asks for keys: alice and bob have the usual rights, carol can train and bring in models."""
    keys = ApiKeys(folder())
    made = {tenant: keys.make(tenant, tenant, t.TENANT_RIGHTS) for tenant in ("alice", "bob")}
    more = (*t.TENANT_RIGHTS, t.Capability.TRAIN, t.Capability.MODELS)
    made["carol"] = keys.make("carol", "carol", more)
    yield from serve(made)


@pytest.fixture
def http(gateway: Gateway) -> Iterator[httpx.Client]:
    """Alice."""
    with gateway.http() as client:
        yield client


@pytest.fixture
def kernel(home: Path) -> Iterator[Client]:
    """The administrator's view."""
    with Client() as client:
        yield client
