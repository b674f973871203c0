"""What this machine is: cores, names, the memory that is really free; and whose process this one is."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> bool:
    """This process is killed when the thread that started it ends (Linux). False: `parent` (0: whoever it is)
    was dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return parent in (0, os.getppid())


def cores() -> list[int]:
    """A processor of each core that this process may use; hyper-threads share a core."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(psutil.cpu_count(logical=False) or 1))
    found: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            core = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            core = str(cpu)
        found.setdefault(core, cpu)
    return list(found.values())[: psutil.cpu_count(logical=False)]


def physical_cores() -> int:
    """Cores that this process may use; hyper-threads do not count."""
    return len(cores())


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; elsewhere float32 is faster and better."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    words = set(flags.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def memory() -> tuple[int, int]:
    """(total, free) bytes. A container's limit counts as the machine's memory."""
    found = psutil.virtual_memory()
    total, free = int(found.total), int(found.available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and used is not None and limit < total:
        total, free = limit, min(free, max(0, limit - used))
    return total, free


def _cgroup_number(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):
        return None
