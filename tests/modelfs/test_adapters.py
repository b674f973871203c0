"""Adapters in the model filesystem: pulled as peft wrote them, committed as training runs left them, merged
into plain models; whole or not there at all, whatever happens meanwhile."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, quants
from llmasos.kernel.modelfs import source_merge
from llmasos.kernel.modelfs.adapter_layout import WEIGHTS
from llmasos.kernel.modelfs.importer import pull
from llmasos.kernel.modelfs.manifest import Lineage, Manifest, ManifestFile, hash_file
from llmasos.kernel.modelfs.names import parse_name
from llmasos.kernel.modelfs.progress import Progress
from llmasos.kernel.modelfs.store import ModelFS
from llmasos.syscalls.errors import (
    AlreadyExists,
    Corrupt,
    InvalidArgument,
    LLMasOSError,
    NoSuchModel,
    PullFailed,
    RefusedFile,
    StorageFailed,
    UnsupportedModel,
)
from safetensors.numpy import load_file, save_file

Bring = Callable[..., Manifest]
Importer = Callable[..., tuple[int, list[dict[str, Any]]]]

# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 258, "n_positions": 64}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
TOKENS = torch.tensor([[7, 3, 250, 11, 99, 42, 7, 7, 200]])


def config_of(family: str, **changes: Any) -> Any:
    if family == "gpt2":
        return transformers.GPT2Config(**GPT2 | changes)
    return transformers.LlamaConfig(**SIZES | changes)


def make_base(folder: Path, family: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A random model beside the tokenizer of `folder`."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes)).to(
        getattr(torch, dtype)
    )
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1, **config: Any) -> Any:
    """What peft saves in `folder` of a random adapter, strong enough to change what is said; peft's model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    gpt2 = model.config.model_type == "gpt2"
    config = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "fan_in_fan_out": gpt2} | config
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits.float()
    return found


def laid_out(store: ModelFS, model: str, folder: Path) -> Path:
    """The files of a model, as transformers wants them."""
    folder.mkdir()
    for name, file in store.driver_files(store.resolve(model)).items():
        shutil.copyfile(file.path, folder / name)
    return folder


@pytest.fixture
def tiny(folder: Path, bring: Bring) -> Path:
    """The model "tiny", and where it was imported from."""
    bring(make_base(folder))
    return folder


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """An adapter of tiny as peft saves it."""
    make_adapter(tiny, tmp_path / "adapter")
    return tmp_path / "adapter"


# -- pulled ------------------------------------------------------------------------------------------


def test_an_adapter_of_peft_is_pulled(store: ModelFS, bring: Bring, adapter: Path) -> None:
    base = store.resolve("tiny")
    (adapter / "LICENSE").write_text("Do what you like.")
    manifest = bring(adapter, "tiny+x")
    assert store.resolve("tiny:latest+x") == manifest
    found = store.base_of(manifest)
    assert (found.name, found.digest, found.files) == (base.name, base.digest, base.files)
    assert (manifest.base, manifest.architecture, manifest.owner) == (base.digest, "llama", "")
    files = store.driver_files(manifest)
    own = {"adapter_config.json", WEIGHTS, "LICENSE"}
    assert set(files) == own | TOKENIZER
    for name in own:
        assert Path(files[name].path).read_bytes() == (adapter / name).read_bytes()
    for name in TOKENIZER:
        assert files[name] == store.driver_files(base)[name]
    tensors = load_file(adapter / WEIGHTS)
    assert manifest.parameters == sum(tensor.size for tensor in tensors.values())
    assert store.stat("/models/tiny+x").details["base"] == "tiny"
    assert bring(adapter, "tiny+x").digest == manifest.digest
    assert store.fsck() == store.garbage() == []


def test_an_adapter_keeps_the_base_it_was_made_for(
    store: ModelFS, bring: Bring, adapter: Path, tiny: Path
) -> None:
    manifest = bring(adapter, "tiny+x")
    before = store.base_of(manifest)
    assert store.unlink("tiny", set()) == 0
    assert store.base_of(store.resolve("tiny+x")).digest == before.digest
    assert all(store.blob(digest).exists() for digest in before.digests)
    assert store.find(lambda found: found.digest == before.digest) == before
    assert store.read("/models/tiny+x/tokenizer.json", 0, 1 << 20)[0] > 0
    assert store.fsck() == store.garbage() == []
    store.unlink("tiny+x", set())
    assert store.usage() == (0, 0)


