"""CURVE key pairs in files: TOML, `public` and `secret` in hexadecimal, mode 0600. Makes no keys."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import msgspec

from . import errors
from .types import PublicKey


class KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public: PublicKey
    secret: PublicKey


def read_pair(path: Path) -> KeyPair:
    """Raises NoSuchFile, Corrupt, and PermissionDenied when others could have read the secret."""
    try:
        if path.stat().st_mode & 0o077:
            raise errors.PermissionDenied(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return msgspec.convert(tomllib.loads(path.read_text()), KeyPair)
    except FileNotFoundError:
        raise errors.NoSuchFile(f"there is no key in {path}", hint="`llsh key new` makes one") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError):
        raise errors.Corrupt(f"{path} does not hold a key pair") from None


def write_pair(path: Path, pair: KeyPair) -> None:
    """Raises AlreadyExists: a key is never written over."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise errors.AlreadyExists(f"{path} holds a key already", hint="move it away first") from None
    try:
        with open(fd, "w") as file:
            file.write(f'public = "{pair.public}"\nsecret = "{pair.secret}"\n')
            file.flush()
            os.fsync(fd)
    except OSError:
        path.unlink()  # half a pair would keep a whole one away
        raise
