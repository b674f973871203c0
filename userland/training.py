"""Training from Python: a data set is sent, a run started and followed, its result told.

    run = training.start(client, "smollm2", training.send_dataset(client, "data.jsonl"), "my-adapter")
    print(training.follow(run, training.TrainBar(run.model)).model)

`LLM.train` and `LLM.fine_tune` (llm.py) and `llsh train` are made of this."""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from llmasos.syscalls import errors, table, training
from llmasos.syscalls import types as t
from llmasos.syscalls.bounds import refused
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .client import Client

CHUNK = 1 << 20
"""Bytes of a data set that are sent at a time."""

_NAME = re.compile(r"[^A-Za-z0-9._-]")
_LORA = training.Lora.__struct_fields__
_PLAIN = tuple(name for name in training.Recipe.__struct_fields__ if name not in ("lora", "mesh"))
OPTIONS = (*_PLAIN, *_LORA, *(f"mesh.{name}" for name in training.Mesh.__struct_fields__))
"""What a recipe takes, in one list: names of transformers' TrainingArguments, peft's LoraConfig, the mesh."""

Show = Callable[[int, int], None]
"""Told how many bytes of how many are sent."""


def make_recipe(options: Mapping[str, Any]) -> training.Recipe:
    """A recipe of OPTIONS by name; values may be text. `mesh` may be a mapping, too. Raises InvalidArgument
    naming the option."""
    plain: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {"lora": {}, "mesh": {}}
    for name, value in options.items():
        if name in _LORA:
            is_list = name == "target_modules" and isinstance(value, str)
            parts["lora"][name] = [v.strip() for v in value.split(",")] if is_list else value
        elif name.startswith("mesh.") and name in OPTIONS:
            parts["mesh"][name.removeprefix("mesh.")] = value
        elif name == "mesh" and isinstance(value, Mapping):
            parts["mesh"].update(value)
        elif name in _PLAIN:
            plain[name] = value
        else:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OPTIONS)}"
            raise errors.InvalidArgument(f"a recipe has no {name!r}", hint=hint, field=name)
    try:
        return msgspec.convert({**plain, **parts}, training.Recipe, strict=False)
    except msgspec.ValidationError as problem:
        field, words = refused(problem, training.Recipe)
        name = field.removeprefix("lora.") or "recipe"
        raise errors.InvalidArgument(f"{name}: {words}", field=name) from None


def send_dataset(
    client: Client, path: str | Path, name: str = "", show: Show | None = None, *, replace: bool = True
) -> str:
    """Makes a local file the data set `name` (without one: what the file is called), unless it is that
    already. Returns the name. Raises NoSuchFile, PermissionDenied, QuotaExceeded, StorageFailed,
    AlreadyExists when another one is called so and not to be replaced."""
    file = Path(path).expanduser()
    name = name or _NAME.sub("-", file.name).lstrip("._-")[:64] or "data"
    try:
        size = file.stat().st_size
        if known := _known(client, name):
            if _is(known, file, size):
                return name
            if not replace:
                raise errors.AlreadyExists(f"there is a data set {name}")
        with file.open("rb") as source:
            done = 0
            while True:
                data = source.read(CHUNK)
                last = len(data) < CHUNK
                try:
                    client.call(table.Write(f"/datasets/{name}", done, data, last))
                except errors.InvalidArgument as problem:
                    if not done or problem.details.get("size") != 0:
                        raise
                    done = source.seek(0)  # the kernel was started again and knows nothing unfinished
                    continue
                done += len(data)
                if show is not None:
                    show(done, size)
                if last:
                    return name
    except OSError as problem:
        raise errors.NoSuchFile(f"{file}: {problem.strerror}", path=str(file)) from None


def _known(client: Client, name: str) -> t.FileInfo | None:
    try:
        return client.call(table.Stat(f"/datasets/{name}"))
    except errors.NotFound:
        return None


