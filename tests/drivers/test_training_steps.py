"""What a trainer computes, beside a plain loop of transformers and peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
import transformers
from llmasos.drivers import base
from llmasos.drivers.trainer import mapped, objective
from llmasos.drivers.trainer.batches import IGNORED, Batches
from llmasos.drivers.trainer.mapped import MappedLinear
from llmasos.drivers.trainer.model import build
from llmasos.drivers.trainer.optimizer import Optimizer
from llmasos.drivers.trainer.run import Run
from llmasos.syscalls.training import Lora, Method, Recipe
from safetensors.torch import load_file
from torch.nn import functional

from .conftest import VOCAB, file_of
from .test_batches import apart
from .test_trainer import DROPPING, curve, spec, told, train

__all__ = ["spec"]

# peft asks transformers by names that will go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MODELS = ["llama-tied", "gpt2", "qwen3", "mistral"]


def reference(folder: Path, recipe: Recipe, data: Path) -> Any:
    """As somebody would write it with transformers and peft: one example after the other, whole logits.
    Returns losses, norms, gradients by name and the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if recipe.method is Method.LORA:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.lora.r,
            lora_alpha=recipe.lora.lora_alpha,
            lora_dropout=recipe.lora.lora_dropout,
            target_modules=recipe.lora.target_modules or None,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        torch.manual_seed(recipe.seed)
        model = peft.get_peft_model(model, config)
    else:
        torch.manual_seed(recipe.seed)
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=recipe.rate, weight_decay=0.0)
    batches = Batches(data, recipe, VOCAB)
    scheduler = transformers.get_scheduler("linear", optimizer, 0, batches.steps)
    losses, norms, gradients = [], [], []
    for step in range(batches.steps):
        rows = [row for batch in batches.step(step).batches for row in apart(batch)]
        learnt = sum(int((targets != IGNORED).sum()) for _, targets in rows)
        total = 0.0
        for tokens, targets in rows:
            logits = model(input_ids=tokens[None]).logits[0]
            loss = functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / learnt
            loss.backward()
            total += loss.item()
        gradients.append(gradients_of(model))
        norms.append(torch.nn.utils.clip_grad_norm_(wanted, recipe.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(total)
    return losses, norms, gradients, model


def relative(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The distance of all gradients of a step from others', over the length of these."""
    assert ours.keys() == others.keys()
    apart = torch.stack([(ours[name] - others[name]).norm() for name in ours])
    return float(apart.norm() / torch.stack([other.norm() for other in others.values()]).norm())


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
@pytest.mark.parametrize("model", MODELS)
def test_twenty_steps_are_those_of_transformers_and_peft(
    model: str,
    method: Method,
    packing: bool,
    spec: Callable[..., base.TrainSpec],
    tiny: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients = []
    steps = Optimizer.step

    def noted(optimizer: Optimizer, step: int) -> float:
        gradients.append(
            {name: p.grad.clone() for name, p in optimizer.parameters.items() if p.grad is not None}
        )
        return steps(optimizer, step)

    monkeypatch.setattr(Optimizer, "step", noted)
    targets = ["c_attn", "c_fc"] if model == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    recipe = Recipe(
        method=method,
        lora=Lora(r=4, target_modules=targets),
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_length=40,
        packing=packing,
        learning_rate=5e-3 if method is Method.LORA else 5e-4,
        bf16=False,
        dtype="float32" if method is Method.LORA else "",
    )
    asked = spec(model, recipe)
    if model == "gpt2":  # its dropout would draw other numbers for other shapes
        asked = without_dropout(asked, tiny("gpt2").folder)
    events, result, run = train(asked)
    folder = Path(asked.files["config.json"].path).parent
    losses, norms, expected, theirs = reference(folder, recipe, Path(asked.data))
    assert curve(events) == pytest.approx(losses, rel=1e-5)
    found = [event.grad_norm for event in events if event.phase == "train"]
    assert found == pytest.approx(norms, rel=2e-5)
    # AdamW makes the rounding of a step's gradients a difference of the next one's weights.
    distances = [relative(ours, others) for ours, others in zip(gradients, expected, strict=True)]
    assert distances[0] < 1e-5
    assert max(distances) < 5e-5
    assert losses[-1] < losses[0]
    assert result.steps == 20
    check_result(Path(asked.folder) / "result", run, theirs, folder, method)


def without_dropout(asked: base.TrainSpec, source: Path) -> base.TrainSpec:
    folder = Path(asked.folder) / "without-dropout"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return msgspec.structs.replace(asked, files={path.name: file_of(path) for path in folder.iterdir()})


def check_result(result: Path, run: Run, theirs: Any, base_folder: Path, method: Method) -> None:
    """The result loads in transformers and peft, and has the logits of what was trained."""
    names = {path.name for path in result.iterdir()}
    if method is Method.LORA:
        assert names == {"adapter_config.json", "adapter_model.safetensors"}
        plain = transformers.AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(plain, str(result)).eval()
    else:
        assert names >= {"config.json", "model.safetensors"}
        assert "llmasos" not in (result / "config.json").read_text()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 8, 11, 14, 17, 20]])
    with torch.inference_mode(), run._built.attention.over(torch.arange(6)[None]):
        found = loaded(input_ids=ids).logits
        mine = run._built.trained.eval()(input_ids=ids).logits
        other = theirs.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, mine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("model", [*MODELS, "llama"])
def test_the_mapped_base_is_what_was_packed(
    model: str, dtype: str, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    """Every module has the numbers that serving computes with; those that are near the checkpoint's."""
    asked = base.TrainSpec(
        name="x",
        device="cpu",
        files=tiny(model).files,
        derived=str(tmp_path),
        recipe=Recipe(max_length=64, dtype=dtype),
        data="",
        folder="",
    )
    built = build(asked, torch.device("cpu"), bf16=False)
    causal = built.adapted.unload().eval()  # type: ignore[union-attr]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny(model).folder, dtype=torch.float32).eval()
    near = {"float32": 0.0, "bfloat16": 0.004, "int8": 0.01, "int4": 0.08}[dtype]
    for name, module in plain.named_modules():
        if (weight := getattr(module, "weight", None)) is None:
            continue
        mine = causal.get_submodule(name)
        found = mine.weight
        if isinstance(mine, MappedLinear) and not isinstance(module, torch.nn.Linear):
            found = found.T  # Conv1D
        assert (found - weight).norm() <= near * weight.norm(), name
        if getattr(module, "bias", None) is not None:
            torch.testing.assert_close(mine.bias, module.bias, rtol=0, atol=0)
        module.weight.data.copy_(found)
    ids = torch.arange(40)[None] % VOCAB
    with torch.inference_mode(), built.attention.over(torch.arange(40)[None]):
        torch.testing.assert_close(causal(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert not [name for name, p in causal.named_parameters() if p.dim() > 1 and "wpe" not in name]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_head_read_once_in_pieces_gives_the_losses_and_gradients_of_whole_logits(
    dtype: torch.dtype,
    near: float,
    tiny: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where what is wanted is all but certain, and the greatest logit comes late or early."""
    recipe, files = Recipe(max_length=64, dtype="int4"), tiny("llama").files
    asked = base.TrainSpec("x", "cpu", files, str(tmp_path), recipe, data="", folder="")
    built = build(asked, torch.device("cpu"), bf16=False)
    head = built.adapted.unload().get_output_embeddings()  # type: ignore[union-attr]
    monkeypatch.setattr(mapped, "_PIECE", 16 * head.in_features)
    assert len(list(head.matrix.pieces(dtype))) > 5
    torch.manual_seed(3)
    weight = head.weight.to(dtype).double()
    rows = torch.randn(40, head.in_features)
    targets = torch.randint(VOCAB, (40,))
    rows[:8] = (
        weight[targets[:8]] * 12 / weight[targets[:8]].square().sum(1, keepdim=True)
    ).float()  # nearly certain
    targets[8:12], targets[12:16] = 0, VOCAB - 1
    rows = rows.to(dtype).float()
    exact = rows.double().requires_grad_()
    loss = functional.cross_entropy(exact @ weight.T, targets, reduction="sum")
    loss.backward()
    found, gradient = objective.streamed(rows, targets, head.matrix, dtype, lambda: None)
    assert found == pytest.approx(loss.item(), rel=near)
    assert exact.grad is not None
    apart = (gradient - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert apart.max() < near


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
def test_activations_may_be_computed_twice(
    method: Method, spec: Callable[..., base.TrainSpec], tmp_path: Path
) -> None:
    """With dropout, whose random numbers have to be the same both times."""
    recipe = Recipe(method=method, max_steps=4, max_length=40, lora=Lora(lora_dropout=0.1), bf16=False)
    events, _, _ = train(spec("gpt2", recipe))
    shutil.rmtree(tmp_path / "checkpoints")
    again, _, _ = train(spec("gpt2", msgspec.structs.replace(recipe, gradient_checkpointing=True)))
    assert curve(again) == pytest.approx(curve(events), rel=1e-6)


def test_bfloat16_products_keep_float32_weights(spec: Callable[..., base.TrainSpec], tmp_path: Path) -> None:
    for method, name in ((Method.LORA, "adapter_model"), (Method.FULL, "model")):
        recipe = Recipe(method=method, max_steps=4, max_length=40, learning_rate=1e-3, bf16=False)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        events, _, _ = train(spec("llama", recipe))
        shutil.rmtree(tmp_path / "checkpoints")
        again, _, _ = train(spec("llama", msgspec.structs.replace(recipe, bf16=True)))
        assert curve(again) == pytest.approx(curve(events), rel=2e-2)
        assert curve(again) != curve(events)
        saved = load_file(tmp_path / "result" / f"{name}.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_early_stopping_and_what_is_told(spec: Callable[..., base.TrainSpec], tmp_path: Path) -> None:
    """A rate that ruins the model makes the validation loss grow."""
    recipe = msgspec.structs.replace(DROPPING, learning_rate=0.5, early_stopping_patience=2, max_steps=60)
    events, result, _ = train(spec("llama", recipe))
    measured = [event.eval_loss for event in events if event.phase == "eval"]
    assert result.stopped_early
    assert result.steps < 60
    assert result.eval_loss == measured[-1]
    assert min(measured[-2:]) >= min(measured[:-2])
    assert [event.step for event in events if event.phase == "eval"] == list(range(4, result.steps + 1, 4))
    assert told(tmp_path) == events
    training = [event for event in events if event.phase == "train"]
    assert [event.step for event in training] == list(range(1, result.steps + 1))
    for event in training:
        assert event.memory > 0
        assert event.tokens_per_s > 0
        assert event.time > 0
    assert training[0].learning_rate == pytest.approx(0.5)
    assert (tmp_path / "tensorboard").is_dir()
