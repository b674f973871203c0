"""What a caller may see of the machine at one moment."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from llmasos.syscalls import table
from llmasos.syscalls import types as t

from .callers import Caller


@dataclass(frozen=True, slots=True)
class Picture:
    """`more`: there are processes with higher pids, too."""

    processes: list[t.ProcessInfo]
    more: bool
    devices: list[t.DeviceInfo]
    quotas: list[t.QuotaInfo]

    @classmethod
    async def of(cls, caller: Caller) -> Picture:
        """Raises what the kernel answers."""
        ps, lsdev, quotas = await asyncio.gather(
            caller.aio.call(table.Ps()), caller.aio.call(table.Lsdev()), caller.aio.call(table.Quotas())
        )
        return cls(ps.processes, ps.more, lsdev.devices, quotas.quotas)

    def pools(self) -> list[dict[str, Any]]:
        """KV memory in blocks, a row for each model on each device. `owners`: what processes that the caller
        sees hold of it; blocks that processes share count for each of them. The rest that is in use is
        others' and the prefix cache's."""
        held: Counter[tuple[str, str, str]] = Counter()
        for process in self.processes:
            if process.blocks:
                held[process.device, process.model, process.owner] += process.blocks
        return [
            {
                "device": device.name,
                "model": pool.model,
                "dtype": pool.dtype,
                "kv_dtype": pool.kv_dtype,
                "engine": pool.engine,
                "weights_bytes": pool.weights_bytes,
                "block_bytes": pool.block_bytes,
                "total": pool.blocks_total,
                "used": pool.blocks_total - pool.blocks_free,
                "processes": pool.processes,
                "owners": {
                    owner: blocks
                    for (at, model, owner), blocks in sorted(held.items())
                    if (at, model) == (device.name, pool.model)
                },
            }
            for device in self.devices
            for pool in device.pools
        ]
