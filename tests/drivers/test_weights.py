"""Reading weights: every tensor type, what is broken, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llmasos.drivers import base
from llmasos.drivers.checkpoint import QUANTISED
from llmasos.drivers.torch import host
from llmasos.drivers.torch.executor import TorchDriver
from llmasos.drivers.torch.weights import Checkpoint
from llmasos.syscalls import errors

from .conftest import Tiny, file_of, files_of


def checkpoint(folder: Path, tensors: dict[str, dict[str, Any]], data: bytes) -> Checkpoint:
    (folder / "model.gguf").write_bytes(data)
    (folder / "config.json").write_text("{}")
    (folder / "tensors.json").write_text(json.dumps({"tensors": tensors}))
    return Checkpoint(files_of(folder))


def entry(data: bytes, kind: str, shape: list[int], **more: Any) -> dict[str, Any]:
    return {"file": "model.gguf", "type": kind, "shape": shape, "offset": 0, "nbytes": len(data), **more}


def quantised(kind: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Rows of valid blocks: quantised noise, or for the K types random bytes with finite scales."""
    type_ = gguf.GGMLQuantizationType[kind]
    noise = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    try:
        return gguf.quants.quantize(noise, type_).view(np.uint8).reshape(rows, -1)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[type_]
        raw = np.random.default_rng(2).integers(0, 256, (rows * columns // block, size), np.uint8)
        scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        for place in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2)):
            raw[:, place : place + 2] = scale
        return raw.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind",
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"],
)
def test_types_are_read_as_gguf_reads_them(kind: str, tmp_path: Path) -> None:
    raw = quantised(kind, 6, 512)
    type_ = gguf.GGMLQuantizationType[kind]
    lead = b"\x00" * 5  # tensors need not be aligned
    shape = [6, 512]
    where = entry(raw.tobytes(), kind, shape) | {"offset": 5}
    found = checkpoint(tmp_path, {"w": where}, lead + raw.tobytes())
    typed = raw.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    expected = gguf.quants.dequantize(typed, type_)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(found.read("w"), expected.reshape(6, 512))
    np.testing.assert_array_equal(found.tensor("w", torch.float32).numpy(), expected.reshape(6, 512))
    assert found.raw("w").rows.tobytes() == raw.tobytes()
    assert (found.stored, found.types()) == (kind, {kind: 6 * 512})


def test_blocks_have_the_sizes_of_ggml() -> None:
    for kind, sizes in QUANTISED.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == sizes


def test_sixteen_bits_stay_as_they_are(tmp_path: Path) -> None:
    for kind, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        raw = quantised(kind, 3, 64)
        kept = checkpoint(tmp_path, {"w": entry(raw.tobytes(), kind, [3, 64])}, raw.tobytes())
        tensor = kept.tensor("w", dtype)
        assert tensor.dtype == dtype
        assert tensor.view(torch.uint8).numpy().tobytes() == raw.tobytes()
        tensor[0, 0] = 5  # it owns its memory
        assert kept.raw("w").rows.tobytes() == raw.tobytes()


def test_rows_in_rotary_order_are_put_back_and_transposes_turned(tmp_path: Path) -> None:
    heads, width, columns = 3, 8, 32
    rows = np.arange(heads * width * columns, dtype=np.float32).reshape(heads * width, columns)
    # llama.cpp's converter: dimension i and i + d/2 of a head become neighbours
    permuted = rows.reshape(heads, 2, width // 2, columns).swapaxes(1, 2).reshape(rows.shape)
    data = np.ascontiguousarray(permuted).tobytes()
    tensors = {
        "q": entry(data, "F32", [24, 32], heads=heads),
        "turned": entry(data, "F32", [24, 32], transpose=True),
    }
    found = checkpoint(tmp_path, tensors, data)
    np.testing.assert_array_equal(found.read("q"), rows)
    np.testing.assert_array_equal(found.read("turned"), permuted.T)
    np.testing.assert_array_equal(found.raw("q").rows.view(np.float32), rows)
    assert [found.raw(name).transposed for name in ("q", "turned")] == [False, True]
    np.testing.assert_array_equal(found.tensor("q", torch.float32).numpy(), rows)
    np.testing.assert_array_equal(found.tensor("turned", torch.float32).numpy(), permuted.T)
    found.expect({"q": (24, 32), "turned": (32, 24)})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"offset": 1}, errors.Corrupt, "outside"),
        ({"offset": -1}, errors.Corrupt, "outside"),
        ({"nbytes": 10**12}, errors.Corrupt, "bytes"),
        ({"shape": [4, 9]}, errors.Corrupt, "bytes"),
        ({"shape": [-4, -8]}, errors.Corrupt, "shape"),
        ({"shape": [2**62, 2**62]}, errors.Corrupt, "shape"),
        ({"shape": []}, errors.Corrupt, "shape"),
        ({"type": "IQ1_S"}, errors.UnsupportedModel, "IQ1_S"),
        ({"type": "Q4_0"}, errors.Corrupt, "whole blocks"),
        ({"file": "../../etc/passwd"}, errors.Corrupt, "does not have"),
        ({"heads": 3}, errors.Corrupt, "heads"),
        ({"heads": -1}, errors.Corrupt, "heads"),
        ({"type": "Q8_0", "shape": [64], "nbytes": 68, "heads": 2}, errors.Corrupt, "blocks"),
        ({"shape": [32], "transpose": True}, errors.Corrupt, "transposed"),
        ({"shape": "4x8"}, errors.Corrupt, "shape"),
        ({"surprise": 1}, errors.Corrupt, "surprise"),
    ],
)
def test_a_bad_index_is_refused(
    change: dict[str, Any], kind: type[errors.LLMasOSError], message: str, tmp_path: Path
) -> None:
    data = np.zeros((4, 8), np.float32).tobytes()
    with pytest.raises(kind, match=message):
        checkpoint(tmp_path, {"w": {**entry(data, "F32", [4, 8]), **change}}, data)


