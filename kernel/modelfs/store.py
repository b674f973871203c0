"""The model filesystem on disk, and the only code that writes to it.

    <home>/modelfs/blobs/sha256-<hex>           immutable files, each by the hash of its content
    <home>/modelfs/manifests/<name>/<tag>.json  which blobs a model is made of
    <home>/modelfs/derived/<hex>-<anything>     what drivers made of blobs; kept as long as the blob
    <home>/modelfs/sessions/                    snapshots of processes (session_files.py)
    <home>/modelfs/swap/                        contexts pushed out of memory; swept at boot (kernel/tiers.py)
    <home>/modelfs/tmp/                         what is not finished; wheels/ survives a failed import
    <home>/modelfs/imports.lock                 held shared by whoever adds blobs, exclusively by `gc`

The disk is the truth and nothing is cached: an importer is another process that adds models at any time.
A file appears under its final name only complete and synced (temporary name, fsync, rename, fsync of the
folder), so a crash at any moment leaves at most unreferenced blobs and things in tmp/, which `gc` removes.

Drivers write to derived/ alone, and only what can be made again. A file there begins with the first 32 hex
digits of the SHA-256 of a weight file; its name ends in `.tmp` until it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from llmasos.drivers.base import File
from llmasos.syscalls.errors import Corrupt, InvalidArgument, NoSuchFile, NoSuchModel, Unavailable
from llmasos.syscalls.types import FileInfo, FileKind
from msgspec import Meta, Struct

from . import catalogue
from .durable import sync_folder
from .names import ROOT, ModelName, ModelPath, did_you_mean, parse_name, parse_path
from .session_files import SessionFiles

SCHEMA = 1
MAX_READ = 1024 * 1024
JOURNAL_ROOM = 16 * 1024 * 1024
"""Bytes of disk that are left for what frees some: nothing that adds to the journal may take them."""

MAX_MANIFEST = 4 * 1024 * 1024
WHEELS_KEPT_S = 7 * 86400
"""A downloaded wheel whose import failed is kept this long, so that a rerun need not fetch it again."""

UNFINISHED_KEPT_S = 3600
"""A file of derived/ that nobody has written to for so long will not be finished."""

DERIVED_PREFIX = 32
"""Hex digits of a blob's digest that the names of what was derived from it begin with."""

_CHUNK = 4 * 1024 * 1024

Digest = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")]
Size = Annotated[int, Meta(ge=0, le=2**53)]


class ManifestFile(Struct, frozen=True):
    """A file of a model: its name, "sha256:…" and bytes."""

    path: FileName
    digest: Digest
    size: Size


class Manifest(Struct, frozen=True, omit_defaults=True):
    """What a model is. `created` is seconds since the epoch.

    `name` (with tag) and `digest` (of all but `created`) are filled in on reading and never written.
    """

    schema: int
    source: str
    architecture: str
    parameters: Size
    quantization: str
    context_length: Size
    license: str
    created: float
    files: Annotated[list[ManifestFile], Meta(max_length=4096)]
    name: str = ""
    digest: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def digests(self) -> set[str]:
        """The blobs that the model needs; what `gc` and `unlink` take as pinned."""
        return {f.digest for f in self.files}


_from_json = msgspec.json.Decoder(Manifest)


