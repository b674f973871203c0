"""The file tree that `ls`, `stat` and `read` show: /models is the model filesystem's, /sessions
has the caller's own snapshots, /proc is the kernel's.

/proc/PID/tokens is a process's context as packed u32, /proc/uptime the seconds since boot. /proc/flight, the
administrator's, is the newest part of the flight recorder (JSON lines), as much as one read brings.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llmasos.syscalls import errors
from llmasos.syscalls.table import DfReply
from llmasos.syscalls.types import FileInfo, FileKind, pack_tokens

from .modelfs import session_files
from .tenants import Subject

if TYPE_CHECKING:
    from .loop import Kernel

# Replies wait in the socket's queue until they are read; this bounds what a client that only asks can take.
MAX_READ = 128 * 1024

FLIGHT = "/proc/flight"
UPTIME = "/proc/uptime"


def _proc_pid(path: str) -> int | None:
    """PID of a path below /proc/PID, None for others."""
    parts = path.strip("/").split("/")
    if (
        len(parts) >= 2
        and parts[0] == "proc"
        and parts[1].isascii()
        and parts[1].isdecimal()
        and len(parts[1]) < 16
    ):
        return int(parts[1])
    return None


def _is_proc(path: str) -> bool:
    return path.strip("/").split("/")[0] == "proc"


def ls(kernel: Kernel, subject: Subject, path: str) -> list[FileInfo]:
    """The entries of a folder. Raises NoSuchFile."""
    if path.strip("/") == "":
        return [FileInfo(f"/{name}", FileKind.FOLDER, 0) for name in ("models", "sessions", "proc")]
    if (snapshot := session_files.parse_path(path)) is not None:
        sessions = kernel.store.sessions
        return [sessions.stat(subject.path, snapshot)] if snapshot else sessions.ls(subject.path)
    if not _is_proc(path):
        return kernel.store.ls(path)
    if path.strip("/") == "proc":
        pids = [p.pid for p in kernel.processes if p.beam_of is None and subject.may_command(p.owner)]
        own = [UPTIME, *([FLIGHT] if subject.admin else [])]
        return [stat(kernel, subject, path) for path in own] + [
            FileInfo(f"/proc/{pid}", FileKind.FOLDER, 0) for pid in pids
        ]
    pid = _proc_pid(path)
    if pid is None or len(path.strip("/").split("/")) != 2:
        raise errors.NoSuchFile(f"no folder {path}", hint="see `llsh ls /proc`")
    kernel.processes.find(pid, subject)
    return [stat(kernel, subject, f"/proc/{pid}/tokens")]


def stat(kernel: Kernel, subject: Subject, path: str) -> FileInfo:
    """One entry. Raises NoSuchFile, NoSuchProcess."""
    clean = path.strip("/")
    if clean in ("", "proc", "models", "sessions"):
        return FileInfo(f"/{clean}", FileKind.FOLDER, 0)
    if snapshot := session_files.parse_path(path):
        return kernel.store.sessions.stat(subject.path, snapshot)
    if not _is_proc(path):
        return kernel.store.stat(path)
    pid = _proc_pid(path)
    if pid is not None and clean == f"proc/{pid}":
        kernel.processes.find(pid, subject)
        return FileInfo(f"/{clean}", FileKind.FOLDER, 0)
    return FileInfo(f"/{clean}", FileKind.FILE, len(_content(kernel, subject, path)))


def read(kernel: Kernel, subject: Subject, path: str, offset: int, length: int) -> tuple[int, bytes]:
    """(size of the file, up to `length` bytes from `offset`). Raises NoSuchFile, NoSuchProcess."""
    length = min(length, MAX_READ)
    if session_files.parse_path(path) is not None:
        raise errors.InvalidArgument(
            "a snapshot is restored, not read", hint="llsh restore NAME", field="path"
        )
    if not _is_proc(path):
        return kernel.store.read(path, offset, length)
    data = _content(kernel, subject, path)
    return len(data), data[offset : offset + length]


def _content(kernel: Kernel, subject: Subject, path: str) -> bytes:
    if path.strip("/") == UPTIME.strip("/"):
        return f"{kernel.now():.6f}\n".encode()
    if subject.admin and path.strip("/") == FLIGHT.strip("/"):
        return kernel.recorder.text(MAX_READ)
    pid = _proc_pid(path)
    if pid is None or path.strip("/") != f"proc/{pid}/tokens":
        raise errors.NoSuchFile(f"no file {path}", hint="see `llsh ls /proc`")
    return pack_tokens(kernel.processes.find(pid, subject).tokens)


def df(kernel: Kernel) -> DfReply:
    disk = os.statvfs(kernel.store.folder)
    models_bytes, blobs = kernel.store.usage()
    return DfReply(
        home=str(kernel.store.folder),
        disk_total=disk.f_blocks * disk.f_frsize,
        disk_free=disk.f_bavail * disk.f_frsize,
        models_bytes=models_bytes,
        blobs=blobs,
        sessions_bytes=kernel.store.sessions.usage(),
        pools=[pool.info() for device in kernel.devices.values() for pool in device.pools],
    )
