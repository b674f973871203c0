"""llama.cpp through its C interface, batched the way its own server batches.

Every step holds the next token of each sequence that generates, then prompt tokens up to `n_batch`. A
sequence slot keeps its context when a request ends, and a new request takes the free slot whose context
begins most like it. A shared prefix is computed once and copied with `llama_memory_seq_cp`.

Settings: `model` (a GGUF file), `threads`, `flash` (0 or 1), `unified` (one KV buffer for all sequences).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from dataclasses import dataclass, field
from typing import Any

from base import Engine, Events, Request, main

N_BATCH = 2048
N_UBATCH = 512
# Fewer sequences than the server's default would refuse the workloads; more cost memory.
MOST_SLOTS = 64


@dataclass
class Slot:
    number: int
    context: list[int] = field(default_factory=list)
    request: Request | None = None
    computed: int = 0
    made: int = 0
    waits_for: int = -1  # the slot that computes the shared prefix


class LlamaCpp(Engine):
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        import llama_cpp
        import numpy

        self.c, self.np, self.settings = llama_cpp, numpy, settings
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), options)
        if not self.model:
            raise RuntimeError(f"cannot load {settings['model']}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context, self.size, self.queue = None, (0, 0, False), []
        self.batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        return {
            "version": llama_cpp.__version__,
            "format": os.path.basename(settings["model"]).split("-")[-1].removesuffix(".gguf"),
            "weights_bytes": llama_cpp.llama_model_size(self.model),
        }

    def prepare(self, requests: list[Request]) -> None:
        """A context of the size this work needs, as somebody who starts a server for it would choose."""
        slots = sum(1 for request in requests if request.background or request.at == 0)
        slots += 4 if any(request.at > 0 for request in requests) else 0
        slots = min(slots, MOST_SLOTS)

        def length(request: Request) -> int:
            turns = sum(len(turn) + request.new for turn in request.turns)
            return len(request.tokens) + request.new + turns

        cells = max(map(length, requests)) + 8
        unified = bool(self.settings.get("unified")) and any(request.prefix for request in requests)
        if self.size == (slots, cells, unified):
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        else:
            self._make_context(slots, cells, unified)
        self.slots = [Slot(number) for number in range(slots)]

    def _make_context(self, slots: int, cells: int, unified: bool) -> None:
        c = self.c
        if self.context:
            c.llama_free(self.context)
        options = c.llama_context_default_params()
        options.n_ctx = (cells + 255) // 256 * 256 * slots
        options.n_batch, options.n_ubatch, options.n_seq_max = N_BATCH, N_UBATCH, slots
        options.n_threads = options.n_threads_batch = self.settings["threads"]
        options.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.settings["flash"] else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        options.kv_unified = unified
        self.context = c.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("no context")
        self.size = (slots, cells, unified)

    def submit(self, requests: list[Request]) -> None:
        self.queue += requests
        self._assign()

    def _assign(self) -> None:
        """Gives requests that wait a slot."""
        leader = -1
        while self.queue and (free := [slot for slot in self.slots if slot.request is None]):
            request = self.queue.pop(0)
            slot = max(free, key=lambda s: (common(s.context, request.tokens), -len(s.context)))
            keep = min(common(slot.context, request.tokens), len(request.tokens) - 1)
            self._forget(slot, keep)
            slot.request, slot.context = request, list(request.tokens)
            slot.computed, slot.made, slot.waits_for = keep, 0, -1
            if request.prefix and leader < 0:
                leader = slot.number
            elif request.prefix:
                slot.waits_for = leader

    def _forget(self, slot: Slot, keep: int) -> None:
        memory = self.c.llama_get_memory(self.context)
        self.c.llama_memory_seq_rm(memory, slot.number, keep, -1)
        del slot.context[keep:]

    def _share(self) -> None:
        """Copies a prefix that is computed to those that wait for it."""
        memory = self.c.llama_get_memory(self.context)
        for slot in self.slots:
            if slot.request is None or slot.waits_for < 0:
                continue
            leader = self.slots[slot.waits_for]
            if leader.computed == slot.request.prefix:
                self.c.llama_memory_seq_cp(memory, leader.number, slot.number, -1, -1)
                slot.computed, slot.waits_for = leader.computed, -1

    def _wanted(self, slot: Slot, room: int) -> int:
        """Tokens of a slot's prompt in this step. A leader stops at the end of what it shares."""
        end = len(slot.context)
        assert slot.request is not None
        if any(other.waits_for == slot.number for other in self.slots):
            end = slot.request.prefix
        return min(end - slot.computed, room)

    def poll(self, timeout_s: float) -> Events:
        self._share()
        active = [slot for slot in self.slots if slot.request is not None and slot.waits_for < 0]
        if not active:
            time.sleep(min(timeout_s, 0.02))
            return []
        active.sort(key=lambda slot: slot.made == 0)
        batch, count, ends = self.batch, 0, []
        for slot in active:
            wanted = self._wanted(slot, N_BATCH - count)
            for position in range(slot.computed, slot.computed + wanted):
                batch.token[count] = slot.context[position]
                batch.pos[count] = position
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = slot.number
                batch.logits[count] = position + 1 == len(slot.context)
                count += 1
            slot.computed += wanted
            if wanted and slot.computed == len(slot.context):
                ends.append((slot, count - 1))
        batch.n_tokens = count
        if status := self.c.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode: {status}")
        return [self._advance(slot, place) for slot, place in ends]

    def _advance(self, slot: Slot, place: int) -> tuple[str, list[int], bool]:
        row = self.c.llama_get_logits_ith(self.context, place)
        logits = self.np.ctypeslib.as_array(
            ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
        )
        token = int(logits.argmax())
        request = slot.request
        assert request is not None
        slot.context.append(token)
        slot.made += 1
        done = slot.made == request.new
        if done:
            slot.context.pop()  # never computed
            slot.request = None
            self._assign()
        return request.key, [token], done

    def cancel(self, keys: list[str]) -> None:
        self.queue = [request for request in self.queue if request.key not in keys]
        for slot in self.slots:
            if slot.request is not None and slot.request.key in keys:
                slot.request = None

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.c.llama_free(self.context)


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two contexts begin with in common."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


if __name__ == "__main__":
    main(LlamaCpp())
