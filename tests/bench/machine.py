"""What this machine is and what it can do at most, measured now.

With a compiler: roofline.cpp. Without: numpy's sum for the bandwidth, and no computing peaks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from pathlib import Path

import numpy

SOURCE = Path(__file__).parent / "roofline.cpp"


def describe() -> str:
    """Processor, cores and memory in a line."""
    name = platform.machine()
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    known = ["amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2"]
    features = " ".join(flag for flag in known if flag in flags)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {name} ({features or 'no vector extensions known'}), {memory:.0f} GiB"


def limits(cache: Path, threads: int) -> dict[str, float]:
    """read_1 and read_n in bytes a second (one thread, all), int8, bf16, fp32 in operations a second, 0
    where unknown."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return _numpy_limits(threads)
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    program = cache / f"roofline-{digest}"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
    output = subprocess.run([str(program), str(threads)], check=True, capture_output=True).stdout
    return {key: float(value) for key, value in json.loads(output).items()}


def _numpy_limits(threads: int) -> dict[str, float]:
    data = [numpy.ones(2**25) for _ in range(threads)]

    def rate(count: int) -> float:
        best = 0.0
        for _ in range(10):
            workers = [threading.Thread(target=one.max) for one in data[:count]]
            begun = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            best = max(best, count * data[0].nbytes / (time.perf_counter() - begun))
        return best

    peaks = {"int8": 0.0, "bf16": 0.0, "fp32": 0.0}
    return {"read_1": rate(1), "read_n": rate(threads), "threads": float(threads)} | peaks


if __name__ == "__main__":
    print(describe())
    print(json.dumps(limits(Path("/tmp"), os.cpu_count() or 1)))
