"""LLMasOS: an operating system for large language models.

    from llmasos import LLM
    print(LLM.from_pretrained("smollm2").generate("The capital of France is"))

The names below are imported when they are first used, so `import llmasos` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .syscalls import errors
    from .userland.agents import Agent
    from .userland.aio import AsyncClient
    from .userland.client import Client
    from .userland.llm import LLM

    __version__: str

__all__ = ["LLM", "Agent", "AsyncClient", "Client", "__version__", "errors"]

_HOMES = {
    "LLM": "llmasos.userland.llm",
    "Agent": "llmasos.userland.agents",
    "AsyncClient": "llmasos.userland.aio",
    "Client": "llmasos.userland.client",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("llmasos")
    elif name == "errors":
        value = importlib.import_module("llmasos.syscalls.errors")
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'llmasos' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