def load(files: dict[str, base.File], fraction: float = 0.05) -> base.Loaded:
    return TorchDriver("cpu").load(base.LoadSpec(1, files, "float32", fraction))


@pytest.mark.parametrize("name", ["model.safetensors", "tensors.json", "config.json"])
def test_changed_bytes_are_corrupt(name: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    files = tiny("llama").files
    data = bytearray(Path(files[name].path).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(data)
    changed = base.File(str(tmp_path / name), files[name].digest, files[name].size)
    with pytest.raises(errors.Corrupt, match=name):
        load({**files, name: changed})
    with pytest.raises(errors.Corrupt, match=name):
        load({**files, name: base.File(str(tmp_path / "gone"), files[name].digest, files[name].size)})


def with_index(model: Tiny, tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> dict[str, base.File]:
    index = json.loads((model.folder / "tensors.json").read_text())
    edit(index["tensors"])
    (tmp_path / "tensors.json").write_text(json.dumps(index))
    return {**model.files, "tensors.json": file_of(tmp_path / "tensors.json")}


def test_missing_unexpected_and_misshapen_tensors_are_named(
    tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    model, name = tiny("llama"), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(errors.Corrupt, match=name):
        load(with_index(model, tmp_path, lambda tensors: tensors.pop(name)))
    extra = "model.layers.0.self_attn.q_norm.weight"
    with pytest.raises(errors.UnsupportedModel, match=extra):
        load(with_index(model, tmp_path, lambda tensors: tensors.update({extra: tensors[name]})))
    with pytest.raises(errors.Corrupt, match=name):
        load(with_index(model, tmp_path, lambda tensors: tensors[name].update(shape=[64, 96])))


def test_names_of_gpt2_with_and_without_prefix_load(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    model = tiny("gpt2")

    def strip(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    assert load(with_index(model, tmp_path, strip)).vocab_size == 97
    assert load(model.files).vocab_size == 97


def test_the_pool_is_sized_from_free_memory(
    tiny: Callable[[str], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny("llama").files
    block_bytes = 16 * 3 * 2 * 2 * 16 * 4
    monkeypatch.setattr(host, "memory", lambda device: (10**9, 40 * block_bytes))
    loaded = load(files, 0.5)
    assert (loaded.block_bytes, loaded.blocks) == (block_bytes, 20)
    with pytest.raises(errors.NeverFits, match="256 tokens needs") as refusal:
        load(files, 0.1)
    assert refusal.value.details["needed"] == 16 * block_bytes
    assert refusal.value.hint
    monkeypatch.setattr(host, "memory", lambda device: (10**9, 1000))
    with pytest.raises(errors.NeverFits, match="weights"):
        load(files, 0.5)
    monkeypatch.setattr(host, "memory", lambda device: (10**12, 10**12))
    assert load(files, 0.001).blocks == 64 * 16  # no more than 64 contexts


def test_an_unknown_dtype_and_device_are_refused(tiny: Callable[[str], Tiny]) -> None:
    with pytest.raises(errors.UnsupportedModel, match="float8"):
        TorchDriver("cpu").load(base.LoadSpec(1, tiny("llama").files, "float8", 0.05))
    if not torch.cuda.is_available():
        with pytest.raises(errors.NoSuchDevice, match=r"sees no cuda:0: \w"):
            TorchDriver("cuda:0")
