"""The file tree that `ls`, `stat` and `read` show: /models is the model filesystem's, /sessions and /datasets
have what is the caller's own, /proc is the kernel's.

/proc/PID/tokens is a process's context as packed u32, /proc/PID/metrics (JSON lines) what one that trains
has told, /proc/uptime the seconds since boot. /proc/flight, the
administrator's, is the newest part of the flight recorder (JSON lines), as much as one read brings.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llmasos.syscalls import errors
from llmasos.syscalls.table import DfReply
from llmasos.syscalls.types import FileInfo, FileKind, pack_tokens

from .modelfs import dataset_files, session_files
from .quotas import RETRY_S, exceeded
from .tenants import Subject

if TYPE_CHECKING:
    from .loop import Kernel

# Replies wait in the socket's queue until they are read; this bounds what a client that only asks can take.
MAX_READ = 128 * 1024

TOP = ("models", "sessions", "datasets", "proc")
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
        return [FileInfo(f"/{name}", FileKind.FOLDER, 0) for name in TOP]
    if (dataset := dataset_files.parse_path(path)) is not None:
        mine = kernel.store.datasets
        return [mine.stat(subject.path, dataset)] if dataset else mine.ls(subject.path)
    if (snapshot := session_files.parse_path(path)) is not None:
        sessions = kernel.store.sessions
        return [sessions.stat(subject.path, snapshot)] if snapshot else sessions.ls(subject.path)
    if not _is_proc(path):
        return kernel.store.ls(path, subject.may_command)
    if path.strip("/") == "proc":
        pids = [p.pid for p in kernel.processes if p.beam_of is None and subject.may_command(p.owner)]
        own = [UPTIME, *([FLIGHT] if subject.admin else [])]
        return [stat(kernel, subject, path) for path in own] + [
            FileInfo(f"/proc/{pid}", FileKind.FOLDER, 0) for pid in pids
        ]
    pid = _proc_pid(path)
    if pid is None or len(path.strip("/").split("/")) != 2:
        raise errors.NoSuchFile(f"no folder {path}", hint="see `llsh ls /proc`")
    process = kernel.processes.find(pid, subject)
    name = "metrics" if process.run else "tokens"
    return [stat(kernel, subject, f"/proc/{pid}/{name}")]


def stat(kernel: Kernel, subject: Subject, path: str) -> FileInfo:
    """One entry. Raises NoSuchFile, NoSuchProcess."""
    clean = path.strip("/")
    if clean in ("", *TOP):
        return FileInfo(f"/{clean}", FileKind.FOLDER, 0)
    if dataset := dataset_files.parse_path(path):
        return kernel.store.datasets.stat(subject.path, dataset)
    if snapshot := session_files.parse_path(path):
        return kernel.store.sessions.stat(subject.path, snapshot)
    if not _is_proc(path):
        return kernel.store.stat(path, subject.may_command)
    pid = _proc_pid(path)
    if pid is not None and clean == f"proc/{pid}":
        kernel.processes.find(pid, subject)
        return FileInfo(f"/{clean}", FileKind.FOLDER, 0)
    size, _ = read(kernel, subject, path, 0, 0)
    return FileInfo(f"/{clean}", FileKind.FILE, size)


def read(kernel: Kernel, subject: Subject, path: str, offset: int, length: int) -> tuple[int, bytes]:
    """(size of the file, up to `length` bytes from `offset`). Raises NoSuchFile, NoSuchProcess."""
    length = min(length, MAX_READ)
    if session_files.parse_path(path) is not None:
        raise errors.InvalidArgument(
            "a snapshot is restored, not read", hint="llsh restore NAME", field="path"
        )
    if dataset := dataset_files.parse_path(path):
        return kernel.store.datasets.read(subject.path, dataset, offset, length)
    if not _is_proc(path):
        return kernel.store.read(path, offset, length, subject.may_command)
    if (pid := _metrics_of(kernel, subject, path)) is not None:
        return kernel.store.runs.metrics(pid, offset, length)
    data = _content(kernel, subject, path)
    return len(data), data[offset : offset + length]


def _metrics_of(kernel: Kernel, subject: Subject, path: str) -> int | None:
    """PID of /proc/PID/metrics if that one trains, None for other paths. Raises NoSuchProcess."""
    pid = _proc_pid(path)
    if pid is None or path.strip("/") != f"proc/{pid}/metrics":
        return None
    return pid if kernel.processes.find(pid, subject).run is not None else None


def _content(kernel: Kernel, subject: Subject, path: str) -> bytes:
    if path.strip("/") == UPTIME.strip("/"):
        return f"{kernel.now():.6f}\n".encode()
    if subject.admin and path.strip("/") == FLIGHT.strip("/"):
        return kernel.recorder.text(MAX_READ)
    pid = _proc_pid(path)
    if pid is not None and path.strip("/") == f"proc/{pid}/tokens":
        return pack_tokens(kernel.processes.find(pid, subject).tokens)
    raise errors.NoSuchFile(f"no file {path}", hint="see `llsh ls /proc`")


def df(kernel: Kernel, subject: Subject) -> DfReply:
    disk = os.statvfs(kernel.store.folder)
    models_bytes, blobs = kernel.store.usage()
    return DfReply(
        home=str(kernel.store.folder),
        disk_total=disk.f_blocks * disk.f_frsize,
        disk_free=disk.f_bavail * disk.f_frsize,
        models_bytes=models_bytes,
        blobs=blobs,
        sessions_bytes=kernel.store.sessions.usage(),
        pools=[pool.info(subject.may_command) for device in kernel.devices.values() for pool in device.pools],
    )


def room_on_disk(kernel: Kernel, owner: str, size: int) -> None:
    """Raises QuotaExceeded when so many bytes more are too much for an owner."""
    for path, limit in kernel.quotas.limits_of(owner):
        if limit.disk_bytes is not None and disk_used(kernel, path) + size > limit.disk_bytes:
            raise exceeded(path, "disk_bytes", limit.disk_bytes, RETRY_S)


def disk_used(kernel: Kernel, path: str) -> int:
    """Bytes on the disk of this owner and those below it: snapshots, models that they made, data sets, and
    what runs have in work. A run has its data set under a name of its own: files count once."""
    store = kernel.store
    files = [*store.datasets.kept(path), *store.runs.kept(path)]
    once = {(file.st_dev, file.st_ino): file.st_size for file in files}
    return store.sessions.used(path) + store.used(path) + sum(once.values())
