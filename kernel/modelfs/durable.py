"""Files and renames that survive a power cut, and the removal of large files."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

LARGE = 64 << 20
"""Bytes of a file whose blocks take the filesystem long to give back."""


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, mode 0600, that is on the disk when this returns. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Makes renames into `folder` survive a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Removes a file. Of a large one the name goes at once, and its blocks when a thread closes it: those of
    a gigabyte take a fifth of a second, in which the kernel would serve nobody. Raises OSError."""
    fd = -1
    with suppress(OSError):  # a link to what is gone cannot be opened
        fd = os.open(path, os.O_RDONLY)
    try:
        path.unlink()
    finally:
        if fd >= 0 and os.fstat(fd).st_size >= LARGE:
            threading.Thread(target=os.close, args=(fd,), daemon=True).start()
        elif fd >= 0:
            os.close(fd)
