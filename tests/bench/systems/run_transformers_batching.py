"""transformers' continuous batching: its manager with a thread of its own, prefix sharing on.

Settings: `model` (a folder as Hugging Face keeps it), `dtype`, `threads`.
"""

from __future__ import annotations

import os
import time
from typing import Any

from base import Engine, Events, Request, main

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Batching(Engine):
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        import torch
        import transformers
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        blocks = 40_000 // settings["page"]
        self.manager = model.init_continuous_batching(
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=settings["page"],
                num_blocks=blocks,
                max_batch_tokens=settings["batch_tokens"],
                max_requests_per_batch=64,
            ),
        )
        self.manager.start()
        self.running: dict[str, tuple[str, int, int]] = {}
        self.number = 0
        self.held: list[Request] = []
        return {
            "version": transformers.__version__,
            "format": settings["dtype"],
            "weights_bytes": model.num_parameters() * dtype.itemsize,
        }

    def submit(self, requests: list[Request]) -> None:
        # Requests admitted in one step do not see each other's prefix, so the first goes ahead.
        leader = next((request for request in requests if request.prefix), None)
        for request in requests:
            if request.prefix and request is not leader:
                self.held.append(request)
            else:
                self._add(request)

    def _add(self, request: Request) -> None:
        self.number += 1
        name = f"{self.number}"
        self.running[name] = request.key, request.new, 0
        self.manager.add_request(
            request.tokens, request_id=name, max_new_tokens=request.new, streaming=True, eos_token_id=-1
        )

    def poll(self, timeout_s: float) -> Events:
        if not self.running:
            time.sleep(min(timeout_s, 0.02))
            return []
        events: Events = []
        result = self.manager.get_result(timeout=max(timeout_s, 0.001))
        if result is None and not self.manager.is_running():
            raise RuntimeError(f"the manager died: {self.manager.background_thread_status.fatal_error}")
        while result is not None:
            events += self._events(result)
            # Further results that lie there are read at once; an empty queue must not be waited for.
            result = self.manager.get_result(timeout=0.0005)
        if events and self.held:
            held, self.held = self.held, []
            for request in held:
                self._add(request)
        return events

    def _events(self, result: Any) -> Events:
        if result.error:
            raise RuntimeError(result.error)
        if result.request_id not in self.running:
            return []
        key, new, seen = self.running[result.request_id]
        tokens = list(result.generated_tokens)
        done = len(tokens) >= new
        if done:
            del self.running[result.request_id]
        else:
            self.running[result.request_id] = key, new, len(tokens)
        return [(key, tokens[seen:new], done)]

    def cancel(self, keys: list[str]) -> None:
        self.held = []
        for name, (key, _, _) in list(self.running.items()):
            if key in keys:
                self.manager.cancel_request(name)
                del self.running[name]
        while self.manager.get_result(timeout=1.0) is not None:
            pass

    def close(self) -> None:
        self.manager.stop(block=True, timeout=10)


if __name__ == "__main__":
    main(Batching())
