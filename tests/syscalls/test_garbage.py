"""What is imported is not searched for garbage; all else is, before and after."""

from __future__ import annotations

import gc

from llmasos.syscalls import garbage


def test_imports_are_not_searched() -> None:
    searches: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        searches.append(phase)

    gc.callbacks.append(note)
    try:
        with garbage.importing():
            with garbage.importing():
                kept = [[] for _ in range(100_000)]
            assert not gc.isenabled()
        assert not searches
        assert gc.isenabled()
        kept += [[] for _ in range(100_000)]
        assert searches
    finally:
        gc.callbacks.remove(note)
