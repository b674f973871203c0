"""Which model is resident on which device: loading, making room, giving up.

A pool is asked for by `pool_for`, loaded by the loop when the device is free, and stays resident until
another model needs its room. Callers wait in `pool.waiters` and are told once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from llmasos.drivers import base
from llmasos.syscalls import errors

from . import adapters, watchdog
from .devices import Device, Pool
from .effects import ToWorker
from .memory import Memory
from .process import Exit, Process
from .runqueue import RunQueue

if TYPE_CHECKING:
    from .loop import Kernel
    from .modelfs.manifest import Manifest

ATTACH_TIMEOUT_S = 120.0
"""How long a model may wait for its device's worker before its callers are told."""


def place(
    kernel: Kernel, manifest: Manifest, device_name: str, dtype: str
) -> tuple[Pool, adapters.Adapter | None]:
    """Where a model is to run: the pool, and what of it the model is, if it is an adapter of the pool's.
    Raises NoSuchModel, NoSuchDevice."""
    if not manifest.base:
        return pool_for(kernel, manifest, device_name, dtype), None
    pool = pool_for(kernel, kernel.store.base_of(manifest), device_name, dtype)
    return pool, adapters.adapter_for(kernel, pool, manifest)


def pool_for(kernel: Kernel, manifest: Manifest, device_name: str, dtype: str) -> Pool:
    """The pool for a model that is no adapter, resident, loading, or new. Raises NoSuchDevice, DeviceFault
    when its loads have hung there."""
    device = device_for(kernel, device_name)
    files = kernel.store.driver_files(manifest)
    for pool in device.pools:
        # Asked for nothing, a device chooses by the files alone, so it would choose the same again.
        same_dtype = pool.dtype == dtype or (pool.loaded is not None and pool.loaded.dtype == dtype)
        # A secret of one tenant must not show as that of another.
        apart = pool.owner and manifest.owner not in ("", pool.owner)
        if pool.files == files and same_dtype and not apart:  # whatever its names are
            if pool.owner and not manifest.owner:  # from now on by the name that everybody sees
                pool.model, pool.digest, pool.owner = manifest.name, manifest.digest, ""
            return pool
    if (hangs := device.hangs[manifest.digest]) >= kernel.config.crash_limit:
        raise errors.DeviceFault(
            f"loading {manifest.name} has hung {device.name} {hangs} times",
            hint="see `llsh dmesg`; the daemon tries again when it has been started again",
        )
    pool = Pool(
        next(kernel.numbers),
        manifest.name,
        manifest.digest,
        dtype,
        device.name,
        manifest.owner,
        files,
        wanted_since=kernel.now(),
        queue=RunQueue(device.shares, kernel.now),
    )
    device.pools.append(pool)
    expect_worker(kernel, device, pool)
    return pool


def expect_worker(kernel: Kernel, device: Device, pool: Pool) -> None:
    """Gives the device's worker so long to attach, from now."""
    pool.wanted_since = kernel.now()
    kernel.at(kernel.now() + ATTACH_TIMEOUT_S, lambda: attach_overdue(kernel, device, pool))


def device_for(kernel: Kernel, name: str) -> Device:
    """The named device, or the best one that is up. Raises NoSuchDevice."""
    if not name:
        up = [d for d in kernel.devices.values() if d.worker is not None] or list(kernel.devices.values())
        # Accelerators are named after the cpu in the list, and preferred.
        return up[-1]
    if name not in kernel.devices:
        raise errors.NoSuchDevice(f"no device {name!r}", hint=f"there are: {', '.join(kernel.devices)}")
    return kernel.devices[name]


def attach_overdue(kernel: Kernel, device: Device, pool: Pool) -> None:
    """Tells those who wait for a device that has no worker that it does not come."""
    if device.worker is None and pool.awaited and pool in device.pools:
        overdue = kernel.now() - pool.wanted_since
        if overdue < ATTACH_TIMEOUT_S:
            kernel.at(kernel.now() + ATTACH_TIMEOUT_S - overdue, lambda: attach_overdue(kernel, device, pool))
            return
        gone = errors.DeviceUnavailable(f"{device.name} has no worker", hint="see `llsh dmesg`")
        give_up(kernel, device, pool, gone)