def test_an_adapter_needs_its_base_and_a_source(store: ModelFS, bring: Bring, adapter: Path) -> None:
    with pytest.raises(NoSuchModel):
        bring(adapter, "other+x")
    with pytest.raises(PullFailed, match=r"no source is known for tiny\+x") as caught:
        bring("", "tiny+x")
    assert "peft" in caught.value.hint


def edited(folder: Path, **tensors: Any) -> None:
    """Changes tensors of an adapter; None removes one."""
    path = folder / WEIGHTS
    found = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSALS: dict[str, tuple[type[LLMasOSError], str, Callable[[Path], object]]] = {
    "a pickle": (
        RefusedFile,
        "adapter_model.bin",
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
    ),
    "no weights": (RefusedFile, "has no", lambda f: (f / WEIGHTS).unlink()),
    "no config": (RefusedFile, "holds no adapter", lambda f: (f / "adapter_config.json").unlink()),
    "code": (RefusedFile, "holds code: lora.py", lambda f: (f / "lora.py").write_text("print(1)")),
    "no JSON": (Corrupt, "no JSON", lambda f: (f / "adapter_config.json").write_text("{")),
    "another type": (UnsupportedModel, "LOHA", lambda f: configured(f, peft_type="LOHA")),
    "another model's names": (
        Corrupt,
        "does not have",
        lambda f: edited(
            f,
            **{n.replace("layers.1", "layers.9"): t for n, t in load_file(f / WEIGHTS).items()},
        ),
    ),
    "another model's shapes": (
        Corrupt,
        r"\[32, 32\] in the base",
        lambda f: edited(f, **{f"{Q}.lora_A.weight": np.ones((4, 48), np.float32)}),
    ),
    "half an addition": (Corrupt, "None", lambda f: edited(f, **{f"{Q}.lora_B.weight": None})),
    "ranks that differ": (
        Corrupt,
        "adds B",
        lambda f: edited(f, **{f"{Q}.lora_A.weight": np.ones((5, 32), np.float32)}),
    ),
    "whole modules": (
        UnsupportedModel,
        "embed_tokens",
        lambda f: edited(f, **{"base_model.model.model.embed_tokens.weight": np.ones((258, 32), np.float32)}),
    ),
    "integers": (
        UnsupportedModel,
        "I32",
        lambda f: edited(f, **{f"{Q}.lora_A.weight": np.ones((4, 32), np.int32)}),
    ),
    "nothing": (
        UnsupportedModel,
        r"\[0, 32\]",
        lambda f: edited(f, **{f"{Q}.lora_A.weight": np.ones((0, 32), np.float32)}),
    ),
    "a cut file": (
        Corrupt,
        "the file at",
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_leaves_nothing(case: str, store: ModelFS, bring: Bring, adapter: Path) -> None:
    error, said, spoil = REFUSALS[case]
    spoil(adapter)
    with pytest.raises(error, match=said) as caught:
        bring(adapter, "tiny+x")
    assert caught.value.hint or error is Corrupt
    assert [entry.path for entry in store.ls("/models")] == ["/models/tiny:latest"]
    store.gc(set())
    assert store.fsck() == store.garbage() == []


def test_whose_adapter_it_is_is_said(bring: Bring, adapter: Path) -> None:
    configured(adapter, base_model_name_or_path="meta/another")
    edited(adapter, **{f"{Q}.lora_A.weight": np.ones((4, 48), np.float32)})
    with pytest.raises(Corrupt) as caught:
        bring(adapter, "tiny+x")
    assert "meta/another" in caught.value.hint


def test_models_and_adapters_are_not_mixed_up(bring: Bring, adapter: Path, tiny: Path) -> None:
    with pytest.raises(RefusedFile, match="holds an adapter") as caught:
        bring(adapter, "mine")
    assert "BASE+NAME" in caught.value.hint
    with pytest.raises(RefusedFile, match="holds no adapter"):
        bring(tiny, "tiny+x")


# -- what training runs leave ------------------------------------------------------------------------


def made_run(store: ModelFS, adapter: Path, pid: int = 7, owner: str = "alice") -> str:
    """A run that has ended, as the kernel and the trainer leave it; the source to commit."""
    data = store.folder / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    folder = store.runs.make(pid, owner, store.resolve("tiny"), data, "data.jsonl")
    shutil.copytree(adapter, folder / "result")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return store.runs.trained(
        pid,
        Lineage(base=store.resolve("tiny").digest, run=f"run-{pid}", dataset="sha256:d", steps=1, loss=0.5),
    )


@pytest.fixture
def run_result(adapter: Path) -> Path:
    (adapter / "README.md").unlink()
    return adapter


def test_a_run_is_committed_with_its_lineage(store: ModelFS, importer: Importer, run_result: Path) -> None:
    source = made_run(store, run_result)
    code, lines = importer("tiny+mine", source)
    assert code == 0, lines
    manifest = store.resolve("tiny+mine")
    assert lines[-1]["ok"] == {"model": "tiny:latest+mine", "digest": manifest.digest, "size": manifest.size}
    assert (manifest.owner, manifest.source) == ("alice", "train:run-7")
    assert manifest.lineage == Lineage(
        store.resolve("tiny").digest,
        "run-7",
        dataset="sha256:d",
        version=metadata.version("llmasos"),
        steps=1,
        loss=0.5,
    )
    assert manifest.base == store.resolve("tiny").digest
    files = store.driver_files(manifest)
    assert set(files) == {"adapter_config.json", WEIGHTS, "metrics.jsonl"} | TOKENIZER
    assert store.fsck() == store.garbage() == []
    with pytest.raises(NoSuchModel):
        store.resolve("tiny+mine", lambda owner: owner == "bob")
    store.runs.trim(7)
    store.gc(set())
    assert store.resolve("tiny+mine", lambda owner: owner == "alice") == manifest
    assert store.fsck() == store.garbage() == []


def test_a_taken_name_is_not_replaced(
    store: ModelFS, importer: Importer, run_result: Path, tmp_path: Path
) -> None:
    first, _ = importer("tiny+mine", made_run(store, run_result))
    again, lines = importer("tiny+mine", f"run:{store.runs.folder(7)}")
    assert (first, again) == (0, 0), "the same result again is no conflict"
    kept = store.resolve("tiny+mine")
    assert lines[-1]["ok"]["digest"] == kept.digest
    code, lines = importer("tiny+mine", made_run(store, run_result, pid=8))
    assert (code, lines[-1]["error"]["code"]) == (1, AlreadyExists.code)
    assert "llsh rm tiny+mine" in lines[-1]["error"]["hint"]
    assert store.resolve("tiny+mine") == kept


def test_an_unfinished_run_is_not_committed(store: ModelFS, importer: Importer, run_result: Path) -> None:
    source = made_run(store, run_result)
    (store.runs.folder(7) / "result" / WEIGHTS).unlink()
    code, lines = importer("tiny+mine", source)
    assert (code, lines[-1]["error"]["code"]) == (1, Corrupt.code)
    (store.runs.folder(7) / "lineage.json").unlink()
    code, lines = importer("tiny+mine", source)
    assert (code, lines[-1]["error"]["code"]) == (1, Corrupt.code)
    assert len(store.ls("/models")) == 1


def test_a_full_disk_is_said_and_nothing_stays(
    store: ModelFS, run_result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made_run(store, run_result)
    before = store.usage()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(OSError, match="No space left"):
            pull(store, parse_name("tiny+mine"), source, Progress())
    assert store.usage() == before
    assert pull(store, parse_name("tiny+mine"), source, Progress()).owner == "alice"


def whole(store: ModelFS, manifest: Manifest) -> bool:
    return all(hash_file(store.blob(file.digest)) == file.digest for file in manifest.files)


def test_an_importer_that_is_killed_leaves_all_or_nothing(
    store: ModelFS, run_result: Path, tmp_path: Path
) -> None:
    edited(run_result)  # rewritten without holes
    source = made_run(store, run_result)
    command = [sys.executable, "-m", "llmasos.kernel.modelfs.importer"]
    command += ["--home", str(tmp_path / "home"), "--model", "tiny+mine", "--source", source]
    chance = random.Random(5)
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as importer:
            assert importer.stdout is not None
            importer.stdout.readline()  # the first of its steps
            try:
                importer.wait(chance.uniform(0, 0.05))
            except subprocess.TimeoutExpired:
                importer.send_signal(signal.SIGKILL)
        for entry in store.ls("/models"):
            assert whole(store, store.resolve(entry.path.removeprefix("/models/")))
        if chance.random() < 0.5:
            store.gc(set())
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    manifest = store.resolve("tiny+mine")
    assert whole(store, manifest)
    assert manifest.lineage is not None
    store.gc(set())
    assert store.fsck() == store.garbage() == []


# -- merged ------------------------------------------------------------------------------------------

MERGES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "all matrices": ("llama", {}, "float32", {}),
    "a tied head": (
        "llama",
        {"tie_word_embeddings": True},
        "float32",
        {"target_modules": ["q_proj", "down_proj"]},
    ),
    "ranks and scalings by pattern": (
        "llama",
        {},
        "float32",
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
    ),
    "bfloat16": ("llama", {}, "bfloat16", {}),
    "Conv1D": ("gpt2", {}, "float32", {}),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merged_model_is_what_peft_merges(
    case: str, store: ModelFS, bring: Bring, folder: Path, tmp_path: Path
) -> None:
    family, changes, dtype, config = MERGES[case]
    base = bring(make_base(folder, family, dtype, **changes))
    adapted = make_adapter(folder, tmp_path / "adapter", **config)
    adapter = bring(tmp_path / "adapter", "tiny+x")
    manifest = bring("merge:tiny+x", "merged")
    assert (manifest.quantization, manifest.parameters) == (base.quantization, base.parameters)
    assert (manifest.source, manifest.base, manifest.owner) == ("merge:tiny:latest+x", "", "")
    assert manifest.lineage is not None
    assert (manifest.lineage.base, manifest.lineage.adapter) == (base.digest, adapter.digest)
    there = laid_out(store, "merged", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(there).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == plain.dtype
    # Sums in another order may round to another bfloat16.
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.05, "rtol": 0.05}
    wanted = logits(adapted.merge_and_unload())
    torch.testing.assert_close(logits(merged), wanted, **close)
    assert (logits(plain) - wanted).abs().max() > 0.1
    assert (there / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert bring("merge:tiny+x", "merged").digest == manifest.digest
    assert store.fsck() == store.garbage() == []


def quantised(store: ModelFS) -> dict[str, Any]:
    """Commits tiny anew as GGUF files hold models: matrices as Q8_0 blocks, the rows of q and k of a llama in
    another order, a GPT-2's matrices turned. Returns the values by the tensors' names."""
    plain = store.resolve("tiny")
    index = json.loads(store.read("/models/tiny/tensors.json", 0, 1 << 20)[1])["tensors"]
    weights = load_file(store.driver_files(plain)["model.safetensors"].path)
    data, numbers = b"", {}
    for name, entry in index.items():
        values = weights[name]
        if turned := ".h." in name and values.ndim == 2:
            values = np.ascontiguousarray(values.T)
        kind = "Q8_0" if values.ndim == 2 else "F32"
        quant = GGMLQuantizationType[kind]
        dequantised = quants.dequantize(quants.quantize(values, quant), quant)
        numbers[name] = dequantised.T if turned else dequantised
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        if heads:
            halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        stored = quants.quantize(values, quant).tobytes()
        entry |= {"file": "model.gguf", "type": kind, "shape": values.shape, "offset": len(data)}
        entry |= {"nbytes": len(stored), "heads": heads, "transpose": turned}
        data += stored
    files = [file for file in plain.files if file.path not in ("model.safetensors", "tensors.json")]
    for name, content in (("model.gguf", data), ("tensors.json", json.dumps({"tensors": index}).encode())):
        files.append(ManifestFile(name, *store.put_bytes(content)))
    made = Manifest(1, "test", plain.architecture, plain.parameters, "Q8_0", 64, "", 0.0, files)
    store.commit(parse_name("tiny"), made)
    return numbers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantised_model_is_merged_into_its_numbers(
    family: str, store: ModelFS, bring: Bring, folder: Path, tmp_path: Path
) -> None:
    bring(make_base(folder, family))
    numbers = quantised(store)
    make_adapter(folder, tmp_path / "adapter")
    bring(tmp_path / "adapter", "tiny+x")
    assert bring("merge:tiny+x", "merged").quantization == "F32"
    there = laid_out(store, "merged", tmp_path / "out")
    merged, added = load_file(there / "model.safetensors"), load_file(tmp_path / "adapter" / WEIGHTS)
    assert merged.keys() == numbers.keys()
    changed = 0
    for name, values in numbers.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in added:
            assert merged[name].tobytes() == np.ascontiguousarray(values).tobytes()
            continue
        addition = 2 * added[f"{module}.lora_B.weight"] @ added[f"{module}.lora_A.weight"]
        wanted = values + (addition.T if family == "gpt2" else addition)
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-5, atol=1e-6)
        changed += 1
    assert changed == (14 if family == "llama" else 8)
    assert transformers.AutoModelForCausalLM.from_pretrained(there).dtype == torch.float32


def test_what_cannot_be_merged_is_refused(store: ModelFS, bring: Bring, adapter: Path) -> None:
    configured(adapter, use_dora=True)
    bring(adapter, "tiny+x")
    for model, source, error in (
        ("merged", "merge:tiny+x", UnsupportedModel),
        ("merged", "merge:tiny+y", NoSuchModel),
        ("merged", "merge:tiny", InvalidArgument),
        ("merged", "merge:../x+y", InvalidArgument),
        ("tiny+z", "merge:tiny+x", InvalidArgument),
    ):
        with pytest.raises(error):
            bring(source, model)
    assert {entry.path for entry in store.ls("/models")} == {"/models/tiny:latest", "/models/tiny:latest+x"}
    store.gc(set())
    assert store.fsck() == store.garbage() == []


def test_a_merge_that_does_not_fit_takes_nothing(
    store: ModelFS, bring: Bring, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(adapter, "tiny+x")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000 + (64 << 20)))
    with pytest.raises(StorageFailed, match="there is room for 100000"):
        bring("merge:tiny+x", "merged")
    assert list(store.tmp.glob("import-*")) == []


def test_a_merge_replaces_nothing(store: ModelFS, bring: Bring, adapter: Path) -> None:
    before = bring(adapter, "tiny+x"), store.resolve("tiny")
    with pytest.raises(AlreadyExists, match="tiny"):
        bring("merge:tiny+x", "tiny")
    assert (store.resolve("tiny+x"), store.resolve("tiny")) == before
    assert bring("merge:tiny+x", "merged") == bring("merge:tiny+x", "merged")


def test_a_merge_that_dies_is_said(
    store: ModelFS, bring: Bring, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(adapter, "tiny+x")
    monkeypatch.setattr(source_merge, "PROGRAM", "llmasos.no_such_program")
    with pytest.raises(PullFailed, match="merging died"):
        bring("merge:tiny+x", "merged")


def test_what_is_somebodys_stays_theirs_and_replaces_nothing(
    store: ModelFS, importer: Importer, bring: Bring, run_result: Path
) -> None:
    importer("tiny+mine", made_run(store, run_result))
    merged = pull(store, parse_name("merged"), "merge:tiny+mine", Progress(), "alice")
    assert merged.owner == "alice"
    assert merged.lineage is not None
    assert (merged.lineage.run, merged.lineage.adapter) == ("run-7", store.resolve("tiny+mine").digest)
    with pytest.raises(NoSuchModel):
        store.resolve("merged", lambda owner: owner == "bob")
    with pytest.raises(AlreadyExists):
        pull(store, parse_name("tiny"), "merge:tiny+mine", Progress(), "alice")
    assert pull(store, parse_name("merged"), "merge:tiny+mine", Progress(), "alice").digest == merged.digest
