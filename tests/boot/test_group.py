"""A device group behind ordinary calls: tokens are those of a single device, before and after a rank dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import transformers
from llmasos.syscalls import table

from .test_real import TINY_CONFIGS, answers, check_greedy, infers, random_prompts, tokenizer


def test_a_group_serves_and_survives_the_death_of_a_rank(daemons: Callable, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"]).float().eval()
    model.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    daemon = daemons('devices=["cpu*2"]')
    prompts = random_prompts(4, 60)
    with daemon.client() as client:
        client.call(table.Pull(model="tiny", source=f"file:{tmp_path}"), timeout_s=60)
        for prompt, answer in zip(prompts, answers(client, infers(prompts, "tiny", 24)), strict=True):
            assert len(answer) == 24
            check_greedy(model, prompt, answer)
        [device] = client.call(table.Lsdev()).devices
        assert "2 ranks" in device.description
        streams = [client.stream(call) for call in infers(prompts[:1], "tiny", 150)]
        made = list(next(streams[0]).tokens)
        [other] = psutil.Process(daemon.children("cpu*2")[0].pid).children()
        other.kill()
        made += [token for event in streams[0] for token in event.tokens]
        assert len(made) == 150
        check_greedy(model, prompts[0], made)
        assert client.call(table.Lsdev()).devices[0].restarts == 1
