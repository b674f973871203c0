"""Which LoRA adapters are resident beside a model: asked for by processes, loaded once their model is there,
unloaded when many lie idle. Callers wait in `adapter.waiters` and are told once; what keeps the model away
they are told by `residency.tell`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmasos.drivers import base
from llmasos.syscalls import errors

from . import residency, swapping
from .effects import ToWorker

if TYPE_CHECKING:
    from .devices import Pool, Ready
    from .loop import Kernel
    from .modelfs.manifest import Manifest

MOST_IDLE = 16
"""So many adapters of a model stay loaded that no process has."""


@dataclass(slots=True, eq=False)
class Adapter:
    """An adapter of a pool's model. `number` is what its worker calls it; `asked`: it was told to load it."""

    model: str
    digest: str
    files: dict[str, base.File]
    number: int
    loaded: bool = False
    asked: bool = False
    deaths: int = 0
    waiters: list[Ready] = field(default_factory=list)


def adapter_for(kernel: Kernel, pool: Pool, manifest: Manifest) -> Adapter:
    """The adapter of a pool's model, loaded or not."""
    files = kernel.store.driver_files(manifest)
    for adapter in pool.adapters:
        if adapter.files == files:  # whatever its names are
            return adapter
    adapter = Adapter(manifest.name, manifest.digest, files, next(kernel.numbers))
    pool.adapters.append(adapter)
    return adapter


def when_ready(kernel: Kernel, pool: Pool, adapter: Adapter | None, ready: Ready) -> None:
    """Tells `ready` when a model, with its adapter if it is one, is resident or cannot be: now, if it is."""
    if adapter is None or (pool.ready and adapter.loaded):
        pool.when_ready(ready)
        return
    if pool.adapters[-1] is not adapter:  # those asked for last are kept longest
        pool.adapters.remove(adapter)
        pool.adapters.append(adapter)
    adapter.waiters.append(ready)
    load(kernel, pool)


def forgo(pool: Pool, adapter: Adapter | None, ready: Ready) -> None:
    """`ready` does not want to be told any more."""
    waiters = adapter.waiters if adapter else pool.waiters
    if ready in waiters:
        waiters.remove(ready)


def load(kernel: Kernel, pool: Pool) -> None:
    """Has those loaded that somebody wants, and those unloaded that nobody has wanted for long."""
    device = kernel.devices[pool.device_name]
    if not pool.adapters or not pool.ready or device.worker is None:
        return
    used = {process.adapter for process in pool.processes if process.exit is None}
    idle = [one for one in pool.adapters if one not in used and not one.waiters]
    for adapter in idle[: max(0, len(idle) - MOST_IDLE)]:
        pool.adapters.remove(adapter)
        if adapter.asked:
            kernel.effects.append(ToWorker(device.worker, base.UnloadAdapter(pool.handle, adapter.number)))
    for adapter in pool.adapters:
        if not adapter.asked and (adapter in used or adapter.waiters):
            _ask(kernel, pool, adapter)


def _ask(kernel: Kernel, pool: Pool, adapter: Adapter) -> None:
    device = kernel.devices[pool.device_name]

    def answered(answer: base.Moved | errors.LLMasOSError) -> None:
        if isinstance(answer, base.Moved):
            adapter.loaded, adapter.deaths = True, 0
            kernel.log.info(f"{device.name}: {adapter.model} loaded, {answer.bytes / 1e6:.1f} MB")
            for process in pool.processes:
                if process.adapter is adapter:
                    pool.queue.touch(process)
            tell(adapter, None)
            return
        adapter.deaths += 1
        # A worker that died may not have died of this: it is asked for again when the model is back.
        if device.worker is not None or adapter.deaths >= kernel.config.crash_limit:
            _give_up(kernel, pool, adapter, answer)

    adapter.asked = True
    ticket = next(kernel.numbers)
    order = base.LoadAdapter(ticket, pool.handle, adapter.number, adapter.files)
    swapping.order(kernel, device, order, answered)


def _give_up(kernel: Kernel, pool: Pool, adapter: Adapter, error: errors.LLMasOSError) -> None:
    """It cannot be had: everybody who wanted it is told why."""
    kernel.log.warn(f"{pool.device_name}: {adapter.model} cannot be loaded: {error}")
    if adapter in pool.adapters:
        pool.adapters.remove(adapter)
    residency.end_processes(kernel, [p for p in pool.processes if p.adapter is adapter], error)
    tell(adapter, error)


def tell(adapter: Adapter, error: errors.LLMasOSError | None) -> None:
    waiters, adapter.waiters = adapter.waiters, []
    for ready in waiters:
        ready(error)
