"""Packed weights: what the formats mean, how tensors are fused and padded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from llmasos.drivers import base
from llmasos.drivers.checkpoint import Checkpoint
from llmasos.drivers.families import describe
from llmasos.drivers.model_config import Config
from llmasos.drivers.native import architecture, pack
from llmasos.syscalls import errors

from .conftest import files_of
from .test_weights import quantised

Array = np.ndarray[Any, Any]
_MAPPED: list[pack.Packed] = []

_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_head": 4,
        "n_layer": 2,
        "n_inner": 40,
        "n_positions": 64,
        "vocab_size": 101,
    },
    "llama": {**_LLAMA, "model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": 9},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 20},
    "smollm3": {**_LLAMA, "model_type": "smollm3", "no_rope_layer_interval": 2},
}
# Sizes that ggml's blocks fit, without padding.
EVEN = {
    **_LLAMA,
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 112,
}


def stored(kind: str, values: Array) -> bytes:
    type_ = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        return values.tobytes()
    if kind in ("Q4_K", "Q6_K"):
        return quantised(kind, *values.shape).tobytes()
    return bytes(gguf.quants.quantize(values, type_).tobytes())


def write(
    folder: Path,
    config: dict[str, Any],
    kind_of: Callable[[str], str] = lambda name: "F32",
    entry_of: Callable[[str, tuple[int, ...]], dict[str, Any]] = lambda name, shape: {},
    seed: int = 3,
) -> dict[str, base.File]:
    """A model of random tensors; matrices are stored as `kind_of` says, vectors in float32."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    tensors, data = {}, bytearray(b"start")  # tensors need not be aligned
    for name, shape in describe(Config(config)).expected.items():
        entry = {"file": "model.gguf", "type": "F32" if len(shape) == 1 else kind_of(name), "shape": shape}
        entry |= entry_of(name, shape)
        body = stored(entry["type"], random.standard_normal(entry["shape"]).astype(np.float32))
        tensors[name] = entry | {"offset": len(data), "nbytes": len(body)}
        data += body
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tensors.json").write_text(json.dumps({"tensors": tensors}))
    (folder / "model.gguf").write_bytes(data)
    return files_of(folder)


@pytest.fixture(autouse=True)
def mapped() -> Iterator[list[pack.Packed]]:
    """Tensors are addresses: what a test has loaded stays mapped to its end."""
    _MAPPED.clear()
    yield _MAPPED
    _MAPPED.clear()


def load(files: dict[str, base.File], dtype: str = "", derived: Path | str = "") -> pack.Packed:
    spec = base.LoadSpec(1, files, dtype, 0.5, derived=str(derived))
    _MAPPED.append(pack.load(spec, lambda line: None))
    return _MAPPED[-1]


def padded(matrix: Array, rows: int, cols: int) -> Array:
    return np.pad(matrix, ((0, rows - matrix.shape[0]), (0, cols - matrix.shape[1])))


def heads_padded(matrix: Array, heads: int, head_dim: int) -> Array:
    """Rows [heads * size, …] -> [heads * head_dim, …], a head at a time."""
    size = len(matrix) // heads
    return np.concatenate([padded(matrix[i * size : (i + 1) * size], head_dim, matrix.shape[1])
                           for i in range(heads)])  # fmt: skip


