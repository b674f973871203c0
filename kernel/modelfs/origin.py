"""What a source tells about the model it delivered, and how its name is read."""

from __future__ import annotations

import re
from typing import NamedTuple

from llmasos.syscalls.errors import InvalidArgument
from msgspec import Struct

from .manifest import Lineage

GGUF = "model.gguf"
"""What a GGUF file is called in a model."""

_HF = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(/(?P<file>[A-Za-z0-9][\w.-]{0,127}))?"
    r"(@(?P<revision>[A-Za-z0-9][\w./-]{0,127}))?",
    re.ASCII,
)
_PYPI = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}==[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63}")


class Origin(Struct, frozen=True):
    """Exactly where the files came from, the license's id if the source tells it, and how they were made if
    that was here."""

    source: str
    license: str
    lineage: Lineage | None = None


class Repository(NamedTuple):
    """hf:owner/repo[/FILE][@revision]"""

    repo: str
    file: str
    revision: str


def parse_repository(text: str) -> Repository:
    """Raises InvalidArgument."""
    if (match := _HF.fullmatch(text)) and ".." not in text:
        return Repository(match["repo"], match["file"] or "", match["revision"] or "main")
    raise InvalidArgument(
        f"{text[:120]!r} is no repository",
        hint="write hf:owner/repo or hf:owner/repo@revision",
        field="source",
    )


def parse_wheel(text: str) -> str:
    """`name==version` with the name as the index writes it. Raises InvalidArgument."""
    if not _PYPI.fullmatch(text):
        raise InvalidArgument(f"{text[:120]!r} is no wheel", hint="write pypi:name==version", field="source")
    name, _, version = text.partition("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"
