"""Adapters through a real daemon: pulled as peft wrote them, served beside their base, merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from llmasos.syscalls import errors, table

from .test_real import TINY_CONFIGS, answers, check_greedy, infers, random_prompts, tokenizer

# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def adapted(
    request: pytest.FixtureRequest, daemons: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A daemon with "tiny"; peft's model of an adapter of it, and where that is saved."""
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_config(TINY_CONFIGS[request.param]).float().eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "base")
    tokenizer(folder / "base")
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=request.param == "gpt2"
    )
    lora = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    lora.save_pretrained(folder / "adapter")
    daemon = daemons('devices=["cpu"]')
    with daemon.client() as client:
        client.call(table.Pull("tiny", f"file:{folder / 'base'}"), timeout_s=60)
    yield daemon, lora, folder / "adapter"
    daemon.stop()


def test_a_pulled_adapter_and_the_merged_model_say_what_peft_says(adapted: Any) -> None:
    daemon, lora, folder = adapted
    prompts = random_prompts(4, 40)
    with daemon.client() as client:
        plain = answers(client, infers(prompts, "tiny", 16))
        info = client.call(table.Pull("tiny+x", f"file:{folder}"), timeout_s=60)
        assert info.details["base"] == "tiny"
        said = answers(client, infers(prompts, "tiny+x", 16))
        merged = client.call(table.Pull("merged", "merge:tiny+x"), timeout_s=60)
        assert merged.details["lineage.adapter"] == info.digest
        assert answers(client, infers(prompts, "merged", 16)) == said != plain
        client.call(table.Unlink("/models/tiny+x"))
        assert answers(client, infers(prompts, "merged", 16)) == said
        assert answers(client, infers(prompts, "tiny", 16)) == plain
    for prompt, answer in zip(prompts, said, strict=True):
        check_greedy(lora, prompt, answer)


def test_what_is_refused_is_said_and_the_daemon_goes_on(adapted: Any, tmp_path: Path) -> None:
    daemon, _, folder = adapted
    with daemon.client() as client:
        before = {entry.path for entry in client.ls("/models")}
        for model, source, error in (
            ("other+x", f"file:{folder}", errors.NoSuchModel),
            ("tiny+x", "", errors.PullFailed),
            ("tiny+x", f"file:{tmp_path}", errors.RefusedFile),
            ("tiny+x", f"file:{folder.parent / 'base'}", errors.RefusedFile),
            ("merged-too", "merge:tiny+none", errors.NoSuchModel),
            ("merged-too", "merge:tiny", errors.InvalidArgument),
        ):
            with pytest.raises(error):
                client.call(table.Pull(model, source), timeout_s=60)
        assert {entry.path for entry in client.ls("/models")} == before
        assert answers(client, infers([[5, 6]], "tiny", 2))