def expected_matrices(files: dict[str, base.File], layer: int) -> dict[str, Array]:
    """What a layer's matrices must hold, and their biases as one column; fused and padded one by one."""
    checkpoint = Checkpoint(files)
    decoder = describe(Config(checkpoint.config))
    decoder.expect(checkpoint)
    names, shape = decoder.layers[layer], decoder.shape
    head_dim = -(-shape.head_dim // 16) * 16
    hidden, inner = -(-decoder.hidden // 32) * 32, -(-decoder.inner // 32) * 32

    def read(name: str, part: str) -> Array:
        tensor = checkpoint.read(f"{name}.{part}")
        if part == "bias":
            return tensor[:, None]
        return np.ascontiguousarray(tensor.T) if decoder.turned else tensor

    found: dict[str, Array] = {}
    for part in ("weight", "bias"):
        suffix = ".bias" if part == "bias" else ""
        if f"{names.qkv[0]}.{part}" in checkpoint:
            whole = np.concatenate([read(name, part) for name in names.qkv])
            found[f"qkv{suffix}"] = heads_padded(whole, shape.heads + 2 * shape.kv_heads, head_dim)
        if f"{names.down}.{part}" in checkpoint:
            parts = [padded(read(name, part), inner, 1 if suffix else decoder.hidden) for name in names.up]
            blocks = [one[i : i + 16] for i in range(0, inner, 16) for one in parts]
            found[f"up{suffix}"] = np.concatenate(blocks)
            found[f"down{suffix}"] = read(names.down, part)
        if f"{names.out}.{part}" in checkpoint:
            out = read(names.out, part)
            found[f"out{suffix}"] = out if suffix else heads_padded(out.T, shape.heads, head_dim).T
    widths = {"qkv": hidden, "up": hidden, "down": inner, "out": -(-shape.heads * head_dim // 32) * 32}
    return {
        name: padded(matrix, -(-len(matrix) // 16) * 16, widths.get(name, 1))
        for name, matrix in found.items()
    }


@pytest.mark.parametrize("family", list(CONFIGS))
def test_tensors_are_fused_and_padded(family: str, tmp_path: Path) -> None:
    files = write(tmp_path, CONFIGS[family])
    packed, checkpoint = load(files), Checkpoint(files)
    decoder = describe(Config(checkpoint.config))
    checkpoint.drop_prefix("transformer.")
    assert packed.dtype == "float32"
    sizes = packed.architecture.matrices() | packed.architecture.arrays()
    assert {name: (tensor.rows, tensor.cols) for name, tensor in packed.tensors.items()} == sizes
    assert all(tensor.address % 64 == 0 for tensor in packed.tensors.values())
    for layer in range(2):
        expected = expected_matrices(files, layer)
        assert len(expected) >= 4
        for name, matrix in expected.items():
            found = pack.unpack(packed.tensors[f"layer.{layer}.{name}"])
            np.testing.assert_array_equal(found.reshape(matrix.shape), matrix, err_msg=name)
        names = decoder.layers[layer]
        vectors = {"norm1": names.norm1, "norm2": names.norm2}
        if names.head_norms:
            vectors |= dict(zip(("q_norm", "k_norm"), names.head_norms, strict=True))
        for name, source in vectors.items():
            for ours, theirs in (("", "weight"), (".bias", "bias")):
                if f"{source}.{theirs}" in checkpoint:
                    found = pack.unpack(packed.tensors[f"layer.{layer}.{name}{ours}"])[0]
                    vector = checkpoint.read(f"{source}.{theirs}")
                    np.testing.assert_array_equal(found[: len(vector)], vector)
                    assert not found[len(vector) :].any()
    for name, source in {"head": decoder.head or decoder.embedding, "embedding": decoder.embedding}.items():
        if name in packed.tensors:
            found = pack.unpack(packed.tensors[name])
            np.testing.assert_array_equal(found, padded(checkpoint.read(f"{source}.weight"), 112, 64))
    assert ("embedding" in packed.tensors) == bool(decoder.head)
    if family == "gpt2":
        found = pack.unpack(packed.tensors["positions"])
        np.testing.assert_array_equal(found, padded(checkpoint.read("wpe.weight"), 64, 64))
    else:
        assert decoder.rotation is not None
        found = pack.unpack(packed.tensors["frequencies"])
        np.testing.assert_array_equal(found[0], decoder.rotation.frequencies)


def test_an_architecture_says_what_differs_between_layers(tmp_path: Path) -> None:
    layers = load(write(tmp_path / "a", CONFIGS["smollm3"])).architecture.layers
    assert [layer.rotated for layer in layers] == [True, False]
    layers = load(write(tmp_path / "b", CONFIGS["mistral"])).architecture.layers
    assert [(layer.window, layer.scale) for layer in layers] == [(9, 12**-0.5)] * 2
    inverse = {**CONFIGS["gpt2"], "scale_attn_by_inverse_layer_idx": True}
    layers = load(write(tmp_path / "c", inverse)).architecture.layers
    assert [layer.scale for layer in layers] == [12**-0.5, 12**-0.5 / 2]


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_stored_values_are_rounded_as_little_as_the_format_allows(
    dtype: str, kind: str, family: str, tmp_path: Path
) -> None:
    files = write(tmp_path, CONFIGS[family], lambda name: kind)
    packed = load(files, dtype)
    for name, matrix in expected_matrices(files, 1).items():
        tensor = packed.tensors[f"layer.1.{name}"]
        if name.endswith("bias"):
            np.testing.assert_array_equal(pack.unpack(tensor)[0], matrix[:, 0])
            continue
        assert tensor.format == dtype
        error = np.abs(pack.unpack(tensor) - matrix)
        groups = matrix.reshape(len(matrix), -1, 32)
        if dtype == "bfloat16":
            allowed = np.zeros_like(matrix) if kind == "BF16" else np.abs(matrix) * 2**-8
        elif dtype == "int8":
            allowed = np.repeat(np.abs(groups).max(-1) / 127 * 0.51, 32, axis=1)
        else:  # a range may be cut by a fifth, so single values may be off by more than half a step
            allowed = np.repeat((groups.max(-1) - groups.min(-1)) * 0.15, 32, axis=1)
        assert (error <= allowed + 1e-30).all()
    assert packed.tensors["head"].format == ("int8" if dtype == "int4" else dtype)


def test_four_bits_are_better_than_the_plain_range(tmp_path: Path) -> None:
    files = write(tmp_path, EVEN)
    found = pack.unpack(load(files, "int4").tensors["layer.0.down"])
    matrix = expected_matrices(files, 0)["down"]
    plain = gguf.quants.dequantize(
        gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q4_1), gguf.GGMLQuantizationType.Q4_1
    )
    assert ((found - matrix) ** 2).mean() < 0.9 * ((plain - matrix) ** 2).mean()


def test_groups_of_one_value_and_huge_values_survive(tmp_path: Path) -> None:
    files = write(tmp_path, EVEN)
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    entry = json.loads((tmp_path / "tensors.json").read_text())["tensors"][
        "model.layers.0.mlp.down_proj.weight"
    ]
    values = np.full(512, 0.25, np.float32)
    values[32:64] = 0
    values[64] = 3e8
    data[entry["offset"] : entry["offset"] + 2048] = values.tobytes()
    (tmp_path / "model.gguf").write_bytes(data)
    files = files_of(tmp_path)
    for dtype in ("int4", "int8"):
        found = pack.unpack(load(files, dtype).tensors["layer.0.down"])[0]
        np.testing.assert_allclose(found[:32], 0.25, rtol=1e-3)
        assert not found[32:64].any()
        np.testing.assert_allclose(found[96:], 0.25, rtol=1e-3)
        assert np.isfinite(found).all()


def gguf_entry(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """As the importer notes llama.cpp's order of rows."""
    heads = 8 if "q_proj" in name else 4
    return {"heads": heads} if "q_proj" in name or "k_proj" in name else {}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_32_are_taken_without_loss(kind: str, tmp_path: Path) -> None:
    files = write(tmp_path, EVEN, lambda name: kind, gguf_entry)
    packed = load(files)
    assert packed.dtype == ("int8" if kind == "Q8_0" else "int4")
    for name, matrix in expected_matrices(files, 1).items():
        assert packed.tensors[f"layer.1.{name}"].format == packed.dtype
        np.testing.assert_array_equal(pack.unpack(packed.tensors[f"layer.1.{name}"]), matrix)
    np.testing.assert_array_equal(
        pack.unpack(packed.tensors["embedding"]), Checkpoint(files).read("model.embed_tokens.weight")
    )


def test_k_quants_keep_their_sub_blocks_or_become_eight_bits(tmp_path: Path) -> None:
    files = write(tmp_path / "four", EVEN, lambda name: "Q4_K", gguf_entry)
    packed = load(files)
    assert packed.dtype == "int4"
    for name, matrix in expected_matrices(files, 1).items():
        found = pack.unpack(packed.tensors[f"layer.1.{name}"])
        scale = np.abs(matrix.reshape(len(matrix), -1, 256)).max(-1).repeat(256, axis=1)
        assert (np.abs(found - matrix) <= scale * 2**-9).all()  # fp16 scales and minima
    files = write(tmp_path / "six", EVEN, lambda name: "Q6_K", gguf_entry)
    assert load(files).dtype == "int8"
    for dtype in ("int8", "int4"):
        packed = load(files, dtype)
        for name, matrix in expected_matrices(files, 1).items():
            assert packed.tensors[f"layer.1.{name}"].format == "int8"
            groups = np.abs(matrix.reshape(len(matrix), -1, 32)).max(-1)
            error = np.abs(pack.unpack(packed.tensors[f"layer.1.{name}"]) - matrix)
            assert (error <= (groups / 127 * 0.51).repeat(32, axis=1)).all()


def test_tensors_of_one_matrix_come_to_one_format(tmp_path: Path) -> None:
    """As in a Q4_K_M file, whose values have more bits in some layers; a Q8_0 embedding stays as it is."""
    kinds = {"v_proj": "Q6_K", "embed": "Q8_0", "lm_head": "Q8_0"}
    files = write(
        tmp_path, EVEN, lambda name: next((kinds[part] for part in kinds if part in name), "Q4_0"), gguf_entry
    )
    packed = load(files)
    formats = {name: packed.tensors[f"layer.0.{name}"].format for name in ("qkv", "out", "up", "down")}
    assert packed.dtype == "int4"
    assert formats == {"qkv": "int8", "out": "int4", "up": "int4", "down": "int4"}
    matrix = expected_matrices(files, 0)["qkv"]
    error = np.abs(pack.unpack(packed.tensors["layer.0.qkv"]) - matrix)
    groups = np.abs(matrix.reshape(len(matrix), -1, 32)).max(-1)
    assert (error <= (groups / 127 * 0.51).repeat(32, axis=1)).all()
    assert (packed.tensors["head"].format, packed.tensors["embedding"].format) == ("int8", "int8")
    mixed = write(tmp_path / "mixed", EVEN, lambda name: "Q4_1" if "gate" in name else "Q4_0", gguf_entry)
    packed = load(mixed)
    assert packed.tensors["layer.0.up"].format == "int4"
    np.testing.assert_array_equal(
        pack.unpack(packed.tensors["layer.0.up"]), expected_matrices(mixed, 0)["up"]
    )


def test_quantised_heads_that_need_padding_are_regrouped(tmp_path: Path) -> None:
    config = {**EVEN, "num_attention_heads": 8, "head_dim": 20, "hidden_size": 160, "num_key_value_heads": 4}
    files = write(tmp_path, config, lambda name: "Q4_1", gguf_entry)
    packed, expected = load(files), expected_matrices(files, 0)
    np.testing.assert_array_equal(pack.unpack(packed.tensors["layer.0.qkv"]), expected["qkv"])
    assert packed.tensors["layer.0.out"].format == "int8"
    assert np.abs(pack.unpack(packed.tensors["layer.0.out"]) - expected["out"]).max() < 0.02


def test_matrices_that_a_gguf_file_holds_turned_already_are_taken_without_loss(tmp_path: Path) -> None:
    def turned(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        matrix = len(shape) == 2 and name.startswith("h.")
        return {"transpose": True, "shape": shape[::-1]} if matrix else {}

    config = {**CONFIGS["gpt2"], "n_embd": 64, "n_inner": 96}
    files = write(tmp_path, config, lambda name: "Q4_0", turned)
    packed = load(files)
    for name, matrix in expected_matrices(files, 1).items():
        np.testing.assert_array_equal(
            pack.unpack(packed.tensors[f"layer.1.{name}"]).reshape(matrix.shape), matrix
        )
        assert name.endswith("bias") or packed.tensors[f"layer.1.{name}"].format == "int4"
    crosswise = load(write(tmp_path / "crosswise", config, lambda name: "Q4_0"))
    assert crosswise.tensors["layer.1.down"].format == "int4"  # quantised anew along the other side


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (["F32"], "float32"),
        (["BF16"], "bfloat16"),
        (["F16", "BF16", "F32"], "bfloat16"),
        (["Q4_0", "Q4_0", "Q6_K"], "int4"),
        (["Q6_K", "Q6_K", "Q4_K"], "int8"),
        (["Q8_0", "F32", "Q8_0"], "int8"),
    ],
)
def test_the_dtype_suits_how_the_model_is_stored(kinds: list[str], dtype: str, tmp_path: Path) -> None:
    projections = ("gate_proj", "up_proj", "down_proj")
    of = dict(zip(projections, kinds * 3, strict=False))
    files = write(tmp_path, EVEN, lambda name: next((of[p] for p in projections if p in name), kinds[0]))
    assert load(files).dtype == dtype


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def test_progress_comes_to_all(tmp_path: Path) -> None:
    files = write(tmp_path, CONFIGS["llama"])
    seen: list[tuple[int, int]] = []
    packed = pack.load(base.LoadSpec(1, files, "int4", 0.5), lambda line: None, lambda *now: seen.append(now))
    done = [now for now, _ in seen]
    assert done == sorted(done)
    assert packed.nbytes - 64 * len(packed.tensors) < done[-1] <= packed.nbytes
    assert {total for _, total in seen} == {packed.nbytes}


def test_bad_originals_and_what_the_engine_does_not_compute_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, CONFIGS["llama"])
    with pytest.raises(errors.UnsupportedModel, match="float16"):
        load(files, "float16")
    flip(tmp_path / "model.gguf", -1)
    with pytest.raises(errors.Corrupt, match=r"model\.gguf"):
        load(files, "", tmp_path / "derived")
    assert not (tmp_path / "derived").exists()
    assert architecture.refusal(Config(CONFIGS["llama"])) == ""
    assert "mamba" in architecture.refusal(Config({"model_type": "mamba"}))
    assert "rope_type" in architecture.refusal(
        Config({**CONFIGS["llama"], "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    )


def test_packing_imports_neither_torch_nor_gguf(tmp_path: Path) -> None:
    files = write(tmp_path, EVEN, lambda name: "Q4_K", gguf_entry)
    spec = base.LoadSpec(1, files, "", 0.5, derived=str(tmp_path / "derived"))
    program = (
        "import sys, msgspec\n"
        "from llmasos.drivers import base\n"
        "from llmasos.drivers.native import pack\n"
        "spec = msgspec.json.decode(sys.stdin.buffer.read(), type=base.LoadSpec)\n"
        "for _ in range(2): assert pack.load(spec, lambda line: None).dtype == 'int4'\n"
        "print(sorted({'torch', 'gguf', 'transformers'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], input=msgspec.json.encode(spec), capture_output=True, check=True
    )
    assert ran.stdout.strip() == b"[]"
