"""The memory that is really free, of the host and of CUDA devices."""

from __future__ import annotations

import torch

from .. import host
from ..host import computes_bfloat16, cpu_name, physical_cores

__all__ = ["computes_bfloat16", "cpu_name", "memory", "physical_cores"]


def memory(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes of `device`. A container's limit counts as the host's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch's allocator holds but does not use is free for us.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return total, free + cached
    return host.memory()
