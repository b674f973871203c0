"""What a model and a path in the model filesystem may be called.

    model   name[:tag][+adapter]             tag is "latest" when left out
    path    /models/NAME:TAG[+ADAPTER][/FILE]    the tag may be left out here too

A name has one to three parts, an ADAPTER and a path's FILE exactly one, all of them of letters, digits, ".",
"_" and "-", beginning with a letter or a digit: no spelling of "..", an absolute path or a hidden file gets
through, so a parsed name can be joined to a folder as it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from llmasos.syscalls.errors import InvalidArgument, NoSuchFile

DEFAULT_TAG = "latest"
ROOT = "/models"
MOST_PARTS = 3

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


class ModelName(NamedTuple):
    """A valid name of a model; with `adapter`, of an adapter of the model `base`."""

    name: str
    tag: str
    adapter: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.variant}"

    @property
    def variant(self) -> str:
        """What stands behind the name: `tag` or `tag+adapter`."""
        return f"{self.tag}+{self.adapter}" if self.adapter else self.tag

    @property
    def short(self) -> str:
        """As people write it."""
        return str(self).replace(f":{DEFAULT_TAG}", "", 1) if self.tag == DEFAULT_TAG else str(self)

    @property
    def base(self) -> ModelName:
        """The model without the adapter."""
        return ModelName(self.name, self.tag)

    @property
    def path(self) -> str:
        """The model's folder in the syscall view."""
        return f"{ROOT}/{self}"


def is_part(text: str) -> bool:
    """Whether `text` is one valid part of a name, a tag, or the name of a model's file."""
    return _PART.fullmatch(text) is not None


def _is_name(text: str) -> bool:
    # Manifests lie in manifests/<name>/<tag>.json: a part that ends in .json could be both.
    parts = text.split("/")
    return len(parts) <= MOST_PARTS and all(is_part(p) and not p.endswith(".json") for p in parts)


def _parsed(text: str) -> ModelName | None:
    stem, plus, adapter = text.partition("+")
    name, colon, tag = stem.partition(":")
    tag = tag if colon else DEFAULT_TAG
    if not _is_name(name) or not is_part(tag) or (plus and not is_part(adapter)):
        return None
    return ModelName(name, tag, adapter)


def parse_name(text: str) -> ModelName:
    """`name[:tag][+adapter]` as a ModelName. Raises InvalidArgument."""
    if (model := _parsed(text)) is None:
        raise InvalidArgument(
            f"{text[:120]!r} is no model name",
            hint="a name is `name`, `name:tag` or `owner/name`, of letters, digits, '.', '_' and '-'; "
            "`name+adapter` is one with an adapter",
            field="model",
        )
    return model


class ModelPath(NamedTuple):
    """A path below /models: a model, or one of its files (`file` not empty)."""

    model: ModelName
    file: str


def parse_path(path: str) -> list[ModelPath]:
    """What `path` may mean, likeliest first; nothing for /models itself.

    Without a tag the last part can belong to the name or be a file, hence up to two meanings.
    Raises NoSuchFile (not below /models) and InvalidArgument (no valid name).
    """
    trimmed = path.rstrip("/")
    if trimmed == ROOT:
        return []
    if not trimmed.startswith(ROOT + "/"):
        raise NoSuchFile(
            f"no file {path[:120]!r}", hint="models are in /models: try `llsh ls`", path=path[:120]
        )
    rest = trimmed[len(ROOT) + 1 :]
    folder, _, file = rest.rpartition("/")
    found = [(_parsed(rest), ""), (_parsed(folder), file)]
    valid = [ModelPath(model, file) for model, file in found if model and (not file or is_part(file))]
    # "/models/a:b/" with nothing after the slash was trimmed above, so an empty file is a model.
    if not valid:
        raise InvalidArgument(
            f"{path[:120]!r} is no path", hint="paths look like /models/NAME:TAG/FILE", field="path"
        )
    return valid


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that `name` is most likely a slip of, or ""."""
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else ""
