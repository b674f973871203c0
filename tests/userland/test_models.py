"""What a user means by a model's name or path."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmasos.syscalls import errors
from llmasos.userland.models import Reference, reference


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("smollm2", "smollm2:latest", ""),
        ("smollm2:q4", "smollm2:q4", ""),
        ("openai-community/gpt2", "openai-community/gpt2:latest", "hf:openai-community/gpt2"),
        ("owner/repo:v1", "owner/repo:v1", "hf:owner/repo@v1"),
        ("hf:owner/repo", "owner/repo:latest", "hf:owner/repo"),
        ("hf:owner/repo@v1", "owner/repo:v1", "hf:owner/repo@v1"),
        ("https://huggingface.co/owner/repo", "owner/repo:latest", "hf:owner/repo"),
        ("hf:q4", "hf:q4", ""),
    ],
)
def test_names(text: str, name: str, source: str) -> None:
    assert reference(text) == Reference(name, source)
    assert Reference(name).path == f"/models/{name}"


def test_a_changed_folder_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My Model (1)"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = reference(folder)
    assert first.name.startswith("My-Model--1--")
    assert first.source == f"file:{folder}"
    assert reference(str(folder)) == reference(f"file:{folder}") == first
    monkeypatch.chdir(tmp_path)
    assert reference("My Model (1)") == first  # a folder with a model in it wins over a name
    (folder / "config.json").write_text('{"a": 1}')
    assert reference(folder).name != first.name


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4_1.gguf").write_bytes(b"GGUF")
    found = reference(tmp_path / "tiny.Q4_1.gguf")
    assert found.name.startswith("tiny.Q4_1-")
    assert found.source == f"file:{tmp_path}/tiny.Q4_1.gguf"
    with pytest.raises(errors.NoSuchFile, match=r"nothing\.gguf"):
        reference("nothing.gguf")
