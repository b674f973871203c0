"""`merge:BASE+ADAPTER`: an adapter that is here, merged into its base. Tensors are the drivers' business: a
program of theirs writes the weights."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import IO

import msgspec
from llmasos.drivers.base import MergeSpec
from llmasos.syscalls import errors
from llmasos.syscalls.errors import InvalidArgument, PullFailed

from . import layout
from .manifest import Lineage
from .origin import Origin
from .progress import Progress
from .source_pypi import die_with_parent
from .staging import Staging

PROGRAM = "llmasos.drivers.merge"
WEIGHTS = "model.safetensors"


def fetch(place: str, stage: Staging) -> Origin:
    """Merges the adapter called `place`. Raises InvalidArgument, NoSuchModel, StorageFailed, PullFailed,
    UnsupportedModel, Corrupt."""
    if stage.adapter:
        raise InvalidArgument(
            "what is merged is no adapter any more", hint="name it without +", field="model"
        )
    adapter = stage.store.resolve(place)
    if not adapter.base:
        raise InvalidArgument(
            f"{adapter.name} is no adapter",
            hint="what training made is one: `llsh list` shows MODEL+NAME",
            field="source",
        )
    base = stage.store.base_of(adapter)
    folder = stage.folder / "merged"
    folder.mkdir()
    files = stage.store.driver_files(base)
    _run(MergeSpec(files, stage.store.driver_files(adapter), str(folder), stage.room), stage.progress)
    stage.add_text(layout.CONFIG, (folder / layout.CONFIG).read_bytes())
    stage.refer(WEIGHTS, folder / WEIGHTS, foreign=False)
    for file in base.files:
        if file.path in (*layout.TEXTS, "LICENSE") and file.path != layout.CONFIG:
            stage.add_text(file.path, stage.store.blob(file.digest).read_bytes())
    made = adapter.lineage or Lineage(base=base.digest, version=metadata.version("llmasos"))
    lineage = msgspec.structs.replace(made, base=base.digest, adapter=adapter.digest)
    return Origin(f"merge:{adapter.name}", base.license, lineage)


def _run(spec: MergeSpec, progress: Progress) -> None:
    """Raises what the program says; it ends with this."""
    with subprocess.Popen(
        [sys.executable, "-m", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    ) as merger:
        assert merger.stdin is not None
        assert merger.stdout is not None
        try:
            merger.stdin.write(msgspec.json.encode(spec))
            merger.stdin.close()
            _follow(merger.stdout, progress)
        finally:
            merger.kill()


def _follow(said: IO[bytes], progress: Progress) -> None:
    for line in said:
        told = msgspec.json.decode(line)
        if "error" in told:
            raise errors.from_wire(told["error"])
        if "ok" in told:
            return
        progress.show("merge", WEIGHTS, told["done"], told["total"])
    raise PullFailed("the merging died", hint="see the daemon's log")
