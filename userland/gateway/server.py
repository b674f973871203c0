"""The HTTP server: where it listens, and that nobody comes in who should not."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import ssl
from pathlib import Path

import uvicorn
from llmasos.syscalls import errors, garbage, turns

from .access import ApiKeys, folder

DRAIN_S = 10
BACKLOG = 2048

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
"""Why one of a host's addresses is passed over: this machine has no IPv6, for instance."""


def serve(
    address: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
) -> None:
    """Serves until it is told to end. Raises InvalidArgument, DaemonUnreachable."""
    from ..daemon import ensure_daemon
    from .app import build
    from .protocol import BoundedHeaders
    from .record import log_to_stderr

    found = ApiKeys(folder())
    keys = found if found else None
    if keys is None and not is_loopback(host):
        raise errors.InvalidArgument(
            f"{host} is reachable from elsewhere, and anybody could come in",
            hint="make a key first: llsh key api new NAME --as TENANT",
            field="host",
        )
    if (tls_cert is None) != (tls_key is None):
        raise errors.InvalidArgument("TLS needs a certificate and its key", field="tls_key")
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(one) for one in listening(host, port)]
        port = sockets[0].getsockname()[1]
        ensure_daemon(address).close()
        turns.short()  # not before: a daemon started here would inherit that
        log_to_stderr()
        app = build(address, keys)
        config = uvicorn.Config(
            app,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
            access_log=False,
            log_config=None,  # its loggers speak JSON as all others do
            log_level="warning",
            server_header=False,
            http=BoundedHeaders,
            timeout_graceful_shutdown=DRAIN_S,
            backlog=BACKLOG,
        )
        try:
            config.load()  # what is there for good is not to be searched
        except OSError as problem:  # of ssl, which names no file
            raise errors.InvalidArgument(
                f"{tls_cert}, {tls_key}: {_no_pair(problem)}", field="tls_cert"
            ) from None
        scheme = "https" if tls_cert else "http"
        shown = f"[{host}]" if ":" in host else host
        how = "API keys" if keys else "this machine only, without keys"
        print(
            f"LLMasOS serves {scheme}://{shown}:{port}/v1 ({how}); API: {scheme}://{shown}:{port}/docs",
            flush=True,
        )
        garbage.collect_rarely()
        server = uvicorn.Server(config)
        app.state.ending = lambda: server.should_exit
        server.run(sockets)


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of `host`; port 0 is a free one. Raises InvalidArgument."""
    opened: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for place, (family, *_, where) in enumerate(found):
            try:
                opened.append(socket.create_server(where, family=family, backlog=BACKLOG))
            except OSError as problem:
                if problem.errno not in _ABSENT or (not opened and place + 1 == len(found)):
                    raise
    except OSError as problem:
        for one in opened:
            one.close()
        known = {
            errno.EADDRINUSE: "is taken by another program",
            errno.EACCES: "is the administrator's",
        }
        if why := known.get(problem.errno or 0):
            raise errors.InvalidArgument(
                f"port {port} {why}", hint="--port names another one, 0 any that is free", field="port"
            ) from None
        why = problem.strerror if isinstance(problem, socket.gaierror) else os.strerror(problem.errno or 0)
        raise errors.InvalidArgument(f"cannot listen on {host}: {why}", field="host") from None
    return opened


def _no_pair(problem: OSError) -> str:
    if not isinstance(problem, ssl.SSLError):
        return problem.strerror or str(problem)
    if problem.reason == "KEY_VALUES_MISMATCH":
        return "the key is another certificate's"
    return "a certificate and its private key are files in PEM"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
