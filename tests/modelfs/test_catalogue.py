"""The catalogue that comes with LLMasOS."""

from __future__ import annotations

import re

from llmasos.kernel.modelfs import catalogue
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.origin import parse_repository, parse_wheel


def test_every_entry_can_be_pulled() -> None:
    known = catalogue.load()
    assert "smollm2" in known.models
    for name, entry in known.models.items():
        assert str(parse_name(name).name) == name
        assert entry.sources
        assert entry.license == entry.license.lower()
        for source in entry.sources:
            kind, _, place = source.partition(":")
            assert kind in ("hf", "pypi")
            if kind == "hf":
                parse_repository(place)
            else:
                assert parse_wheel(place) == place
                assert place in known.wheels, "a wheel of the catalogue must be pinned"
    assert all(re.fullmatch("[0-9a-f]{64}", wheel.sha256) for wheel in known.wheels.values())


def test_owner_and_name_mean_the_hub() -> None:
    known = catalogue.load()
    assert known.sources(parse_name("smollm2"))[0].startswith("pypi:")
    assert known.sources(parse_name("a/b")) == ["hf:a/b"]
    assert known.sources(parse_name("a/b:v1")) == ["hf:a/b@v1"]
    assert known.sources(parse_name("unheard-of")) == []
