"""API keys: who may come in over HTTP, as which tenant, with which rights. Kept as hashes, one file a key.

    name = "ci"
    tenant = "alice"
    sha256 = "…"
    rights = ["see", "infer", "process"]
    created = 1795700000

A key has 256 random bits, so a plain hash is as good as a slow one: there is nothing to guess. A file that
cannot be understood lets nobody in.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import tomllib
from pathlib import Path

import msgspec
from llmasos.syscalls import address, errors
from llmasos.syscalls import types as t
from llmasos.syscalls.bounds import refused
from msgspec import Struct

PREFIX = "sk-llmasos-"
SUFFIX = ".toml"
REFRESH_S = 1.0


class ApiKey(Struct, frozen=True, forbid_unknown_fields=True):
    """One key, without the key."""

    name: t.Tenant
    tenant: t.Tenant
    sha256: t.PublicKey
    rights: t.Rights = t.TENANT_RIGHTS
    created: int = 0


def folder() -> Path:
    return address.keys_folder() / "http"


class ApiKeys:
    """The keys in `folder`; what changes there counts within REFRESH_S."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_hash: dict[str, ApiKey] = {}
        self._stamp: list[tuple[str, int]] | None = None
        self._look_at = 0.0
        self.problems: list[str] = []

    def __bool__(self) -> bool:
        self._refresh()
        return bool(self._by_hash)

    def find(self, key: str) -> ApiKey | None:
        self._refresh()
        return self._by_hash.get(hashlib.sha256(key.encode()).hexdigest())

    def all(self) -> list[ApiKey]:
        self._look_at = 0.0
        self._refresh()
        return sorted(self._by_hash.values(), key=lambda key: key.name)

    def make(self, name: str, tenant: str, rights: t.Rights) -> str:
        """A new key, which is shown once: only its hash is kept. Raises AlreadyExists, InvalidArgument."""
        if t.Capability.ADMIN in rights:
            raise errors.InvalidArgument("an API key cannot administer", field="rights")
        if any(known.name == name for known in self.all()):
            raise errors.AlreadyExists(
                f"there is a key {name}", hint="revoke it first, or choose another name"
            )
        key = PREFIX + secrets.token_urlsafe(32)
        made = {
            "name": name,
            "tenant": tenant,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "rights": [str(right) for right in rights],
            "created": int(time.time()),
        }
        try:
            msgspec.convert(made, ApiKey)
        except msgspec.ValidationError as problem:
            raise errors.InvalidArgument(" ".join(refused(problem, ApiKey))) from None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = self._folder / f"{name}.new"
        lines = (f"{field} = {msgspec.json.encode(value).decode()}\n" for field, value in made.items())
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._folder / (name + SUFFIX))
        return key

    def revoke(self, name: str) -> None:
        """Raises NoSuchKey."""
        path = next((file for file in self._folder.glob("*" + SUFFIX) if file.stem == name), None)
        if path is None:
            raise errors.NoSuchKey(f"there is no key {name!r}", hint="llsh key api list")
        path.unlink()

    def _refresh(self) -> None:
        if (now := time.monotonic()) < self._look_at:
            return
        self._look_at = now + REFRESH_S
        files = sorted(self._folder.glob("*" + SUFFIX)) if self._folder.is_dir() else []
        stamp = [(file.name, file.stat().st_mtime_ns) for file in files]
        if stamp == self._stamp:
            return
        self._stamp, self._by_hash = stamp, {}
        for file in files:
            try:
                found = msgspec.convert(tomllib.loads(file.read_text()), ApiKey)
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as problem:
                self.problems.append(f"{file.name} lets nobody in: {type(problem).__name__}")
                continue
            self._by_hash[found.sha256] = found
