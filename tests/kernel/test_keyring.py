"""The folder of keys: whatever lies there lets in who is named, and never ends the kernel that looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from llmasos.kernel.keyring import Keyring
from llmasos.syscalls import errors
from llmasos.syscalls.types import Capability, KeyInfo

KEY = "b" * 64
TEXT = f'tenant = "alice"\npublic = "{KEY}"\nrights = ["see", "admin"]\n'


def test_a_key_with_the_right_to_administer_does_not_have_it(tmp_path: Path) -> None:
    (tmp_path / "a.key").write_text(TEXT)
    (entry,) = Keyring(tmp_path).entries()
    assert entry.rights == (Capability.SEE,)


def test_a_file_that_goes_while_the_folder_is_read_was_never_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.key").write_text(TEXT)
    found = Keyring._files

    def files(self: Keyring) -> list[object]:
        there = found(self)
        (tmp_path / "gone.key").unlink(missing_ok=True)
        return there

    (tmp_path / "gone.key").write_text(TEXT.replace("b", "c"))
    monkeypatch.setattr(Keyring, "_files", files)
    keyring = Keyring(tmp_path)
    assert [entry.public for entry in keyring.entries()] == [KEY]
    assert keyring.problems == []


def test_a_folder_that_is_none_lets_nobody_in_and_is_told_once(tmp_path: Path) -> None:
    folder = tmp_path / "authorized"
    folder.mkdir()
    (folder / "a.key").write_text(TEXT)
    keyring = Keyring(folder)
    (folder / "a.key").rename(tmp_path / "a.key")
    folder.rmdir()
    folder.write_text(TEXT)
    assert keyring.refresh() == {KEY}
    assert keyring.refresh() == set()
    assert keyring.problems == [f"folder {folder} lets nobody in: Not a directory"]
    folder.unlink()
    folder.mkdir()
    (tmp_path / "a.key").rename(folder / "a.key")
    keyring.refresh()
    assert [entry.public for entry in keyring.entries()] == [KEY]


@pytest.mark.parametrize("text", [b"\xff", b"tenant = 7", b"a = " + b"[" * 20_000, b"\0" * 4096])
def test_a_file_that_makes_no_sense_lets_nobody_in(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.key").write_bytes(text)
    (tmp_path / "a.key").write_text(TEXT)
    keyring = Keyring(tmp_path)
    assert [entry.public for entry in keyring.entries()] == [KEY]
    assert len(keyring.problems) == 1


def test_a_full_disk_takes_no_key_its_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring(tmp_path)
    keyring.authorize(KeyInfo("alice", KEY))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(errors.Unavailable, match="No space left"):
        keyring.authorize(KeyInfo("bob", KEY))
    assert [file.name for file in tmp_path.iterdir()] == [f"alice-{KEY[:8]}.key"]
    monkeypatch.undo()
    keyring.authorize(KeyInfo("bob", KEY))
    assert [(entry.tenant, entry.public) for entry in keyring.entries()] == [("bob", KEY)]
