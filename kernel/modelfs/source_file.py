"""`file:/path`: a folder as transformers or peft saves it, or one GGUF file. Its files are copied."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llmasos.syscalls.errors import PullFailed, RefusedFile

from . import layout
from .origin import GGUF, Origin
from .staging import MAX_TEXT, Staging


def fetch(place: str, stage: Staging) -> Origin:
    """Copies what lies at `place`. Raises PullFailed, RefusedFile, UnsupportedModel, Corrupt."""
    path = Path(place).expanduser().absolute()
    origin = f"file:{path}"
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            if path.suffix != ".gguf":
                raise RefusedFile(f"{path.name} is no .gguf file", hint="give a folder or a .gguf file")
            stage.choose([path.name], lambda name: _text(path.with_name(name)))
            _copy(path, GGUF, stage)
            return Origin(origin, "")
        names = [entry.name for entry in os.scandir(path) if not entry.is_dir()]
        names += [str(found.relative_to(path)) for found in path.glob(layout.POOLINGS)]
        return Origin(origin, _fetch_folder(path, names, stage))
    except FileNotFoundError:
        raise PullFailed(f"there is no {path}", hint="the path must exist for the daemon, too") from None
    except PermissionError:
        raise PullFailed(
            f"{path} may not be read", hint="give the daemon's user the right to read it"
        ) from None


def _fetch_folder(path: Path, names: list[str], stage: Staging) -> str:
    layout.refuse_code(names)
    chosen = stage.choose(names, lambda name: _text(path / name))
    for name in chosen.texts:
        stage.add_text(name, _text(path / name))
    for name in filter(layout.is_license, names):
        stage.add_text("LICENSE", _text(path / name))
    for name in chosen.weights:
        _copy(path / name, GGUF if name.endswith(".gguf") else name, stage)
    card = _text(path / "README.md").decode(errors="replace") if "README.md" in names else ""
    return layout.license_of_card(card)


def _copy(path: Path, name: str, stage: Staging) -> None:
    size = _regular(path)
    with path.open("rb") as source:
        stage.copy(name, source, size)


def _text(path: Path) -> bytes:
    if (size := _regular(path)) > MAX_TEXT:
        raise RefusedFile(f"{path.name} of {size} bytes", hint=f"at most {MAX_TEXT} are read", file=path.name)
    return path.read_bytes()


def _regular(path: Path) -> int:
    """Size of a regular file; a pipe or a device would never end."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise RefusedFile(f"{path.name} is no regular file", file=path.name)
    return about.st_size
