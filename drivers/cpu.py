"""The cpu device: the native engine, and torch for what the engine cannot compute or cannot run on.

torch is imported when the first such model is loaded: a machine that only runs models of our own families
never pays for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from llmasos.syscalls import errors, garbage
from msgspec.structs import replace

from .base import Batch, Description, Driver, Encode, Encoded, File, Interrupt, Loaded, LoadSpec, StepResult
from .native.executor import NativeDriver
from .native.library import NoEngine

Note = Callable[[str, str], None]


class CpuDriver:
    """Routes each model to the driver that loaded it. `note` gets (level, text) for dmesg."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._native: NativeDriver | None = None
        self._why_not = ""
        try:
            self._native = NativeDriver(note)
        except NoEngine as problem:
            self._why_not = str(problem)
            note("warn", f"no native engine: {problem}; torch computes, several times slower")
        self._torch: Driver | None = None
        self._drivers: dict[int, Driver] = {}
        self._tickets: dict[int, Driver] = {}

    def describe(self) -> Description:
        if self._native is not None:
            return self._native.describe()
        found = self._fallback().describe()
        return replace(found, text=f"{found.text}; no native engine: {self._why_not}")

    def load(self, spec: LoadSpec) -> Loaded:
        self.unload(spec.handle)
        reason = self._why_not
        if self._native is not None:
            try:
                loaded = self._native.load(spec)
                self._drivers[spec.handle] = self._native
                return loaded
            except errors.UnsupportedModel as problem:
                reason = problem.message
        fallback = self._fallback()
        loaded = fallback.load(spec)
        self._drivers[spec.handle] = fallback
        if loaded.encodes:  # torch is what computes those best
            return loaded
        self._note(
            "warn", f"model {spec.handle}: torch computes it, for the native engine does not: {reason}"
        )
        return replace(loaded, engine=f"{loaded.engine}; not the native engine: {reason}")

    def unload(self, handle: int) -> None:
        if (driver := self._drivers.pop(handle, None)) is not None:
            driver.unload(handle)

    def load_adapter(self, handle: int, adapter: int, files: dict[str, File]) -> int:
        return self._driver(handle).load_adapter(handle, adapter, files)

    def unload_adapter(self, handle: int, adapter: int) -> None:
        self._driver(handle).unload_adapter(handle, adapter)

    def submit(self, batch: Batch) -> int:
        driver = self._tickets[batch.ticket] = self._driver(batch.handle)
        return driver.submit(batch)

    def collect(self, ticket: int, interrupt: Interrupt | None = None) -> StepResult:
        if (driver := self._tickets.pop(ticket, None)) is None:
            raise errors.DeviceFault(f"no step with ticket {ticket} was submitted")
        return driver.collect(ticket, interrupt)

    def encode(self, encode: Encode) -> Encoded:
        return self._driver(encode.handle).encode(encode)

    def export_blocks(self, handle: int, blocks: list[int]) -> bytes:
        return self._driver(handle).export_blocks(handle, blocks)

    def import_blocks(self, handle: int, blocks: list[int], data: bytes) -> None:
        self._driver(handle).import_blocks(handle, blocks, data)

    def close(self) -> None:
        self._drivers.clear()
        for driver in (self._native, self._torch):
            if driver is not None:
                driver.close()

    def _driver(self, handle: int) -> Driver:
        if (driver := self._drivers.get(handle)) is None:
            raise errors.DeviceFault(f"no model is loaded under handle {handle}")
        return driver

    def _fallback(self) -> Driver:
        if self._torch is None:
            # Read when torch loads its OpenMP. Threads that spin at barriers make a decode step of SmolLM2
            # ten times slower (40 ms -> 400 to 1200 ms) as soon as other processes want the cores; threads
            # that sleep cost half as much again on an idle machine, and never more (docs/decisions.md).
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
            with garbage.importing():
                from .torch.executor import TorchDriver

            self._torch = TorchDriver("cpu")
        return self._torch
