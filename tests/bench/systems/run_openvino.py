"""OpenVINO GenAI's ContinuousBatchingPipeline, with prefix caching.

Settings: `model` (a folder with its representation, or a GGUF file), `threads`, `properties`.
"""

from __future__ import annotations

import os
import time
from typing import Any

from base import Engine, Events, Request, main


class OpenVINO(Engine):
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.ov, self.genai = numpy, openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = settings.get("max_num_batched_tokens", 256)
        properties = {"INFERENCE_NUM_THREADS": settings["threads"]} | settings.get("properties", {})
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            settings["model"], scheduler, "CPU", properties
        )
        self.handles: dict[str, tuple[Any, Request, int]] = {}
        self.held: list[Request] = []
        self.number = 0
        model = settings["model"]
        weights = os.path.join(model, "openvino_model.bin") if os.path.isdir(model) else model
        return {
            "version": openvino_genai.__version__.split("-")[0],
            "format": settings["format"],
            "weights_bytes": os.path.getsize(weights),
        }

    def submit(self, requests: list[Request]) -> None:
        # Requests admitted in one step do not see each other's prefix, so the first goes ahead.
        shared = [request for request in requests if request.prefix]
        for request in requests:
            if request.prefix and request is not shared[0]:
                self.held.append(request)
            else:
                self._add(request)

    def _add(self, request: Request) -> None:
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = request.new, True, False
        tokens = self.ov.Tensor(self.numpy.array([request.tokens], dtype=self.numpy.int64))
        self.number += 1
        self.handles[request.key] = self.pipeline.add_request(self.number, tokens, config), request, 0

    def poll(self, timeout_s: float) -> Events:
        if not self.pipeline.has_non_finished_requests():
            time.sleep(min(timeout_s, 0.02))
            return []
        self.pipeline.step()
        events: Events = []
        for key, (handle, request, made) in list(self.handles.items()):
            tokens: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
            if tokens:
                made += len(tokens)
                self.handles[key] = handle, request, made
                events.append((key, tokens, made >= request.new))
            if made >= request.new:
                del self.handles[key]
        if events and self.held:
            for request in self.held:
                self._add(request)
            self.held = []
        return events

    def cancel(self, keys: list[str]) -> None:
        for key in keys:
            handle, _, _ = self.handles.pop(key)
            handle.cancel() if hasattr(handle, "cancel") else handle.drop()
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()


if __name__ == "__main__":
    main(OpenVINO())
