"""Data sets: whole under their names or not there, whoever writes, crashes and removes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from llmasos.kernel.modelfs import dataset_files, durable
from llmasos.kernel.modelfs.dataset_files import DatasetFiles
from llmasos.syscalls.errors import InvalidArgument, NoSuchFile, QueueFull, QuotaExceeded, StorageFailed

ROOM = 1 << 40


def write(files: DatasetFiles, name: str, data: bytes, owner: str = "a", step: int = 5) -> None:
    for offset in range(0, max(len(data), 1), step):
        part = data[offset : offset + step]
        last = offset + step >= len(data)
        assert files.write(owner, name, offset, part, last, ROOM, 0.0) == offset + len(part)


def used(files: DatasetFiles, path: str) -> int:
    return sum(file.st_size for file in files.kept(path))


@pytest.fixture
def files(tmp_path: Path) -> DatasetFiles:
    return DatasetFiles(tmp_path / "datasets")


def test_what_was_written_is_read(files: DatasetFiles) -> None:
    data = b'{"text": "a"}\n' * 9
    write(files, "facts.jsonl", data)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    (info,) = files.ls("a")
    assert info == files.stat("a", "facts.jsonl")
    assert (info.path, info.kind, info.size, info.digest) == (
        "/datasets/facts.jsonl",
        "dataset",
        len(data),
        digest,
    )
    assert files.digest("a", "facts.jsonl") == digest
    assert files.path("a", "facts.jsonl").read_bytes() == data
    assert files.read("a", "facts.jsonl", 3, 4) == (len(data), data[3:7])
    assert files.read("a", "facts.jsonl", 10**9, 4) == (len(data), b"")
    assert files.check() == []


def test_somebody_elses_data_are_as_missing_ones(files: DatasetFiles) -> None:
    write(files, "facts", b"x", owner="a/b")
    assert files.ls("a") == files.ls("c") == []
    for owner in ("a", "c"):
        for call in (files.stat, files.path, files.digest, files.remove):
            with pytest.raises(NoSuchFile):
                call(owner, "facts")
    with pytest.raises(NoSuchFile, match="did you mean facts"):
        files.path("a/b", "fact")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".a", "-a", "a\0", "a\n", "a" * 97])
def test_names_that_are_none(files: DatasetFiles, name: str) -> None:
    for call in (files.stat, files.remove):
        with pytest.raises(InvalidArgument):
            call("a", name)
    with pytest.raises(InvalidArgument):
        files.write("a", name, 0, b"x", True, ROOM, 0.0)


def test_a_write_that_is_not_at_the_end_is_told_where_that_is(files: DatasetFiles) -> None:
    files.write("a", "x", 0, b"12345", False, ROOM, 0.0)
    with pytest.raises(InvalidArgument) as caught:
        files.write("a", "x", 3, b"45", True, ROOM, 0.0)
    assert caught.value.details == {"field": "offset", "size": 5}
    assert files.write("a", "x", 5, b"6", True, ROOM, 0.0) == 6
    assert files.path("a", "x").read_bytes() == b"123456"
    files.write("a", "x", 0, b"begun", False, ROOM, 0.0)
    files.write("a", "x", 0, b"anew", True, ROOM, 0.0)
    assert files.path("a", "x").read_bytes() == b"anew"
    assert used(files, "a") == 4 + os.lstat(files.path("a", "x").with_name("x")).st_size


def test_an_owner_has_no_more_than_there_is_room_for(files: DatasetFiles) -> None:
    files.write("a", "x", 0, b"12345", False, 5, 0.0)
    with pytest.raises(QuotaExceeded, match="no room"):
        files.write("a", "x", 5, b"6", True, 0, 0.0)
    assert (used(files, "a"), used(files, "a/b"), used(files, "b")) == (5, 0, 0)
    assert files.write("a", "x", 5, b"", True, 0, 0.0) == 5


def test_only_so_many_are_written_at_a_time_and_not_for_ever(files: DatasetFiles) -> None:
    for number in range(dataset_files.MOST_UNFINISHED):
        files.write("a", f"x{number}", 0, b"1", False, ROOM, 0.0)
    with pytest.raises(QueueFull):
        files.write("a", "one-more", 0, b"1", False, ROOM, 1.0)
    files.write("b", "x", 0, b"1", False, ROOM, 1.0)
    files.write("a", "x0", 1, b"2", False, ROOM, 60.0)
    files.write("a", "one-more", 0, b"1", True, ROOM, dataset_files.KEPT_S + 1)
    assert files.write("a", "x0", 2, b"3", True, ROOM, dataset_files.KEPT_S + 1) == 3
    with pytest.raises(InvalidArgument):
        files.write("a", "x1", 1, b"2", True, ROOM, dataset_files.KEPT_S + 1)
    assert [info.path for info in files.ls("a")] == ["/datasets/one-more", "/datasets/x0"]


def test_who_has_a_link_to_the_data_keeps_them(files: DatasetFiles, tmp_path: Path) -> None:
    write(files, "x", b"old")
    os.link(files.path("a", "x"), tmp_path / "kept")
    write(files, "x", b"new")
    files.remove("a", "x")
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert used(files, "a") == 0


@pytest.mark.parametrize("large", [False, True])
def test_nobody_waits_for_the_blocks_of_large_data(
    large: bool, files: DatasetFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "LARGE", 4 if large else 5)
    write(files, "x", b"data")
    path, begun, gone = files.path("a", "x"), threading.Event(), threading.Event()
    close, mine, held = os.close, threading.get_ident(), []

    def slow(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(path)):
            held.append(threading.get_ident() != mine)
            begun.set()
            assert not large or gone.wait(5)
        close(fd)

    monkeypatch.setattr(os, "close", slow)
    files.remove("a", "x")  # would wait for ever
    assert begun.wait(5)
    assert (held, files.kept("a"), path.exists()) == ([large], [], False)
    gone.set()


def test_equal_data_are_there_once(files: DatasetFiles) -> None:
    write(files, "x", b"same")
    write(files, "y", b"same")
    assert files.path("a", "x") == files.path("a", "y")
    files.remove("a", "x")
    assert files.read("a", "y", 0, 9) == (4, b"same")


def test_damage_is_found(files: DatasetFiles) -> None:
    write(files, "x", b"good")
    files.path("a", "x").write_bytes(b"evil")
    assert files.check() == ["datasets/of-a/x: its content is not what its digest says"]
    files.path("a", "x").unlink()
    assert len(files.check()) == 1
    with pytest.raises(NoSuchFile):
        files.path("a", "x")


def test_a_full_disk_is_told_and_changes_nothing(
    files: DatasetFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files, "x", b"old")
    for call in ("write", "fsync"):
        with monkeypatch.context() as patched:

            def full(*arguments: object) -> int:
                raise OSError(28, "No space left on device")

            patched.setattr(os, call, full)
            with pytest.raises(StorageFailed, match="No space left"):
                files.write("a", "x", 0, b"new", True, ROOM, 0.0)
        assert files.path("a", "x").read_bytes() == b"old"
        assert used(files, "a") == 3 + len(files.path("a", "x").name)
    write(files, "x", b"new")
    assert files.path("a", "x").read_bytes() == b"new"


def test_a_writer_killed_at_any_moment_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    """The process ends at its nth call of the operating system that changes something, for every n."""
    script = (
        "import os, sys, pathlib\n"
        "from llmasos.kernel.modelfs.dataset_files import DatasetFiles\n"
        "files, left = DatasetFiles(pathlib.Path(sys.argv[1])), [int(sys.argv[2])]\n"
        "def counted(call):\n"
        "    def called(*arguments, **named):\n"
        "        left[0] -= 1\n"
        "        if left[0] < 0: os._exit(9)\n"
        "        return call(*arguments, **named)\n"
        "    return called\n"
        "for name in ('write', 'fsync', 'replace', 'symlink', 'unlink', 'open', 'mkdir', 'rename'):\n"
        "    setattr(os, name, counted(getattr(os, name)))\n"
        "files.write('a', 'x', 0, b'first', True, 99, 0.0)\n"
        "files.write('a', 'x', 0, b'seco', False, 99, 0.0)\n"
        "files.write('a', 'x', 4, b'nd', True, 99, 0.0)\n"
    )
    seen = set()
    for calls in range(200):
        folder = tmp_path / str(calls)
        code = subprocess.run([sys.executable, "-c", script, str(folder), str(calls)], check=False).returncode
        files = DatasetFiles(folder)
        files.sweep()
        seen.add(found := files.path("a", "x").read_bytes() if files.ls("a") else b"")
        assert files.check() == []
        assert used(files, "a") == (len(found) + len(files.path("a", "x").name) if found else 0)
        if code == 0:
            break
        assert code == 9
    assert seen == {b"", b"first", b"second"}


class Writing(RuleBasedStateMachine):
    """Any sequence of writes, removals and restarts, against dictionaries."""

    names = st.sampled_from(["x", "y"])
    owners = st.sampled_from(["a", "a/b"])

    @initialize()
    def begin(self) -> None:
        self.home = tempfile.TemporaryDirectory()
        self.files = DatasetFiles(Path(self.home.name))
        self.whole: dict[tuple[str, str], bytes] = {}
        self.parts: dict[tuple[str, str], bytes] = {}

    @rule(owner=owners, name=names, data=st.binary(max_size=9), last=st.booleans(), anew=st.booleans())
    def write(self, owner: str, name: str, data: bytes, last: bool, anew: bool) -> None:
        before = b"" if anew else self.parts.get((owner, name), b"")
        assert self.files.write(owner, name, len(before), data, last, ROOM, 0.0) == len(before + data)
        self.parts[owner, name] = before + data
        if last:
            self.whole[owner, name] = self.parts.pop((owner, name))

    @rule(owner=owners, name=names)
    def remove(self, owner: str, name: str) -> None:
        if (owner, name) in self.whole:
            self.files.remove(owner, name)
            del self.whole[owner, name]
        else:
            with pytest.raises(NoSuchFile):
                self.files.remove(owner, name)

    @rule()
    def restart(self) -> None:
        self.files = DatasetFiles(Path(self.home.name))
        self.files.sweep()
        self.parts.clear()

    @invariant()
    def is_as_expected(self) -> None:
        for owner in ("a", "a/b"):
            found = {info.path.rpartition("/")[2] for info in self.files.ls(owner)}
            assert found == {name for of, name in self.whole if of == owner}
        for (owner, name), data in self.whole.items():
            assert self.files.path(owner, name).read_bytes() == data
            assert self.files.stat(owner, name).size == len(data)
        assert self.files.check() == []

    def teardown(self) -> None:
        self.home.cleanup()


Writing.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestWriting = Writing.TestCase
