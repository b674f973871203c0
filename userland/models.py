"""Names of models, and making sure that a model is in the model filesystem before it is used.

A name is one of the catalogue ("smollm2"), an adapter of such a model ("smollm2+mine"), a Hugging Face
repository ("owner/name", or its address), or a local folder or .gguf file, which is imported under a name
that changes when the files do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from .client import Client

# A repository as sources are written, or as a browser shows it.
_HUB = re.compile(r"(?:hf:|https://huggingface\.co/)([^/:@]+/[^/:@]+)(?:@([^/:@]+))?/?")

# The ends of class names in config.json's `architectures`. What ends in Model has no head, but for GPT-2's.
_ENCODERS = (
    ("LMHeadModel", None),
    ("ForSequenceClassification", t.Encodes.CLASSIFY),
    ("ForTokenClassification", t.Encodes.TOKENS),
    ("Model", t.Encodes.EMBED),
    ("ForMaskedLM", t.Encodes.EMBED),
    ("ForPreTraining", t.Encodes.EMBED),
)


def encodes(client: Client, model: str) -> t.Encodes | None:
    """What an installed model makes of texts, by its configuration; None: it generates. An adapter has its
    base's. Raises NoSuchModel."""
    config = json.loads(client.read_file(f"/models/{full_name(model).partition('+')[0]}/config.json"))
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    return next((found for end, found in _ENCODERS if name.endswith(end)), None)


@dataclass(frozen=True, slots=True)
class Reference:
    """A model as the kernel knows it (`name:tag`) and the source to pull it from ("": the catalogue)."""

    name: str
    source: str = ""

    @property
    def path(self) -> str:
        return f"/models/{self.name}"


def reference(name_or_path: str | os.PathLike[str]) -> Reference:
    """What a user means by a name or a path. Raises NoSuchFile for a path that does not exist."""
    text = os.fspath(name_or_path)
    if isinstance(text, str) and text.startswith("file:"):
        return _local(Path(text.removeprefix("file:")).expanduser().absolute())
    if isinstance(name_or_path, os.PathLike) or _looks_local(text):
        return _local(Path(text).expanduser().absolute())
    return remote(text)


def remote(text: str) -> Reference:
    """What somebody means by a name who is elsewhere: it is never taken for a path of this machine."""
    if copied := _HUB.fullmatch(text):
        text = ":".join(filter(None, copied.groups()))
    full = full_name(text)
    name, _, tag = full.partition(":")
    if "/" not in name or "+" in tag:
        return Reference(full)
    revision = "" if tag == "latest" else f"@{tag}"
    return Reference(full, f"hf:{name}{revision}")


def full_name(text: str) -> str:
    """`name:tag`, or `name:tag+adapter`; the tag is `latest` unless given."""
    base, plus, adapter = text.partition("+")
    name, _, tag = base.partition(":")
    return f"{name}:{tag or 'latest'}{plus}{adapter}"


def ensure_model(
    client: Client, name_or_path: str | os.PathLike[str], *, progress: bool | None = None
) -> str:
    """Pulls a model unless it is there, and returns its name in the model filesystem.

    `progress` shows a bar on stderr; None: when stderr is a terminal. Raises PullFailed, RefusedFile,
    UnsupportedModel, NoSuchModel.
    """
    wanted = reference(name_or_path)
    if "+" in wanted.name:
        client.call(table.Stat(wanted.path))  # an adapter is made here, or pulled from where one says
    elif not has_model(client, wanted):
        show = sys.stderr.isatty() if progress is None else progress
        pull(client, wanted, PullBar(wanted.name) if show else None)
    return wanted.name


def has_model(client: Client, wanted: Reference) -> bool:
    try:
        client.call(table.Stat(wanted.path))
    except errors.NotFound:
        return False
    return True


def pull(client: Client, wanted: Reference, bar: PullBar | None = None) -> t.FileInfo:
    """Brings a model into the model filesystem; leaving early (Ctrl-C) cancels it in the kernel."""
    with client.stream(table.Pull(wanted.name, wanted.source)) as events:
        if bar is None:
            return events.result()
        with bar:
            for event in events:
                bar.show(event)
        return events.reply


class PullBar:
    """A progress bar on stderr: one line a file, with speed and time left."""

    def __init__(self, title: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._title = title
        self._tasks: dict[str, TaskID] = {}

    def show(self, event: t.PullEvent) -> None:
        label = f"{event.phase} {event.file or self._title}"
        if (task := self._tasks.get(label)) is None:
            self._finish()
            task = self._tasks[label] = self._progress.add_task(label, total=None)
        self._progress.update(task, completed=event.done, total=event.total or None)

    def _finish(self) -> None:
        """What came before a new phase is done, though its last event may have been left out."""
        for task in self._progress.tasks:
            if task.total is None:
                self._progress.update(task.id, visible=False)
            else:
                self._progress.update(task.id, completed=task.total)

    def __enter__(self) -> PullBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()


def _looks_local(text: str) -> bool:
    if text.startswith((".", "/", "~")) or text.endswith(".gguf"):
        return True
    folder = Path(text)
    return folder.is_dir() and ((folder / "config.json").exists() or any(folder.glob("*.gguf")))


def _local(path: Path) -> Reference:
    """The source of a local model, named after the folder or file and a hash of what it holds now."""
    if not path.exists():
        raise errors.NoSuchFile(f"no model at {path}", path=str(path))
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    state = hashlib.sha256(str(path).encode())
    for file in files:
        stat = file.stat()
        state.update(f"\0{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    base = re.sub(r"[^A-Za-z0-9._-]", "-", path.stem if path.is_file() else path.name).lstrip("._-")
    return Reference(f"{base[:64] or 'model'}-{state.hexdigest()[:8]}:latest", f"file:{path}")