def hash_file(path: Path) -> str:
    """ "sha256:…" of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return "sha256:" + digest.hexdigest()


class ModelFS:
    """The model filesystem of one home folder. Makes its folders (0700) if they are missing."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "modelfs"
        self.blobs = self.folder / "blobs"
        self.manifests = self.folder / "manifests"
        self.derived = self.folder / "derived"
        self.swap = self.folder / "swap"
        self.sessions = SessionFiles(self.folder / "sessions")
        self.tmp = self.folder / "tmp"
        self.wheels = self.tmp / "wheels"
        for folder in (
            home,
            self.folder,
            self.blobs,
            self.manifests,
            self.derived,
            self.tmp,
            self.wheels,
        ):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    # -- looking --------------------------------------------------------------------------------------

    def resolve(self, name: str) -> Manifest:
        """The manifest of `name[:tag]`. Raises InvalidArgument, NoSuchModel, Corrupt."""
        model = parse_name(name)
        try:
            return self._load(model)
        except FileNotFoundError:
            raise self._no_such_model(model) from None

    def find(self, fits: Callable[[Manifest], bool]) -> Manifest | None:
        """The first model that `fits`, whatever its name is. One that is damaged fits nothing."""
        for model in self._models():
            with contextlib.suppress(Corrupt, FileNotFoundError):
                if fits(manifest := self._load(model)):
                    return manifest
        return None

    def ls(self, path: str) -> list[FileInfo]:
        """The entries of /, /models or /models/NAME:TAG. Raises NoSuchFile, NoSuchModel, InvalidArgument."""
        if path.rstrip("/") == "":
            return [FileInfo(ROOT, FileKind.FOLDER, 0)]
        found = self._find(path)
        if found is None:
            return [self._model_info(model) for model in self._models()]
        where, manifest = found
        if where.file:
            return [self._file_info(where, manifest)]
        return [self._file_info(ModelPath(where.model, f.path), manifest) for f in manifest.files]

    def stat(self, path: str) -> FileInfo:
        """One entry. Raises NoSuchFile, NoSuchModel, InvalidArgument."""
        found = self._find(path)
        if found is None:
            return FileInfo(ROOT, FileKind.FOLDER, 0)
        where, manifest = found
        return self._file_info(where, manifest) if where.file else self._model_info(where.model)

    def read(self, path: str, offset: int, length: int) -> tuple[int, bytes]:
        """Size of a model's file, and its bytes from `offset`, at most `length` (at most 1 MiB) of them."""
        if offset < 0 or not 0 <= length <= MAX_READ:
            raise InvalidArgument(f"cannot read {length} bytes from {offset}", field="length")
        found = self._find(path)
        if found is None or not found[0].file:
            raise NoSuchFile(f"{path[:120]} is a folder", hint=f"see `llsh ls {path[:120]}`", path=path[:120])
        where, manifest = found
        file = self._entry(where, manifest)
        try:
            with self.blob(file.digest).open("rb", buffering=0) as blob:
                return file.size, os.pread(blob.fileno(), length, offset)
        except FileNotFoundError:
            raise Corrupt(
                f"a blob of {where.model} is missing", hint=f"fetch it again: llsh pull {where.model}"
            ) from None

    def driver_files(self, manifest: Manifest) -> dict[str, File]:
        """What a driver loads: where each file lies and what it must hash to."""
        return {f.path: File(str(self.blob(f.digest)), f.digest, f.size) for f in manifest.files}

    def require_room(self) -> None:
        """Raises Unavailable when the disk is so full that the journal may soon have no room for more."""
        disk = os.statvfs(self.folder)
        if disk.f_bavail * disk.f_frsize < JOURNAL_ROOM:
            raise Unavailable(
                f"the disk that holds {self.folder.parent} is full",
                hint="see `llsh df`; remove models or files",
            )

    def usage(self) -> tuple[int, int]:
        """Bytes of all blobs and of what was derived from them, and how many blobs there are."""
        total = count = 0
        for folder in (self.blobs, self.derived):
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += folder is self.blobs
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat().st_size
        return total, count

    def blob(self, digest: str) -> Path:
        """Where the blob "sha256:<hex>" lies."""
        return self.blobs / digest.replace(":", "-")

    # -- changing -------------------------------------------------------------------------------------

    def link(self, source: str, target: str) -> FileInfo:
        """Gives the model `source` the second name `target`, which is replaced if it exists."""
        model = parse_name(target)
        with self.importing():  # or `gc` could take the blobs if `source` were unlinked just now
            self.commit(model, self.resolve(source))
        return self._model_info(model)

    def unlink(self, name: str, pinned: set[str]) -> int:
        """Removes a model's name and the blobs that neither another name nor `pinned` (digests of blobs)
        needs. Returns the bytes freed. Raises InvalidArgument, NoSuchModel."""
        model = parse_name(name)
        path = self._manifest_path(model)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            raise self._no_such_model(model) from None
        sync_folder(path.parent)
        self._remove_empty(path.parent)
        return self.gc(pinned)

    def gc(self, pinned: set[str]) -> int:
        """Removes blobs that neither a manifest nor `pinned` needs, what was derived from them, and what is
        left in tmp/. Returns the bytes freed.

        Does nothing while an import runs: its blobs have no manifest yet. So the kernel calls this at boot
        and whenever an importer has ended. While a manifest is damaged (`ls` and `fsck` say so), nobody can
        tell which blobs it needs, so all of them stay and only tmp/ is swept.
        """
        with self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if not alone:
                return 0
            freed = self._sweep_tmp()
            needed = set(pinned)
            try:
                for model in self._models():
                    with contextlib.suppress(FileNotFoundError):
                        needed |= self._load(model).digests
            except Corrupt:
                return freed
            for path in self.blobs.iterdir():
                if path.name.replace("-", ":", 1) not in needed:
                    freed += path.lstat().st_size
                    path.unlink()
            freed += self._sweep_derived(needed)
        return freed

    def fsck(self) -> list[str]:
        """Problems found, one a line; every blob is read and hashed."""
        problems: list[str] = []
        needed: set[str] = set()
        checked: dict[str, str] = {}
        for model in self._models():
            try:
                manifest = self._load(model)
            except (Corrupt, FileNotFoundError) as problem:
                problems.append(f"{model}: {problem}")
                continue
            needed |= manifest.digests
            for file in manifest.files:
                if file.digest not in checked:
                    checked[file.digest] = self._check_blob(file)
                if problem_ := checked[file.digest]:
                    problems.append(f"{model}: {file.path}: {problem_}")
        with self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if alone:
                orphans = sorted(
                    p.name for p in self.blobs.iterdir() if p.name.replace("-", ":", 1) not in needed
                )
                problems += [f"blob {name}: no model needs it" for name in orphans]
                problems += [f"tmp/{path.name}: left over from an import" for path in self._leftovers()]
        return problems + self.sessions.check()

    # -- for the importer -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """Keeps `gc` away while blobs are added that no manifest names yet. Ends with the process at the
        latest: the lock is the kernel's."""
        with self._lock(fcntl.LOCK_SH):
            yield

    def put_blob(self, finished: Path, digest: str) -> None:
        """Moves a complete file of tmp/ among the blobs. Replaces a blob of that digest, which mends it if
        it was damaged; who has it open or mapped keeps the old file."""
        fd = os.open(finished, os.O_RDONLY)
        try:
            os.fchmod(fd, 0o444)
            os.fsync(fd)
        finally:
            os.close(fd)
        finished.replace(self.blob(digest))
        sync_folder(self.blobs)

    def link_blob(self, original: Path, digest: str) -> None:
        """Makes a complete file outside (a cache of ours to trust) a blob without copying it: a hard link,
        or a symbolic one if it is on another filesystem."""
        with tempfile.TemporaryDirectory(dir=self.tmp, prefix="link-") as folder:
            temporary = Path(folder) / "blob"
            try:
                os.link(original, temporary)
            except OSError:
                temporary.symlink_to(original)
            temporary.replace(self.blob(digest))
        sync_folder(self.blobs)

    def put_bytes(self, data: bytes) -> tuple[str, int]:
        """Stores a small file. Returns digest and size."""
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.put_blob(self._temporary(data), digest)
        return digest, len(data)

    def commit(self, model: ModelName, manifest: Manifest) -> Manifest:
        """Makes `model` name `manifest`, all of whose blobs must be there; the last step of an import.
        Returns the manifest with name and digest. Raises Corrupt when a blob is missing."""
        for file in manifest.files:
            if not self.blob(file.digest).exists():
                raise Corrupt(f"{model}: {file.path} has no blob", hint="import it again")
        data = msgspec.json.encode(msgspec.structs.replace(manifest, name="", digest=""))
        temporary = self._temporary(data)
        path = self._manifest_path(model)
        while True:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                temporary.replace(path)
                break
            except FileNotFoundError:  # `unlink` has removed the folder in between
                continue
        folder = path.parent
        while folder != self.folder:
            sync_folder(folder)
            folder = folder.parent
        return self._load(model)

    # -- inside ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lock(self, how: int) -> Iterator[bool]:
        with (self.folder / "imports.lock").open("ab") as file:
            try:
                fcntl.flock(file, how)
            except BlockingIOError:
                yield False
                return
            yield True  # closing the file unlocks

    def _temporary(self, data: bytes) -> Path:
        fd, name = tempfile.mkstemp(dir=self.tmp, prefix="file-")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        return Path(name)

    def _manifest_path(self, model: ModelName) -> Path:
        return self.manifests / model.name / f"{model.tag}.json"

    def _models(self) -> list[ModelName]:
        found = []
        for path in sorted(self.manifests.rglob("*.json")):
            if path.is_file():
                found.append(ModelName(str(path.parent.relative_to(self.manifests)), path.stem))
        return found

    def _load(self, model: ModelName) -> Manifest:
        path = self._manifest_path(model)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_MANIFEST + 1)
        except (NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(path) from None
        try:
            manifest = _from_json.decode(data)
        except msgspec.DecodeError as problem:
            raise Corrupt(
                f"the manifest of {model} is damaged: {problem}", hint=f"fetch it again: llsh pull {model}"
            ) from None
        if manifest.schema != SCHEMA:
            raise Corrupt(
                f"the manifest of {model} has schema {manifest.schema}, not {SCHEMA}", hint="update LLMasOS"
            )
        # When it was pulled is not part of what it is: pulled again, a model has the same digest.
        content = msgspec.json.encode(msgspec.structs.replace(manifest, created=0.0, name="", digest=""))
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        return msgspec.structs.replace(manifest, name=str(model), digest=digest)

    def _no_such_model(self, model: ModelName) -> NoSuchModel:
        known = catalogue.load()
        shown = model.name if model.tag == "latest" else str(model)
        if known.sources(model):
            hint = f"fetch it first: llsh pull {shown}"
        else:
            here = self._models()
            near = did_you_mean(shown, [*(m.name for m in here), *map(str, here), *known.models])
            hint = (
                f"did you mean {near}?"
                if near
                else "see `llsh list` for what is here, `llsh pull` brings more"
            )
        return NoSuchModel(f"no model {shown}", hint=hint, model=str(model))

    def _find(self, path: str) -> tuple[ModelPath, Manifest] | None:
        """The first meaning of `path` that exists; None for /models."""
        meanings = parse_path(path)
        if not meanings:
            return None
        for meaning in meanings:
            try:
                return meaning, self._load(meaning.model)
            except FileNotFoundError:
                continue
        raise self._no_such_model(meanings[0].model)

    def _entry(self, where: ModelPath, manifest: Manifest) -> ManifestFile:
        for file in manifest.files:
            if file.path == where.file:
                return file
        near = did_you_mean(where.file, [f.path for f in manifest.files])
        raise NoSuchFile(
            f"{where.model} has no file {where.file}",
            hint=f"did you mean {near}?" if near else f"see `llsh ls {where.model.path}`",
            path=f"{where.model.path}/{where.file}",
        )

    def _file_info(self, where: ModelPath, manifest: Manifest) -> FileInfo:
        file = self._entry(where, manifest)
        return FileInfo(
            f"{where.model.path}/{file.path}", FileKind.FILE, file.size, file.digest, float(manifest.created)
        )

    def _model_info(self, model: ModelName) -> FileInfo:
        try:
            manifest = self._load(model)
        except FileNotFoundError:
            raise self._no_such_model(model) from None
        except Corrupt as problem:
            return FileInfo(model.path, FileKind.MODEL, 0, details={"problem": problem.message[:200]})
        details: dict[str, str | int | float] = {
            "architecture": manifest.architecture,
            "parameters": manifest.parameters,
            "quantization": manifest.quantization,
            "context_length": manifest.context_length,
            "license": manifest.license,
            "source": manifest.source,
        }
        return FileInfo(
            model.path, FileKind.MODEL, manifest.size, manifest.digest, float(manifest.created), details
        )

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.manifests:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    def _leftovers(self) -> list[Path]:
        """What nobody works on in tmp/. Call only with the lock held alone."""
        old = [path for path in self.tmp.iterdir() if path != self.wheels]
        limit = time.time() - WHEELS_KEPT_S
        return old + [path for path in self.wheels.iterdir() if path.lstat().st_mtime < limit]

    def _sweep_tmp(self) -> int:
        freed = 0
        for path in self._leftovers():
            freed += sum(p.lstat().st_size for p in _tree(path))
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return freed

    def _sweep_derived(self, needed: set[str]) -> int:
        """Removes what was derived from blobs that are not `needed`, and what was never finished."""
        freed = 0
        kept = {digest.removeprefix("sha256:")[:DERIVED_PREFIX] for digest in needed}
        limit = time.time() - UNFINISHED_KEPT_S
        for path in self.derived.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a driver may replace and remove files here
                found = path.lstat()
                unfinished = path.name.endswith(".tmp") and found.st_mtime < limit
                if path.name[:DERIVED_PREFIX] not in kept or unfinished:
                    path.unlink()
                    freed += found.st_size
        return freed

    def _check_blob(self, file: ManifestFile) -> str:
        path = self.blob(file.digest)
        try:
            size = path.stat().st_size
            if size != file.size:
                return f"{size} bytes instead of {file.size}"
            return "" if hash_file(path) == file.digest else "its content is not what its digest says"
        except FileNotFoundError:
            return "its blob is missing"
        except OSError as problem:
            return f"cannot be read: {problem.strerror}"


def _tree(path: Path) -> Iterable[Path]:
    return [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
