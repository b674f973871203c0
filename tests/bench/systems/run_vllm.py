"""vLLM's CPU build: its engine in this process, compiled, prefix caching and priorities on.

Settings: `model` (a folder as Hugging Face keeps it), `threads`, `eager` (do not compile).
"""

from __future__ import annotations

import os
import time
from typing import Any

from base import Engine, Events, Request, main

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Two more processes on two cores cost more than they bring.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


class VLLM(Engine):
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{settings['threads'] - 1}")
        from vllm import EngineArgs, LLMEngine, SamplingParams, __version__
        from vllm.sampling_params import RequestOutputKind

        self.params, self.delta = SamplingParams, RequestOutputKind.DELTA
        arguments = EngineArgs(
            model=settings["model"],
            max_model_len=2048,
            max_num_seqs=64,
            enable_prefix_caching=True,
            scheduling_policy="priority",
            distributed_executor_backend="uni",
            disable_log_stats=True,
            enforce_eager=settings.get("eager", False),
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.names: dict[str, str] = {}
        self.number = 0
        return {
            "version": __version__,
            "format": settings["format"],
            "weights_bytes": os.path.getsize(os.path.join(settings["model"], "model.safetensors")),
        }

    def submit(self, requests: list[Request]) -> None:
        for request in requests:
            params = self.params(
                max_tokens=request.new,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=self.delta,
            )
            self.number += 1
            name = str(self.number)
            self.names[name] = request.key
            self.engine.add_request(
                name,
                {"prompt_token_ids": request.tokens},
                params,
                priority=1 if request.background else 0,
            )

    def poll(self, timeout_s: float) -> Events:
        if not self.engine.has_unfinished_requests():
            time.sleep(min(timeout_s, 0.02))
            return []
        events: Events = []
        for output in self.engine.step():
            if (key := self.names.get(output.request_id)) is not None:
                events.append((key, list(output.outputs[0].token_ids), output.finished))
                if output.finished:
                    del self.names[output.request_id]
        return events

    def cancel(self, keys: list[str]) -> None:
        names = [name for name, key in self.names.items() if key in keys]
        self.engine.abort_request(names)
        for name in names:
            del self.names[name]
        while self.engine.has_unfinished_requests():
            self.engine.step()


if __name__ == "__main__":
    main(VLLM())
