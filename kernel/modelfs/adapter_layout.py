"""What an adapter's folder must hold, whatever brought it: a LoRA as peft saves it. layout.py's counterpart.

Only the names and shapes of its tensors are held against its base's here, so that an adapter of another model
is refused when it is brought. Which options of adapter_config.json are computed only drivers know: whoever
loads it first is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmasos.syscalls.errors import Corrupt, RefusedFile, UnsupportedModel

from . import layout, safetensors_index
from .manifest import Manifest, ManifestFile
from .safetensors_index import Tensor

CONFIG = layout.ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""What an adapter has of its base's files: it is talked to as it was trained, whatever the base's name comes
to stand for."""

MAX_CONFIG = 1024 * 1024

_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def choose(names: Iterable[str], read: Callable[[str], bytes]) -> layout.Chosen:
    """Which files to take of a folder of `names`. Raises RefusedFile, UnsupportedModel, Corrupt."""
    present = set(names)
    if CONFIG not in present:
        raise RefusedFile(
            f"the source holds no adapter: no {CONFIG}",
            hint="give a folder as peft's save_pretrained makes it",
        )
    check_config(read(CONFIG))
    if WEIGHTS not in present:
        pickles = sorted(name for name in present if name.endswith(layout.PICKLES))
        raise RefusedFile(
            f"the adapter is only there as {', '.join(pickles)[:300]}, which can run code when read"
            if pickles
            else f"the source has no {WEIGHTS}",
            hint="only safetensors are read: save it anew with a peft of today",
            file=pickles[0] if pickles else WEIGHTS,
        )
    return layout.Chosen([CONFIG], [WEIGHTS])


def check_config(data: bytes) -> dict[str, Any]:
    """adapter_config.json, if it is a LoRA's. Raises RefusedFile, UnsupportedModel, Corrupt."""
    if len(data) > MAX_CONFIG:
        raise RefusedFile(f"{CONFIG} of {len(data)} bytes", file=CONFIG)
    config = layout.parse_json(CONFIG, data)
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"an adapter of peft's type {str(config.get('peft_type'))[:40]!r}", hint="LoRA is computed"
        )
    return config


def assemble(texts: Mapping[str, bytes], weights: Mapping[str, Path], base: Manifest) -> layout.Assembled:
    """What a manifest says of an adapter of `base`. Raises Corrupt, RefusedFile, UnsupportedModel."""
    if CONFIG not in texts or WEIGHTS not in weights:
        raise Corrupt(f"an adapter is {CONFIG} and {WEIGHTS}")
    check_config(texts[CONFIG])
    sizes = [(t.dtype, math.prod(t.shape)) for t in safetensors_index.read(weights[WEIGHTS]).values()]
    return layout.Assembled(
        texts=dict(texts),
        architecture=base.architecture,
        parameters=sum(size for _, size in sizes),
        quantization=layout.most_of(sizes),
        context_length=base.context_length,
        license=base.license,
    )


def with_tokenizer(own: Iterable[ManifestFile], base: Manifest) -> list[ManifestFile]:
    """What the manifest of an adapter of `base` lists: its own files and those of TOKENIZER."""
    shared = [file for file in base.files if file.path in TOKENIZER]
    return sorted([*own, *shared], key=lambda file: file.path)


def check_fits(config: bytes, weights: Path, shapes: Mapping[str, list[int]]) -> None:
    """Raises unless every tensor is half of an addition to a matrix of the base, whose tensors have these
    `shapes`. Raises Corrupt, UnsupportedModel."""
    halves: dict[str, dict[str, list[int]]] = {}
    for name, tensor in safetensors_index.read(weights).items():
        module, half = _half(name, tensor)
        halves.setdefault(module, {})[half] = tensor.shape
    for module, found in halves.items():
        # Checkpoints may leave out what stands before all names ("transformer.").
        names = (f"{module}.weight", f"{module.partition('.')[2]}.weight")
        matrix = next((shapes[name] for name in names if name in shapes), None)
        a, b = found.get("A"), found.get("B")
        # A matrix is stored [out, in] or [in, out].
        if a and b and matrix and a[0] == b[1] and sorted((b[0], a[1])) == sorted(matrix):
            continue
        said = layout.parse_json(CONFIG, config).get("base_model_name_or_path")
        raise Corrupt(
            f"the adapter adds B {b} times A {a} to {module[:128]}, "
            + (f"which is {matrix} in the base" if matrix else "which the base does not have"),
            hint=f"it says that it was made for {str(said)[:120]!r}",
            module=module[:128],
        )


def _half(name: str, tensor: Tensor) -> tuple[str, str]:
    """The module that a tensor is added to, and which half ("A", "B") it is. Raises UnsupportedModel."""
    match = _TENSOR.fullmatch(name)
    plain = len(tensor.shape) == 2 and min(tensor.shape) > 0 and tensor.dtype in layout.FLOATS
    if match is None or not plain:
        raise UnsupportedModel(
            f"the adapter's tensor {name[:128]!r} ({tensor.dtype} {tensor.shape}) is not computed",
            hint="plain LoRA of the layers' matrices is",
            tensor=name[:128],
        )
    return match[1], match[2]