def load(kernel: Kernel, device: Device, pool: Pool) -> None:
    """Asks the worker to make the pool resident."""
    assert device.worker is not None
    device.loading = pool
    spec = base.LoadSpec(
        pool.handle,
        pool.files,
        pool.dtype,
        kernel.config.kv_fraction,
        kernel.config.kv_dtype,
        str(kernel.store.derived),
    )
    kernel.effects.append(ToWorker(device.worker, base.Load(spec)))
    watchdog.loading(kernel, device, pool)


def adopt(kernel: Kernel, device: Device, residents: list[base.Resident]) -> None:
    """A worker attached that outlived an earlier kernel: what it has resident need not be loaded again. The
    contexts in it are forgotten. What does not fit the configuration any more, or has no name, is
    unloaded."""
    assert device.worker is not None
    if not residents:
        return
    # Its handles were another kernel's: nothing of ours may be called the same.
    used = max(number for resident in residents for number in (resident.spec.handle, *resident.adapters))
    kernel.numbers = itertools.count(max(next(kernel.numbers), used + 1))
    for pool in device.pools:
        pool.handle = next(kernel.numbers)
        for adapter in pool.adapters:
            adapter.number = next(kernel.numbers)
    config, files = kernel.config, kernel.store.driver_files
    for resident in residents:
        spec, loaded = resident.spec, resident.loaded
        manifest = kernel.store.find(lambda manifest, spec=spec: files(manifest) == spec.files)  # type: ignore[misc]
        same = (spec.kv_fraction, spec.kv_dtype) == (config.kv_fraction, config.kv_dtype)
        if manifest is None or not same:
            kernel.effects.append(ToWorker(device.worker, base.Unload(spec.handle)))
            continue
        pool = pool_for(kernel, manifest, device.name, spec.dtype)
        pool.handle, pool.loaded, pool.memory = spec.handle, loaded, Memory(loaded.blocks)
        pool.closes = list(resident.sequences)
        for number in resident.adapters:  # as the contexts; who wants one has it loaded
            kernel.effects.append(ToWorker(device.worker, base.UnloadAdapter(spec.handle, number)))
        kernel.log.info(f"{device.name}: {pool.model} is resident already")
        tell(pool, None)
        adapters.load(kernel, pool)


def load_done(kernel: Kernel, device: Device, pool: Pool, done: base.LoadDone) -> None:
    """The pool is resident: its processes may run."""
    device.loading = None
    device.memory_free = done.memory_free
    pool.loaded = done.loaded
    pool.memory = Memory(done.loaded.blocks)
    kernel.log.info(f"{device.name}: model {pool.handle} is {pool.model}, ready for its processes")
    kernel.fail_what_never_fits()  # it may have come back smaller
    tell(pool, None)
    adapters.load(kernel, pool)


def load_failed(kernel: Kernel, device: Device, pool: Pool, error: errors.LLMasOSError) -> None:
    """Makes room by unloading idle models and tries once more; then gives up."""
    device.loading = None
    idle = [p for p in device.pools if p.ready and not p.processes]
    if isinstance(error, errors.NeverFits | errors.DeviceFault) and idle and not pool.retried:
        pool.retried = True
        for other in idle:
            unload(kernel, device, other)
        return
    give_up(kernel, device, pool, error)


def unload(kernel: Kernel, device: Device, pool: Pool) -> None:
    assert device.worker is not None
    device.pools.remove(pool)
    kernel.effects.append(ToWorker(device.worker, base.Unload(pool.handle)))
    kernel.log.info(f"{device.name}: {pool.model} unloaded to make room")


def give_up(kernel: Kernel, device: Device, pool: Pool, error: errors.LLMasOSError) -> None:
    """The pool cannot be had: everybody who wanted it is told why."""
    kernel.log.warn(f"{device.name}: {pool.model} cannot be loaded: {error}")
    if pool in device.pools:
        device.pools.remove(pool)
    end_processes(kernel, list(pool.processes), error)
    tell(pool, error)


def end_processes(kernel: Kernel, processes: list[Process], error: errors.LLMasOSError) -> None:
    """The model of these processes cannot be had."""
    for process in [p for p in processes if p.beam_of is None]:
        kernel.fail(process, error)
        if process.exit is None and process in process.pool.processes:
            kernel.processes.end(process, Exit(1, f"its model cannot be loaded: {type(error).__name__}"))


def tell(pool: Pool, error: errors.LLMasOSError | None) -> None:
    waiters, pool.waiters = pool.waiters, []
    for ready in waiters:
        ready(error)
    if error is not None:
        for adapter in pool.adapters:
            adapters.tell(adapter, error)
