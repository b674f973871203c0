"""`llmasosd --fsck`: reads the whole model filesystem and prints what is wrong with it."""

from __future__ import annotations

from pathlib import Path

from .store import ModelFS


def main(home: Path) -> int:
    """Prints one problem a line. Returns the exit code: 0 when there is none."""
    store = ModelFS(home)
    problems = store.fsck()
    for problem in problems:
        print(problem)
    size, blobs = store.usage()
    print(f"{blobs} blobs, {size / 1e6:.1f} MB, {len(problems)} problems")
    return 1 if problems else 0