def _is(known: t.FileInfo, file: Path, size: int) -> bool:
    if known.size != size:
        return False
    with file.open("rb") as source:
        return known.digest == "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training process: `model` is the name that what it makes will have. It ends with the session that
    started it unless `detached`."""

    client: Client
    pid: int
    model: str
    detached: bool = False

    def events(self, after: int = 0) -> Iterator[training.TrainEvent]:
        """What it tells, from its beginning but for the first `after` events, until it ends; told anew when
        the daemon was away meanwhile, as steps are that are computed again. Raises what it failed of."""
        with self.client.stream(table.Follow(self.pid, after)) as stream:
            yield from stream

    def wait(self) -> training.TrainResult:
        """What it made; its process is gone then. Raises what it failed of, ProcessEnded when it was
        killed."""
        return follow(self)

    def kill(self) -> None:
        self.client.kill(self.pid)

    def stop(self) -> None:
        """It computes nothing until `cont`; after half a minute it gives up its memory, too."""
        self.client.kill(self.pid, t.Signal.STOP)

    def cont(self) -> None:
        self.client.kill(self.pid, t.Signal.CONT)


def start(
    client: Client,
    model: str,
    dataset: str,
    name: str,
    recipe: training.Recipe | None = None,
    *,
    sched_class: str = "batch",
    nice: int = 0,
    device: str = "",
    label: str = "",
    detached: bool = False,
) -> TrainingRun:
    """Starts training `model` on the data set /datasets/`dataset`. Raises what `table.Train` names."""
    call = table.Train(
        model,
        dataset,
        name,
        recipe or training.Recipe(),
        t.SchedClass(sched_class),
        nice,
        device,
        label,
        detached,
    )
    reply = client.call(call)
    return TrainingRun(client, reply.pid, reply.result, detached)


def follow(run: TrainingRun, bar: TrainBar | None = None) -> training.TrainResult:
    """Shows how a run goes until it ends, and takes its process away. An interrupt (Ctrl-C) kills it unless
    it is detached. Raises what it failed of, ProcessEnded when it was killed."""
    try:
        with bar or _Silent():
            for event in run.events():
                if bar is not None:
                    bar.show(event)
    except KeyboardInterrupt:
        if not run.detached:
            run.kill()
            run.client.wait(run.pid)
        raise
    except errors.Unavailable as problem:
        if not isinstance(problem, errors.StorageFailed):
            raise  # the daemon is away; the run is not over
        run.client.wait(run.pid)
        raise
    except errors.LLMasOSError:
        run.client.wait(run.pid)
        raise
    end = run.client.wait(run.pid)
    if end.trained is None:
        raise errors.ProcessEnded(f"run {run.pid} has ended: {end.reason}", hint="see `llsh dmesg`")
    return end.trained


class _Silent:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class TrainBar:
    """A progress bar on stderr: steps, loss, pace, time left."""

    def __init__(self, title: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._title = title
        self._tasks: dict[str, TaskID] = {}
        self._step: training.TrainEvent | None = None
        self._eval = ""

    def sent(self, done: int, size: int) -> None:
        """How much of the data set is sent."""
        self._update("send", done, size, f"{done / 1e6:.1f} of {size / 1e6:.1f} MB")

    def show(self, event: training.TrainEvent) -> None:
        match event.phase:
            case "prepare":
                self._update("prepare", event.step, event.steps, f"{event.tokens} tokens")
            case "eval" if event.eval_loss is not None:
                self._eval = f", eval {event.eval_loss:.4f}"
                if self._step is not None:
                    self._show_step(self._step)
            case "train":
                self._step = event
                self._show_step(event)

    def _show_step(self, event: training.TrainEvent) -> None:
        told = f"{event.step}/{event.steps}"
        if event.loss is not None:
            told += f"  loss {event.loss:.4f}{self._eval}"
        told += f"  {event.tokens_per_s:.0f} tokens/s"
        if event.eta_s:
            told += f"  {_duration(event.eta_s)} left"
        self._update("train", event.step, event.steps, told)

    def _update(self, phase: str, done: int, total: int, told: str) -> None:
        if (task := self._tasks.get(phase)) is None:
            label = f"{phase} {self._title}" if phase == "train" else phase
            task = self._tasks[phase] = self._progress.add_task(label, total=None, told="")
        self._progress.update(task, completed=done, total=total or None, told=told)

    def __enter__(self) -> TrainBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def bar_for(title: str, progress: bool | None) -> TrainBar | None:
    """A bar if it is wanted; None: when stderr is a terminal."""
    show = sys.stderr.isatty() if progress is None else progress
    return TrainBar(title) if show else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
