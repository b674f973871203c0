"""The application: which routes there are, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from llmasos.syscalls import errors

from . import classes, decisions, machine, metrics, processes, scores, system
from .access import ApiKeys
from .anthropic import messages
from .callers import Callers
from .console import feed, page
from .http import MOST_BODY, Frame, handle_errors
from .ollama import chat as ollama_chat
from .ollama import embed, generate
from .ollama import models as ollama_models
from .openai import batches, chat, completions, embeddings, files, fine_tuning, models, responses
from .store import Store, gateway_folder
from .works import Works

TITLE = "LLMasOS gateway"
DESCRIPTION = (
    "OpenAI's, Anthropic's and Ollama's APIs over the kernel's syscalls. Every caller is a tenant with a "
    "scheduling class, quotas and processes like any other."
)

ROUTERS = (
    system.router,
    metrics.router,
    models.router,
    chat.router,
    completions.router,
    files.router,
    responses.router,
    batches.router,
    fine_tuning.router,
    embeddings.router,
    decisions.router,
    scores.router,
    classes.router,
    messages.router,
    generate.router,
    ollama_chat.router,
    embed.router,
    ollama_models.router,
    processes.router,
    machine.router,
    feed.router,
    page.router,
)


def _document(app: FastAPI) -> None:
    """The OpenAPI document without FastAPI's 422: what is invalid is a 400 here, in each API's shape."""
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            for path in made()["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
        return made()

    app.openapi = document  # type: ignore[method-assign]


log = logging.getLogger("llmasos.gateway")

PURGE_S = 600.0


async def _purge(store: Store) -> None:
    while True:
        with contextlib.suppress(errors.StorageFailed):
            await store.purge()
        await asyncio.sleep(PURGE_S)


def build(address: str | None, keys: ApiKeys | None) -> FastAPI:
    """The ASGI application of the kernel at `address`. Without `keys` it serves this machine only."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.callers = Callers(address, keys)
        app.state.works = Works()
        app.state.store = await asyncio.to_thread(Store, gateway_folder())
        app.state.background = responses.Background(app.state.callers, app.state.store, app.state.works)
        app.state.batches = batches.Batches(app.state.callers, app.state.store, app.state.works)
        app.state.jobs = fine_tuning.Jobs(app.state.callers, app.state.store, app.state.works)
        app.state.works.start("purge", _purge(app.state.store))
        await responses.resume(app)
        await batches.resume(app)
        await fine_tuning.resume(app)
        try:
            yield
        finally:
            await app.state.works.close()
            await asyncio.to_thread(app.state.store.close)
            app.state.callers.close()

    app = FastAPI(
        title=TITLE,
        description=DESCRIPTION,
        version=version("llmasos"),
        lifespan=lifespan,
        docs_url=None,  # console/page.py has one that needs nobody else
        redoc_url=None,
    )
    app.state.metrics = metrics.GatewayMetrics()
    app.state.ending = lambda: False
    app.state.body_limit = lambda path: files.MOST_UPLOAD if path == "/v1/files" else MOST_BODY
    handle_errors(app)
    _document(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Frame, local=keys is None)
    return app
