"""Where KV lies that is not in a device's memory: the folders, their limits, and the files in them.

The first tier is a folder in the host's memory (tmpfs), the second one on the disk. Files of both are worth
nothing to the next kernel and are swept. Never opens a file: workers write and read them (kv_file.py).
A KvFile is shared by reference count: by the processes whose context it holds, and by each move under way.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmasos.drivers.base import KvStamp

SPARE = 8 << 10
"""Bytes that a file may have beside its blocks and their hashes."""

HASH = 32
"""Bytes of a block's hash."""


@dataclass(slots=True)
class Tier:
    """A folder and how many bytes it may hold."""

    folder: Path
    limit: int
    used: int = 0


@dataclass(slots=True, eq=False)
class KvFile:
    """The KV of one context. The same worker may be asked for it as soon as the order to write it is sent,
    others when it is `ready`. `blocks` are those that it was written from, by the order `ticket`."""

    path: Path
    tier: Tier | None
    size: int
    stamp: KvStamp
    blocks: frozenset[int]
    ticket: int
    ready: bool = False
    foreign: bool = False  # it is another device that writes it
    holders: int = 1

    @property
    def available(self) -> bool:
        """Whether the device of those who hold it may be asked to read it."""
        return self.ready or not self.foreign

    def share(self) -> KvFile:
        self.holders += 1
        return self

    def release(self) -> None:
        """One holder less; nobody's file is removed."""
        self.holders -= 1
        if self.holders == 0:
            if self.tier is not None:
                self.tier.used -= self.size
            with suppress(OSError):  # what is left is swept at boot
                os.unlink(self.path)

    def written(self, size: int) -> None:
        """It is complete, with `size` bytes."""
        if self.tier is not None:
            self.tier.used += size - self.size
        self.size = size
        self.ready = True


@dataclass(slots=True)
class Tiers:
    """The folders in the order in which they are filled."""

    tiers: list[Tier] = field(default_factory=list)

    def room(self, blocks: int, block_bytes: int) -> Tier | None:
        """The first tier that takes a file of so many blocks."""
        size = file_size(blocks, block_bytes)
        fitting = (tier for tier in self.tiers if tier.used + size <= tier.limit)
        return next((tier for tier in fitting if _is_ours(tier.folder)), None)

    def sweep(self) -> None:
        """Removes the files and the folders: at boot what an earlier kernel left, at the end what is
        there."""
        for tier in self.tiers:
            with suppress(OSError):
                for left in tier.folder.iterdir():
                    left.unlink()
                tier.folder.rmdir()

    def create(
        self, tier: Tier, block_bytes: int, stamp: KvStamp, blocks: Iterable[int], ticket: int
    ) -> KvFile:
        """A file that a worker is about to write; its bytes are taken now."""
        held = frozenset(blocks)
        size = file_size(len(held), block_bytes)
        tier.used += size
        return KvFile(tier.folder / f"{ticket}.kv", tier, size, stamp, held, ticket)


def file_size(blocks: int, block_bytes: int) -> int:
    """Bytes of a file of so many blocks, at most."""
    return blocks * (block_bytes + HASH) + SPARE


def open_tiers(host: Path | None, disk: Path, host_bytes: int, disk_bytes: int) -> Tiers:
    """Sweeps the folders, and leaves out a tier without one or with a limit of 0."""
    wanted = [(host, host_bytes), (disk, disk_bytes)]
    tiers = Tiers([Tier(folder, limit) for folder, limit in wanted if folder and limit])
    tiers.sweep()
    return tiers


def host_folder(home: Path) -> Path | None:
    """The folder in the host's memory that belongs to the daemon of `home`; None where there is no tmpfs."""
    shared = Path("/dev/shm")
    mark = hashlib.blake2b(os.fsencode(home.resolve()), digest_size=6).hexdigest()
    return shared / f"llmasos-{os.getuid()}-{mark}" if os.access(shared, os.W_OK | os.X_OK) else None


def _is_ours(folder: Path) -> bool:
    """Makes `folder`, mode 0700, if it is missing. Whether nobody else can have to do with it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
