"""The HTTP server: where it listens, and that nobody comes in who should not."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import uvicorn
from llmasos.syscalls import errors, garbage, turns

from .access import ApiKeys, folder

DRAIN_S = 10


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
    ensure_daemon(address).close()
    turns.short()  # not before: a daemon started here would inherit that
    log_to_stderr()
    app = build(address, keys)
    scheme = "https" if tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host
    how = "API keys" if keys else "this machine only, without keys"
    print(
        f"LLMasOS serves {scheme}://{shown}:{port}/v1 ({how}); API: {scheme}://{shown}:{port}/docs",
        flush=True,
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=tls_cert,
        ssl_keyfile=tls_key,
        access_log=False,
        log_config=None,  # its loggers speak JSON as all others do
        log_level="warning",
        server_header=False,
        http=BoundedHeaders,
        timeout_graceful_shutdown=DRAIN_S,
    )
    config.load()  # what is there for good is not to be searched
    garbage.collect_rarely()
    server = uvicorn.Server(config)
    app.state.ending = lambda: server.should_exit
    server.run()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
