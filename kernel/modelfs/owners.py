"""Files that each owner has apart: <folder>/of-<owner>/<name>. What does not look like a name (.x, say) is
the business of whoever uses this, and never listed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from llmasos.syscalls.errors import InvalidArgument, NoSuchFile

from ..shares import is_below
from .durable import sync_folder
from .names import did_you_mean, is_part


def parse_path(path: str, root: str, noun: str) -> str | None:
    """The NAME of ROOT/NAME, "" for ROOT, None for what lies elsewhere. Raises InvalidArgument."""
    trimmed = path.rstrip("/")
    if trimmed == root:
        return ""
    return checked(trimmed.removeprefix(root + "/"), noun) if trimmed.startswith(root + "/") else None


def checked(name: str, noun: str) -> str:
    """`name`, if a file of an owner may be called so. Raises InvalidArgument."""
    if not is_part(name):
        raise InvalidArgument(
            f"{name[:120]!r} is no name of a {noun}",
            hint="letters, digits, '.', '_' and '-', beginning with a letter or a digit",
            field="name",
        )
    return name


class Owners:
    """The owners' folders below one folder, which is made (0700) if it is missing. `root` is the path that
    people see, `noun` what lies there."""

    def __init__(self, folder: Path, root: str, noun: str) -> None:
        self.folder = folder
        self.root = root
        self.noun = noun
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def of(self, owner: str) -> Path:
        """An owner's folder, which need not exist."""
        return self.folder / f"of-{quote(owner, safe='')}"

    def place(self, owner: str, name: str) -> Path:
        """Where an owner's file lies, if there is one. Raises InvalidArgument."""
        return self.of(owner) / checked(name, self.noun)

    def made(self, owner: str) -> Path:
        """An owner's folder, made durably. Raises OSError."""
        folder = self.of(owner)
        if not folder.is_dir():
            folder.mkdir(mode=0o700)
            sync_folder(self.folder)
        return folder

    def below(self, path: str) -> Iterator[Path]:
        """The folders of an owner and of those below it."""
        for folder in self.folder.glob("of-*"):
            if is_below(unquote(folder.name.removeprefix("of-")), path):
                yield folder

    def names(self, owner: str) -> list[str]:
        """The names of an owner's files, sorted."""
        folder = self.of(owner)
        return sorted(p.name for p in folder.iterdir() if is_part(p.name)) if folder.is_dir() else []

    def files(self) -> Iterator[Path]:
        """All files of all owners."""
        return (path for path in sorted(self.folder.glob("of-*/*")) if is_part(path.name))

    def missing(self, owner: str, name: str) -> NoSuchFile:
        """The error that says so; somebody else's file is one that does not exist."""
        near = did_you_mean(name, self.names(owner))
        hint = f"did you mean {near}?" if near else f"see `llsh ls {self.root}`"
        return NoSuchFile(f"no {self.noun} {name}", hint=hint, path=f"{self.root}/{name}")
