"""The catalogue of short names (catalogue.toml): where a model comes from when the user names no source."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources

import msgspec
from msgspec import Struct

from .names import DEFAULT_TAG, ModelName


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """A short name. `license` is an SPDX id in lower case; `sources` are tried in order."""

    description: str
    license: str
    sources: list[str]


class Wheel(Struct, frozen=True, forbid_unknown_fields=True):
    """What a wheel on PyPI must be: 64 hex digits, bytes."""

    sha256: str
    size: int


class Catalogue(Struct, frozen=True, forbid_unknown_fields=True):
    """`models` by short name, `wheels` by "name==version"."""

    models: dict[str, Entry]
    wheels: dict[str, Wheel]

    def entry(self, model: ModelName) -> Entry | None:
        """The entry of a short name."""
        return self.models.get(model.short)

    def sources(self, model: ModelName) -> list[str]:
        """Where `model` can be had: its entry's sources; for owner/name the repository of that name on the
        Hugging Face Hub, the tag being the revision; otherwise nothing."""
        if entry := self.entry(model):
            return entry.sources
        if model.name.count("/") == 1 and not model.adapter:
            return [f"hf:{model.name}" if model.tag == DEFAULT_TAG else f"hf:{model.name}@{model.tag}"]
        return []


@functools.cache
def load() -> Catalogue:
    """The catalogue that comes with LLMasOS."""
    text = resources.files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), Catalogue)
