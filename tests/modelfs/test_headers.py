"""Hostile headers of safetensors and GGUF: refused, quickly, no crash, no tensor outside the file."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from llmasos.kernel.modelfs import gguf_header, safetensors_index
from llmasos.syscalls.errors import Corrupt, UnsupportedModel
from safetensors.numpy import save_file

HUGE = [0, 1, 31, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**53, 2**60, 2**63, 2**64 - 1]


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        safetensors(b"{"),
        safetensors(b"[]"),
        safetensors(b"{}"),
        safetensors(b'{"a":' * 50_000),
        safetensors({"a": entry([2], 0, 8)}, b"1234567"),
        safetensors({"a": entry([2], 0, 8)}, b"123456789"),
        safetensors({"a": entry([2], 8, 0)}, b"12345678"),
        safetensors({"a": entry([2], -8, 0)}, b"12345678"),
        safetensors({"a": entry([-1, -2], 0, 8)}, b"12345678"),
        safetensors({"a": entry([2**40, 2**40], 0, 8)}, b"12345678"),
        safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"123456789012"),
        safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"123456789012"),
        safetensors({"a": entry([2], 0, 8, "F33")}, b"12345678"),
        safetensors({"a": entry([2.5], 0, 8)}, b"12345678"),
        safetensors({"a": {"dtype": "F32"}}, b"12345678"),
        safetensors({"a": 7}),
    ],
)
def test_bad_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        safetensors_index.read(path)


def test_good_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16)}
    save_file(tensors, path, metadata={"format": "pt"})
    found = safetensors_index.read(path)
    assert found["a"].shape == [2, 3]
    assert np.fromfile(path, np.float32, 6, offset=found["a"].offset).tolist() == list(range(6))
    assert found["b"].nbytes == 0


def write_gguf(path: Path) -> bytes:
    writer = GGUFWriter(path, "llama")
    writer.add_string("llama.name", "small")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "cé"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def check(path: Path, content: bytes) -> bool:
    """Whether the file is accepted; then everything must lie inside it."""
    path.write_bytes(content)
    began = time.monotonic()
    try:
        header = gguf_header.read(path)
    except (Corrupt, UnsupportedModel):
        return False
    finally:
        assert time.monotonic() - began < 2
    for tensor in header.tensors.values():
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content)
    return True


def test_good_gguf(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    content = write_gguf(path)
    header = gguf_header.read(path)
    assert header.pairs["tokenizer.ggml.tokens"] == ["a", "b", "cé"]
    assert header.pairs["tokenizer.ggml.add_bos_token"] is True
    tensor = header.tensors["token_embd.weight"]
    assert (tensor.type, tensor.shape) == ("F32", [2, 32])
    assert np.frombuffer(content, np.float32, 64, tensor.offset).tolist() == list(range(64))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "w.gguf")
    end = max(t.offset + t.nbytes for t in gguf_header.read(tmp_path / "w.gguf").tensors.values())
    assert not any(check(tmp_path / "cut.gguf", content[:length]) for length in range(end))


def test_numbers_out_of_range(tmp_path: Path) -> None:
    """Every 8-byte number of the header replaced by extreme ones, at every place."""
    content = write_gguf(tmp_path / "w.gguf")
    for at in range(4, min(len(content) - 8, 500)):
        for value in HUGE:
            check(tmp_path / "bad.gguf", content[:at] + struct.pack("<Q", value) + content[at + 8 :])


def test_flipped_bytes(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "w.gguf")
    dice = random.Random(3)
    for _ in range(3000):
        bad = bytearray(content)
        for _ in range(dice.randrange(1, 6)):
            bad[dice.randrange(500)] = dice.randrange(256)
        check(tmp_path / "bad.gguf", bytes(bad))


def test_a_bomb_of_items_is_refused(tmp_path: Path) -> None:
    pairs = [
        struct.pack("<Q", 1) + name + struct.pack("<IIQ", 9, 0, 3_000_000) + bytes(3_000_000)
        for name in (b"a", b"b", b"c")
    ]
    assert not check(tmp_path / "bomb.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 3) + b"".join(pairs))
    nested = struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000
    assert not check(tmp_path / "deep.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + nested)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    check(folder / "any.gguf", start + data)
    (folder / "any.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(Corrupt):
        safetensors_index.read(folder / "any.safetensors")
