"""`run:FOLDER`: what a training run made (runs.py): an adapter, or a model with its base's tokenizer.

The same run committed again is the same model, so an import that died is simply repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from msgspec.structs import replace

from . import adapter_layout, layout
from .manifest import SCHEMA, Manifest
from .names import ModelName
from .progress import Progress
from .runs import METRICS, RESULT, Run, lineage_of, run_of
from .staging import MAX_TEXT, Staging, staging
from .store import ModelFS

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")


def commit(store: ModelFS, model: ModelName, folder: Path, progress: Progress) -> Manifest:
    """Gives the result of a run its name. Raises AlreadyExists, Corrupt, UnsupportedModel, OSError."""
    run = run_of(folder)
    lineage = replace(lineage_of(folder), version=metadata.version("llmasos"))
    with store.importing(), staging(store, progress, bool(model.adapter)) as stage:
        _collect(folder, stage)
        weights = {name: found.path for name, found in stage.weights.items()}
        if model.adapter:
            about = adapter_layout.assemble(stage.texts, weights, run.base)
        else:
            about = _model(stage, run, weights)
        files = stage.store_all(about.texts)
        return store.commit(
            model,
            Manifest(
                schema=SCHEMA,
                source=f"train:{lineage.run}",
                architecture=about.architecture,
                parameters=about.parameters,
                quantization=about.quantization,
                context_length=about.context_length,
                license=run.base.license,
                created=time.time(),
                files=adapter_layout.with_tokenizer(files, run.base) if model.adapter else files,
                base=store.put_bytes(run.base.content)[0] if model.adapter else "",
                owner=run.owner,
                lineage=lineage,
            ),
            replace=False,
        )


def _collect(folder: Path, stage: Staging) -> None:
    """Copies what the trainer made; the run keeps its own until it is over."""
    for path in sorted((folder / RESULT).iterdir()):
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                stage.copy(path.name, file, path.stat().st_size)
        else:
            stage.add_text(path.name, path.read_bytes())
    told = folder / METRICS
    if told.exists() and told.stat().st_size <= MAX_TEXT:
        stage.add_text(METRICS, told.read_bytes())


def _model(stage: Staging, run: Run, weights: Mapping[str, Path]) -> layout.Assembled:
    for file in run.base.files:
        if file.path in _TOKENIZER:
            stage.add_text(file.path, stage.store.blob(file.digest).read_bytes())
    assembled = layout.assemble(stage.texts, weights)
    if METRICS in stage.texts:
        assembled.texts[METRICS] = stage.texts[METRICS]
    return assembled
