"""transformers' `generate`: one batch at a time, padded on the left; who comes meanwhile waits for its end.

A conversation keeps its KV cache between the turns, and so does a shared prefix, as the library's users can.

Settings: `model` (a folder as Hugging Face keeps it), `dtype`, `threads`.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from typing import Any

from base import Engine, Events, Request, main

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Generate(Engine):
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        import torch
        import transformers

        torch.set_num_threads(settings["threads"])
        self.torch, self.library = torch, transformers
        dtype = getattr(torch, settings["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        self.queue: list[Request] = []
        self.events: queue.SimpleQueue[Events | None] = queue.SimpleQueue()
        self.worker: threading.Thread | None = None
        self.problem: Exception | None = None
        self.stop = False
        self.cache: Any = None
        self.cached: list[int] = []
        return {
            "version": transformers.__version__,
            "format": settings["dtype"],
            "weights_bytes": self.model.num_parameters() * dtype.itemsize,
        }

    def prepare(self, requests: list[Request]) -> None:
        self.cache, self.cached = None, []

    def submit(self, requests: list[Request]) -> None:
        self.queue += requests

    def poll(self, timeout_s: float) -> Events:
        if self.worker is None and self.queue:
            batch, self.queue = self.queue, []
            self.stop = False
            self.worker = threading.Thread(target=self._generate, args=(batch,))
            self.worker.start()
        try:
            found = [self.events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self.events.empty():
            found.append(self.events.get_nowait())
        if None in found:
            assert self.worker is not None
            self.worker.join()
            self.worker = None
            if self.problem:
                raise self.problem
        return [event for events in found if events for event in events]

    def _generate(self, batch: list[Request]) -> None:
        try:
            with self.torch.inference_mode():
                self._run(batch)
        except Exception as problem:
            self.problem = problem
        self.events.put(None)

    def _run(self, batch: list[Request]) -> None:
        torch = self.torch
        longest = max(len(request.tokens) for request in batch)
        pads = [longest - len(request.tokens) for request in batch]
        ids = torch.tensor([[0] * pad + r.tokens for pad, r in zip(pads, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(r.tokens) for pad, r in zip(pads, batch, strict=True)])
        self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=self._past(batch),
            max_new_tokens=max(request.new for request in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[_Watch(self, batch, longest)],
        )
        self.cached = batch[0].tokens if len(batch) == 1 else []

    def _past(self, batch: list[Request]) -> Any:
        """A KV cache that holds what the batch's contexts have in common with what was computed."""
        prefix = batch[0].prefix
        if len(batch) > 1 and prefix and all(r.tokens[:prefix] == batch[0].tokens[:prefix] for r in batch):
            cache = self.library.DynamicCache(config=self.model.config)
            self.model(self.torch.tensor([batch[0].tokens[:prefix]]), past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(batch))
            return cache
        if len(batch) == 1:
            pairs = zip(self.cached, batch[0].tokens, strict=False)
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if self.cache is None or not same:
                self.cache = self.library.DynamicCache(config=self.model.config)
            elif (extra := self.cache.get_seq_length() - min(same, len(batch[0].tokens) - 1)) > 0:
                self.cache.crop(-extra)
            return self.cache
        return None

    def cancel(self, keys: list[str]) -> None:
        self.queue, self.stop = [], True
        if self.worker is not None:
            self.worker.join()
        self.worker = None
        while not self.events.empty():
            self.events.get_nowait()


class _Watch:
    """Called after every step: tells the parent thread of the tokens, and ends the batch when asked to."""

    def __init__(self, owner: Generate, batch: list[Request], longest: int) -> None:
        self.owner, self.batch, self.longest = owner, batch, longest

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        made = ids.shape[1] - self.longest
        last = ids[:, -1].tolist()
        self.owner.events.put(
            [
                (r.key, [token], made == r.new)
                for r, token in zip(self.batch, last, strict=True)
                if made <= r.new
            ]
        )
        return self.owner.torch.full((ids.shape[0],), self.owner.stop)


if __name__ == "__main__":
    main(Generate())
