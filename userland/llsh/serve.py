"""`llsh serve`: HTTP for programs that speak OpenAI's, Anthropic's or Ollama's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from llmasos.syscalls import errors

from .argument import examples
from .shell import shell_of

app = typer.Typer()

PORT = 8000


@app.command(
    epilog=examples(
        "llsh serve",
        "llsh serve --port 11434         # where Ollama's clients look",
        "llsh key api new ci --as alice; llsh serve --host 0.0.0.0 --tls-cert CERT --tls-key KEY",
    )
)
def serve(
    context: typer.Context,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen. Beyond this machine, API keys are needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = PORT,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", exists=True, help="Certificate chain (PEM): serve https.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", exists=True, help="Its private key (PEM).")
    ] = None,
) -> None:
    """Serve OpenAI's, Anthropic's and Ollama's APIs over HTTP.

    Until there is a key (`llsh key api new`), whoever is on this machine may come in, and nobody else.
    """
    try:
        from ..gateway.server import serve as run
    except ImportError as problem:
        raise errors.InvalidRequest(
            f"the gateway needs {problem.name}", hint="pip install 'llmasos[gateway]'"
        ) from None
    run(shell_of(context).address, host=host, port=port, tls_cert=tls_cert, tls_key=tls_key)
