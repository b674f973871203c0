"""A run from its first step to its result: what is learnt, measured, told and kept, in which order.

Between two steps the state is whole: weights, moments and Progress. Only that is ever written; all else
follows from the recipe and the number of the step, so a run that goes on computes the same again, bit for
bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from llmasos.syscalls import errors
from llmasos.syscalls.training import Mesh, Method, TrainEvent, TrainResult
from msgspec.structs import replace

from ..base import TrainSpec
from ..torch.ranks import Ranks
from . import result
from .batches import Batches
from .checkpoints import Checkpoints, Progress
from .crew import Crew
from .division import divide, unit_of
from .gate import Gate
from .metrics import Metrics
from .model import Built, build, computes_bf16, device_of
from .optimizer import Optimizer

SAVE_S = 30.0
"""Seconds of computing between checkpoints, where the recipe does not say."""

Tell = Callable[[TrainEvent], None]


class Run:
    """Loads what `spec` says and takes up where an earlier trainer was. `tell` gets what happens. Raises
    errors of the recipe, the data and the model before anything is computed, the same on all ranks of a
    group."""

    def __init__(self, spec: TrainSpec, gate: Gate, tell: Tell, ranks: Ranks | None = None) -> None:
        self._spec, self._recipe, self._gate, self._tell = spec, spec.recipe, gate, tell
        self._folder = Path(spec.folder)
        self._crew = crew = Crew(self._recipe.mesh, ranks)
        self._device = device_of(spec.device) if ranks is None else ranks.device
        bf16 = computes_bf16(self._recipe, self._device)
        self._built, self._batches = crew.agree(lambda: self._prepare(bf16))
        self._trained = sum(p.numel() for p in self._built.trained.parameters() if p.requires_grad)
        self._division = divide(self._built, self._recipe, crew, bf16, self._device, gate)
        self._objective = self._division.objective
        self._optimizer = Optimizer(
            self._division.parameters, self._recipe, self._batches.steps, crew, self._division.tied
        )
        self._checkpoints = Checkpoints(self._folder / "checkpoints", self._identity(), crew)
        state = self._optimizer.blank()
        if found := self._checkpoints.load(state):
            self._progress = found
            self._optimizer.restore(state, self._progress.step)
        else:
            self._progress = Progress()
        self._before = self._progress.seconds  # computed by earlier trainers
        self._begun = self._progress
        self._saved = self._progress
        self._metrics = Metrics(self._folder, self.step, self.eval_step) if crew.leads else None

    def _prepare(self, bf16: bool) -> tuple[Built, Batches]:
        """What a rank does without the others."""
        recipe = self._recipe
        built = build(self._spec, self._device, bf16)
        ranks, even, unit = self._crew.data_ranks, recipe.mesh.ranks > 1, unit_of(recipe)
        return built, Batches(Path(self._spec.data), recipe, built.vocab_size, ranks, even, unit)

    def _identity(self) -> str:
        """What tells a run's checkpoints from another's. The number of ranks may change on the way, if a step
        learns from as many rows as before."""
        recipe, ranks = self._recipe, self._crew.data_ranks
        rows = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * ranks
        recipe = replace(
            recipe, mesh=Mesh(), per_device_train_batch_size=1, gradient_accumulation_steps=min(rows, 4096)
        )
        files = {name: file.digest for name, file in sorted(self._spec.files.items())}
        head = (Path(self._spec.data) / "head.json").read_bytes()
        text = msgspec.json.encode((recipe, files, head.decode()), order="sorted")
        return hashlib.sha256(text).hexdigest()

    @property
    def step(self) -> int:
        return self._progress.step

    @property
    def eval_step(self) -> int:
        """The step after which the validation split was measured last."""
        return self._progress.eval_step

    @property
    def steps(self) -> int:
        return self._batches.steps

    @property
    def memory(self) -> int:
        """Bytes of tensors that only this run has."""
        return self._built.resident + self._optimizer.nbytes()

    def train(self) -> TrainResult:
        """Computes until the end, and writes the result. Raises Left when the gate says so, and errors."""
        while True:
            if self._measures():
                self._measure()
            if self._progress.stopped or self.step >= self.steps:
                break
            self._learn()
            if self._saves():
                self.save()
        self.save()
        self._gate.park()
        state = self._crew.whole(self._division.parameters) if self._crew.ranks else None
        if self._metrics:
            result.write(self._folder, self._built, self._spec.name.partition("+")[0], state)
            self._metrics.close()
        return self._result()

    def save(self) -> None:
        """Makes the state after the last whole step durable, and what was told of it."""
        if self._progress.step and self._progress != self._saved:
            self._gate.park()
            if self._metrics:
                self._metrics.sync()
            self._checkpoints.save(self._progress, self._optimizer.state())
            self._saved = self._progress
            self._event("save")

    def _saves(self) -> bool:
        if self._recipe.save_steps:
            return self.step % self._recipe.save_steps == 0
        return self._progress.seconds - self._saved.seconds >= SAVE_S

    def _learn(self) -> None:
        """One step."""
        step = self.step
        crew = self._crew
        work = self._batches.step(step, crew.data)
        self._optimizer.begin()
        # What dropout draws follows from the step too, so no generator's state has to be kept.
        draw = np.random.default_rng([self._recipe.seed, 2, step, crew.data])
        torch.manual_seed(int(draw.integers(2**62)))
        loss = 0.0
        for batch in work.batches:
            self._gate.wait()
            loss += self._objective.learn(batch.to(self._device), work.learnt)
        [loss] = crew.total(loss)
        if not math.isfinite(loss):
            raise errors.DeviceFault(
                f"the loss is not finite at step {step + 1}",
                hint="use a lower learning_rate, more warmup_steps, or bf16 off",
                step=step + 1,
            )
        self._gate.wait()
        norm = self._optimizer.step(step)
        progress = self._progress
        self._progress = replace(
            progress, step=step + 1, tokens=progress.tokens + work.tokens, seconds=self._seconds(), loss=loss
        )
        rate = self._optimizer.rate(step)
        self._event("train", loss=loss, grad_norm=norm, learning_rate=rate)

    def _measures(self) -> bool:
        """Whether the validation split is due."""
        step = self.step
        if not self._batches.validates or not step or step == self._progress.eval_step:
            return False
        if self._recipe.eval_steps:
            due = step % self._recipe.eval_steps == 0
        else:
            due = int(self._batches.epoch(step)) > int(self._batches.epoch(step - 1))
        return due or step == self.steps

    def _measure(self) -> None:
        total, count = 0.0, 0.0
        for numbers in self._batches.validation(self._crew.data):
            self._gate.wait()
            batch = self._batches.validation_batch(numbers).to(self._device)
            part, tokens = self._objective.measure(batch)
            total, count = total + part, count + tokens
        total, count = self._crew.total(total, count)
        loss, progress = total / count, self._progress
        better = progress.best is None or loss < progress.best
        worse = 0 if better else progress.worse + 1
        patience = self._recipe.early_stopping_patience
        self._progress = replace(
            progress,
            eval_step=self.step,
            eval_loss=loss,
            best=loss if better else progress.best,
            worse=worse,
            stopped=bool(patience) and worse >= patience,
            seconds=self._seconds(),
        )
        self._event("eval", eval_loss=loss)

    def _seconds(self) -> float:
        return self._before + self._gate.agreed

    def _event(self, phase: str, **fields: float) -> None:
        now, seconds = self._progress, self._gate.agreed
        steps, tokens = now.step - self._begun.step, now.tokens - self._begun.tokens
        event = TrainEvent(
            phase=phase,
            step=now.step,
            steps=self.steps,
            epoch=self._batches.epoch(now.step),
            tokens=now.tokens,
            tokens_per_s=tokens / seconds if seconds else 0.0,
            memory=self.memory,
            eta_s=seconds / steps * (self.steps - now.step) if steps else 0.0,
            time=self._seconds(),
            **fields,
        )
        if self._metrics:
            self._metrics.add(event)
            self._tell(event)

    def _result(self) -> TrainResult:
        now, method = self._progress, self._recipe.method
        return TrainResult(
            model="",
            digest="",
            method=Method(method),
            steps=now.step,
            epochs=self._batches.epoch(now.step),
            tokens=now.tokens,
            seconds=now.seconds,
            loss=now.loss,
            eval_loss=now.eval_loss,
            trained_parameters=self._trained,
            stopped_early=now.stopped,
        )
