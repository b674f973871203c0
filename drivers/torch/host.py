"""The host and its CUDA devices: what memory is really free, and what they compute well."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch
from llmasos.syscalls import errors

from .. import host
from ..host import computes_bfloat16, cpu_name, physical_cores

__all__ = ["cpu_name", "device_of", "end_if_lost", "memory", "multiplies_bfloat16", "physical_cores"]


def device_of(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `cuda:<n>`; CUDA computes there from now on. Raises NoSuchDevice."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise errors.NoSuchDevice(
            f"torch {torch.__version__} sees no {name}{_why_not()}",
            hint="use --device cpu, or a CUDA build of torch and a driver that is new enough for it",
        )
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)  # graphs and kernels go to the current device
    # cuDNN plans attention anew for each length it meets, and lengths are never the same.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _why_not() -> str:
    """Why CUDA does not start, in its own words."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as problem:  # the latter of builds without CUDA
        return f": {str(problem).partition(chr(10))[0][:200]}"
    return ""


def memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of `device`. A container's limit counts as the host's memory."""
    if device.type == "cuda":
        # What torch's allocator still holds after that is no use to others: gaps, and the pools of graphs.
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return host.memory()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32. CUDA devices before Ampere only emulate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return computes_bfloat16()


def end_if_lost(device: torch.device, problem: RuntimeError) -> None:
    """Ends this process if `problem` has broken its CUDA context, in which nothing can be computed any more.
    The kernel starts another worker, which computes again what was lost."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as broken:
        # CUDA's own words, which quote nobody.
        _end(f"worker of {device}: {type(problem).__name__}, {str(broken).partition(chr(10))[0]}; it ends")


def _end(why: str) -> NoReturn:
    print(why, file=sys.stderr, flush=True)
    os._exit(1)  # torch's own destructors would fail too
