"""A client's keys for daemons on tcp: its own pair, and the public keys of the daemons that it trusts.

    keys/client.key    the pair, mode 0600
    keys/daemons.toml  "tcp://host:5570" = "<64 hexadecimal digits>"

Both lie beside the configuration (`syscalls/address.py`). A daemon's key is never learned from the network.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
from llmasos.syscalls import address as addresses
from llmasos.syscalls import errors
from llmasos.syscalls.keys import KeyPair, read_pair, write_pair
from llmasos.syscalls.types import PublicKey
from zmq.utils import z85


def pair_file() -> Path:
    return addresses.keys_folder() / "client.key"


def daemons_file() -> Path:
    return addresses.keys_folder() / "daemons.toml"


def own_pair() -> KeyPair:
    """Raises NoSuchFile when there is none yet, PermissionDenied when others could have read it."""
    return read_pair(pair_file())


def make_pair() -> KeyPair:
    """A new pair. Raises AlreadyExists."""
    public, secret = (z85.decode(key).hex() for key in zmq.curve_keypair())
    pair = KeyPair(public, secret)
    write_pair(pair_file(), pair)
    return pair


def daemon_key(address: str) -> str:
    """The public key of the daemon at `address`. Raises NoSuchKey."""
    key = _daemons().get(address)
    if key is None:
        raise errors.NoSuchKey(
            f"the key of the daemon at {address} is not known",
            hint=f"`llsh key list` there tells it; then here: llsh key trust {address} KEY",
        )
    return key


def trust(address: str, key: str) -> None:
    """Takes `key` for that of the daemon at `address` from now on. Raises InvalidArgument."""
    try:
        msgspec.convert(key, PublicKey)
    except msgspec.ValidationError:
        raise errors.InvalidArgument("a key has 64 hexadecimal digits", field="key") from None
    if not address.startswith("tcp://") or any(letter in address for letter in '"\\\n'):
        raise errors.InvalidArgument(f"{address!r} is no tcp:// address", field="address")
    daemons = {**_daemons(), address: key}
    path = daemons_file()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text("".join(f'"{where}" = "{known}"\n' for where, known in sorted(daemons.items())))
    os.replace(unfinished, path)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a connection on tcp needs: the daemon's public key and our pair."""

    daemon: str
    own: KeyPair

    def secure(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, bytes.fromhex(self.daemon))
        socket.setsockopt(zmq.CURVE_PUBLICKEY, bytes.fromhex(self.own.public))
        socket.setsockopt(zmq.CURVE_SECRETKEY, bytes.fromhex(self.own.secret))


def credentials(address: str) -> Credentials | None:
    """For the daemon at `address`; None: a local one needs none.

    Raises NoSuchFile, NoSuchKey, PermissionDenied.
    """
    return Credentials(daemon_key(address), own_pair()) if address.startswith("tcp://") else None


def _daemons() -> dict[str, str]:
    path = daemons_file()
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), dict[str, PublicKey])
    except FileNotFoundError:
        return {}
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError):
        raise errors.Corrupt(f"{path} is not a list of daemons and keys") from None
