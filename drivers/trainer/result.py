"""What a run leaves: an adapter in peft's format, or a model in transformers', in safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from llmasos.syscalls import errors

from .checkpoints import storing, sync, sync_tree
from .model import Built

_KEPT = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model.safetensors",
}
_ONE_FILE = "1000000GB"


def write(folder: Path, built: Built, base: str, state: dict[str, torch.Tensor] | None) -> None:
    """Makes `folder`/result, whole and durable or not at all; `base` names the base of an adapter. `state`:
    what was trained, where the model does not have it in full. Raises StorageFailed."""
    with storing(folder):
        target, temporary = folder / "result", folder / "result.tmp"
        for old in (target, temporary):
            shutil.rmtree(old, ignore_errors=True)
        temporary.mkdir()
        if built.adapted is not None:
            config = built.adapted.peft_config["default"]
            config.base_model_name_or_path = base
            config.fan_in_fan_out = built.turned  # as the base's own classes want it
            built.adapted.save_pretrained(str(temporary), save_embedding_layers=False, state_dict=state)
        else:
            built.causal.save_pretrained(str(temporary), max_shard_size=_ONE_FILE, state_dict=state)
        for path in temporary.iterdir():
            if path.name not in _KEPT:
                path.unlink()  # a model card that says nothing
        if not any(path.suffix == ".safetensors" for path in temporary.iterdir()):
            raise errors.DeviceFault("transformers wrote no weights")
        sync_tree(temporary)
        temporary.rename(target)
        sync(folder)
