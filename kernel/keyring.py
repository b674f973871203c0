"""Which CURVE keys may come in over tcp, and as whom: one file a key in HOME/keys/authorized.

    tenant = "alice"
    public = "<64 hexadecimal digits>"
    rights = ["see", "infer", "process"]

Whatever adds, removes or replaces a file there is noticed (`refresh`). No key has the right `admin`: the
machine is administered from itself. A file that cannot be understood lets nobody in.
"""

from __future__ import annotations

import os
import tomllib
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq
from llmasos.syscalls import errors
from llmasos.syscalls.keys import KeyPair, read_pair, write_pair
from llmasos.syscalls.types import Capability, KeyInfo
from zmq.utils import z85

from .tenants import Subject

SUFFIX = ".key"


class Keyring:
    """The folder `folder`, made at need."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, KeyInfo] = {}
        self._stamp: list[tuple[str, int, int]] = []
        self._unreadable = ""
        self.problems: list[str] = []  # files that let nobody in; whoever logs them empties the list
        self.refresh()

    def entries(self) -> list[KeyInfo]:
        return sorted(self._entries.values(), key=lambda entry: (entry.tenant, entry.public))

    def subject(self, key: str) -> Subject | None:
        """Who a public key stands for; None: it is not known."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        return Subject(entry.tenant, -1, -1, False, frozenset({Capability.CONNECT, *entry.rights}), key)

    def refresh(self) -> set[str]:
        """Reads the folder if it has changed. Returns the keys that lost or changed what they had."""
        unreadable = ""
        stamp = []
        try:
            for file in self._files():
                with suppress(FileNotFoundError):  # it went meanwhile
                    stamp.append((file.name, file.stat().st_mtime_ns, file.stat().st_ino))
        except OSError as problem:
            unreadable = f"folder {self._folder} lets nobody in: {problem.strerror}"
        stamp.sort()
        if (stamp, unreadable) == (self._stamp, self._unreadable):
            return set()
        before, self._stamp, self._unreadable = self._entries, stamp, unreadable
        if unreadable:
            self.problems.append(unreadable)
        self._entries = {}
        for name, _, _ in stamp:
            try:
                entry = msgspec.convert(tomllib.loads((self._folder / name).read_text()), KeyInfo)
            except (OSError, ValueError, msgspec.ValidationError, RecursionError) as problem:
                self.problems.append(f"{name} lets nobody in: {type(problem).__name__}")
                continue
            rights = tuple(right for right in entry.rights if right is not Capability.ADMIN)
            self._entries[entry.public] = msgspec.structs.replace(entry, rights=rights)
        return {key for key, entry in before.items() if self._entries.get(key) != entry}

    def authorize(self, entry: KeyInfo) -> set[str]:
        """Lets a key in, or gives it another tenant or other rights; durable. Returns like `refresh`.

        Raises InvalidArgument, Unavailable when the folder cannot be written.
        """
        if Capability.ADMIN in entry.rights:
            raise errors.InvalidArgument(
                "a key cannot administer", field="rights", hint="administration is local only"
            )
        rights = ", ".join(f'"{right}"' for right in entry.rights)
        text = f'tenant = "{entry.tenant}"\npublic = "{entry.public}"\nrights = [{rights}]\n'
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{entry.tenant}-{entry.public[:8]}{SUFFIX}"
            unfinished = path.with_suffix(".new")
            try:
                with open(unfinished, "w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.rename(path)
            finally:
                unfinished.unlink(missing_ok=True)
            self._remove([entry.public], path.name)
            self._sync()
        except OSError as problem:
            raise errors.Unavailable(f"the key cannot be kept: {problem.strerror}") from None
        return self.refresh()

    def revoke(self, who: str) -> set[str]:
        """Shuts out a key, or all keys of a tenant; durable. Returns like `refresh`. Raises NoSuchKey."""
        keys = [entry.public for entry in self._entries.values() if who in (entry.tenant, entry.public)]
        if not keys:
            raise errors.NoSuchKey(f"no key of {who[:64]!r}", hint="see `llsh key list`")
        try:
            self._remove(keys)
            self._sync()
        except OSError as problem:
            raise errors.Unavailable(f"the key cannot be removed: {problem.strerror}") from None
        return self.refresh()

    def _files(self) -> list[os.DirEntry[str]]:
        try:
            files = list(os.scandir(self._folder))
        except FileNotFoundError:
            return []
        return [file for file in files if file.name.endswith(SUFFIX) and file.is_file()]

    def _remove(self, keys: list[str], but: str = "") -> None:
        for file in self._files():
            if file.name == but:
                continue
            text = Path(file.path).read_text(errors="replace")
            if any(key in text for key in keys):
                os.unlink(file.path)

    def _sync(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def server_pair(path: Path) -> KeyPair:
    """The daemon's own key pair, made at first use."""
    try:
        return read_pair(path)
    except errors.NoSuchFile:
        public, secret = (z85.decode(key).hex() for key in zmq.curve_keypair())
        pair = KeyPair(public, secret)
        write_pair(path, pair)
        return pair
