"""The model filesystem on disk, and the only code that writes to it.

    <home>/modelfs/blobs/sha256-<hex>           immutable files, each by the hash of its content
    <home>/modelfs/manifests/<name>/<tag>.json  which blobs a model is made of;
                                                an adapter: <tag>+<adapter>.json
    <home>/modelfs/derived/<hex>-<anything>     what drivers made of blobs; kept as long as the blob
    <home>/modelfs/sessions/                    snapshots of processes (session_files.py)
    <home>/modelfs/datasets/                    what models are trained on (dataset_files.py)
    <home>/modelfs/runs/<pid>/                  what training processes have in work (runs.py)
    <home>/modelfs/swap/                        contexts pushed out of memory; swept at boot (kernel/tiers.py)
    <home>/modelfs/tmp/                         what is not finished; wheels/ survives a failed import
    <home>/modelfs/imports.lock                 held shared by whoever adds blobs, exclusively by `gc`

The disk is the truth and nothing is cached: an importer is another process that adds models at any time.
A file appears under its final name only complete and synced (temporary name, fsync, rename, fsync of the
folder), so a crash at any moment leaves at most unreferenced blobs and things in tmp/, which `gc` removes.

An adapter names its base by the digest of the base's manifest, a copy of which is a blob. So it goes on
working with the weights that it was made for when the base's name is removed or comes to mean another model;
these stay until the last adapter of them is removed.

Drivers write to derived/ alone, and only what can be made again. A file there begins with the first 32 hex
digits of the SHA-256 of a weight file; its name ends in `.tmp` until it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from llmasos.drivers.base import File
from llmasos.syscalls.errors import (
    AlreadyExists,
    Corrupt,
    InvalidArgument,
    NoSuchFile,
    NoSuchModel,
    StorageFailed,
    Unavailable,
)
from llmasos.syscalls.types import FileInfo, FileKind

from ..shares import is_below
from . import catalogue
from .dataset_files import DatasetFiles
from .durable import remove, sync_folder
from .manifest import MAX_MANIFEST, Manifest, ManifestFile, decoded, digest_of, hash_file
from .names import ROOT, ModelName, ModelPath, did_you_mean, parse_name, parse_path
from .runs import Runs
from .session_files import SessionFiles

MAX_READ = 1024 * 1024
JOURNAL_ROOM = 16 * 1024 * 1024
"""Bytes of disk that are left for what frees some: nothing that adds to the journal may take them."""

WHEELS_KEPT_S = 7 * 86400
"""A downloaded wheel whose import failed is kept this long, so that a rerun need not fetch it again."""

UNFINISHED_KEPT_S = 3600
"""A file of derived/ that nobody has written to for so long will not be finished."""

DERIVED_PREFIX = 32
"""Hex digits of a blob's digest that the names of what was derived from it begin with."""

Sees = Callable[[str], bool]
"""Whether somebody sees what a tenant owns (Subject.may_command). A model that is not seen is as one that
does not exist."""


def everything(owner: str) -> bool:
    """How the kernel itself sees."""
    return True


class ModelFS:
    """The model filesystem of one home folder. Makes its folders (0700) if they are missing."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "modelfs"
        self.blobs = self.folder / "blobs"
        self.manifests = self.folder / "manifests"
        self.derived = self.folder / "derived"
        self.swap = self.folder / "swap"
        self.sessions = SessionFiles(self.folder / "sessions")
        self.datasets = DatasetFiles(self.folder / "datasets")
        self.runs = Runs(self.folder / "runs")
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

    def resolve(self, name: str, sees: Sees = everything) -> Manifest:
        """The manifest of `name[:tag][+adapter]`. Raises InvalidArgument, NoSuchModel, Corrupt."""
        model = parse_name(name)
        try:
            return self._load(model, sees)
        except FileNotFoundError:
            raise self._no_such_model(model, sees) from None

    def base_of(self, manifest: Manifest) -> Manifest:
        """The model that an adapter belongs to, whatever its name stands for by now. Raises Corrupt."""
        try:
            data = self.blob(manifest.base).read_bytes()
        except FileNotFoundError:
            data = b""
        if digest_of(data) != manifest.base:
            raise Corrupt(
                f"the base of {manifest.name} is missing or damaged", hint="pull or train the adapter again"
            )
        base = parse_name(manifest.name).base
        return msgspec.structs.replace(decoded(base, data), name=str(base), digest=manifest.base)

    def find(self, fits: Callable[[Manifest], bool]) -> Manifest | None:
        """The first model that `fits`, whatever its name is, if only an adapter's base. One that is damaged
        fits nothing."""
        for model in self._models():
            with contextlib.suppress(Corrupt, FileNotFoundError):
                if fits(manifest := self._load(model)):
                    return manifest
                if manifest.base and fits(base := self.base_of(manifest)):
                    return base
        return None

    def ls(self, path: str, sees: Sees = everything) -> list[FileInfo]:
        """The entries of /, /models or /models/NAME:TAG. Raises NoSuchFile, NoSuchModel, InvalidArgument."""
        if path.rstrip("/") == "":
            return [FileInfo(ROOT, FileKind.FOLDER, 0)]
        found = self._find(path, sees)
        if found is None:
            return [self._model_info(model) for model in self._seen(sees)]
        where, manifest = found
        if where.file:
            return [self._file_info(where, manifest)]
        return [self._file_info(ModelPath(where.model, f.path), manifest) for f in manifest.files]

    def stat(self, path: str, sees: Sees = everything) -> FileInfo:
        """One entry. Raises NoSuchFile, NoSuchModel, InvalidArgument."""
        found = self._find(path, sees)
        if found is None:
            return FileInfo(ROOT, FileKind.FOLDER, 0)
        where, manifest = found
        return self._file_info(where, manifest) if where.file else self._model_info(where.model)

    def read(self, path: str, offset: int, length: int, sees: Sees = everything) -> tuple[int, bytes]:
        """Size of a model's file, and its bytes from `offset`, at most `length` (at most 1 MiB) of them."""
        if offset < 0 or not 0 <= length <= MAX_READ:
            raise InvalidArgument(f"cannot read {length} bytes from {offset}", field="length")
        found = self._find(path, sees)
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
        """What a driver loads: where each file lies and what it must hash to. Of an adapter: its own files,
        not its base's weights."""
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

    def used(self, path: str) -> int:
        """Bytes of the models of an owner and those below it, each file once; damaged models are not known to
        be theirs."""
        found: dict[str, int] = {}
        for model in self._models():
            with contextlib.suppress(Corrupt, FileNotFoundError):
                manifest = self._load(model)
                if is_below(manifest.owner, path):
                    found |= {file.digest: file.size for file in manifest.files}
        return sum(found.values())

    def blob(self, digest: str) -> Path:
        """Where the blob "sha256:<hex>" lies."""
        return self.blobs / digest.replace(":", "-")

    # -- changing -------------------------------------------------------------------------------------

    def link(self, source: str, target: str, sees: Sees = everything, replace: bool = True) -> FileInfo:
        """Gives the model `source` the second name `target`. An adapter is linked to another adapter's name
        of the same base. Raises InvalidArgument, NoSuchModel, AlreadyExists as `commit`."""
        model = parse_name(target)
        with self.importing():  # or `gc` could take the blobs if `source` were unlinked just now
            manifest = self.resolve(source, sees)
            if manifest.base and parse_name(manifest.name).base != model.base:
                raise InvalidArgument(
                    f"{manifest.name} is an adapter", hint="name it BASE+NAME, of its base", field="target"
                )
            try:
                self.commit(model, manifest, replace)
            except OSError as problem:
                raise StorageFailed(f"{model}: {problem.strerror}", hint="see `llsh df`") from None
        return self._model_info(model)

    def unlink(self, name: str, pinned: set[str], sees: Sees = everything) -> int:
        """Removes a model's name and the blobs that neither another name, an adapter, a training run nor
        `pinned` (digests of blobs) needs. Returns the bytes freed. Raises InvalidArgument, NoSuchModel."""
        model = parse_name(name)
        path = self._manifest_path(model)
        try:
            with contextlib.suppress(Corrupt):  # a damaged one is nobody's
                self._load(model, sees)
            path.unlink()
        except FileNotFoundError:
            raise self._no_such_model(model, sees) from None
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
            try:
                needed = pinned | self._needed()
            except Corrupt:
                return freed
            for path in self.blobs.iterdir():
                if path.name.replace("-", ":", 1) not in needed:
                    freed += path.lstat().st_size
                    remove(path)
            freed += self._sweep_derived(needed)
        return freed

    def fsck(self) -> list[str]:
        """Problems found, one a line; every blob is read and hashed."""
        problems: list[str] = []
        checked: dict[str, str] = {}
        for model in self._models():
            try:
                manifest = self._load(model)
            except (Corrupt, FileNotFoundError) as problem:
                problems.append(f"{model}: {problem}")
                continue
            try:
                self._needs(manifest)
            except Corrupt as problem:
                problems.append(f"{model}: {problem.message}")
            for file in manifest.files:
                if file.digest not in checked:
                    checked[file.digest] = self._check_blob(file)
                if problem_ := checked[file.digest]:
                    problems.append(f"{model}: {file.path}: {problem_}")
        return problems + self.sessions.check() + self.datasets.check()

    def garbage(self) -> list[str]:
        """What the next `gc` removes of blobs and tmp/, one a line; nothing while an import runs."""
        found: list[str] = []
        with self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
            if alone:
                found += [f"tmp/{path.name}: left over from an import" for path in self._leftovers()]
                with contextlib.suppress(Corrupt):
                    needed = self._needed()
                    names = sorted(path.name for path in self.blobs.iterdir())
                    orphans = [name for name in names if name.replace("-", ":", 1) not in needed]
                    found += [f"blob {name}: no model needs it" for name in orphans]
        return found

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
        digest = digest_of(data)
        self.put_blob(self._temporary(data), digest)
        return digest, len(data)

    def commit(self, model: ModelName, manifest: Manifest, replace: bool = True) -> Manifest:
        """Makes `model` name `manifest`, all of whose blobs must be there; the last step of an import.
        Returns the manifest with name and digest. What is committed again is left as it is.

        Raises Corrupt when a blob is missing, InvalidArgument when an adapter's name is given to what is
        none or the other way round, AlreadyExists when the name is taken, unless told to `replace`."""
        if bool(model.adapter) != bool(manifest.base):
            raise InvalidArgument(
                f"{model.short} is {'no' if manifest.base else 'the'} name of an adapter",
                hint="an adapter is called BASE+NAME, and nothing else is",
                field="model",
            )
        for digest in sorted(manifest.digests):
            if not self.blob(digest).exists():
                raise Corrupt(f"{model}: the blob {digest} is missing", hint="import it again")
        temporary = self._temporary(
            msgspec.json.encode(msgspec.structs.replace(manifest, name="", digest=""))
        )
        path = self._manifest_path(model)
        try:
            while not self._named(temporary, model, manifest, replace):
                continue  # `unlink` has removed the folder or the model in between
        finally:
            temporary.unlink(missing_ok=True)
        folder = path.parent
        while folder != self.folder:
            sync_folder(folder)
            folder = folder.parent
        return self._load(model)

    # -- inside ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lock(self, how: int) -> Iterator[bool]:
        path = self.folder / "imports.lock"
        is_kept = path.exists() and not os.access(path, os.W_OK)  # a copy on a disk that is read-only
        with path.open("rb" if is_kept else "ab") as file:
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

    def _named(self, file: Path, model: ModelName, manifest: Manifest, replace: bool) -> bool:
        """Gives a manifest's file its name, if the way there does not vanish meanwhile."""
        path = self._manifest_path(model)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            try:
                if replace:
                    file.replace(path)
                else:
                    os.link(file, path)
                return True
            except FileExistsError:
                if self._load(model).digest == digest_of(manifest.content):
                    return True
                raise AlreadyExists(
                    f"there is a model {model.short}",
                    hint=f"choose another name, or remove it: llsh rm {model.short}",
                ) from None
        return False

    def _needed(self) -> set[str]:
        """The blobs that some name or training run needs. Raises Corrupt: nobody can tell."""
        needed: set[str] = set()
        for model in self._models():
            with contextlib.suppress(FileNotFoundError):
                needed |= self._needs(self._load(model))
        for base in self.runs.bases():
            needed |= base.digests
        return needed

    def _needs(self, manifest: Manifest) -> set[str]:
        """The blobs of a model and, if it is an adapter, of its base. Raises Corrupt."""
        return manifest.digests | (self.base_of(manifest).digests if manifest.base else set())

    def _manifest_path(self, model: ModelName) -> Path:
        return self.manifests / model.name / f"{model.variant}.json"

    def _models(self) -> list[ModelName]:
        found = []
        for path in sorted(self.manifests.rglob("*.json")):
            if path.is_file():
                tag, _, adapter = path.stem.partition("+")
                found.append(ModelName(str(path.parent.relative_to(self.manifests)), tag, adapter))
        return found

    def _seen(self, sees: Sees) -> list[ModelName]:
        """The models that are not hidden, damaged ones among them."""
        found = []
        for model in self._models():
            with contextlib.suppress(FileNotFoundError):
                with contextlib.suppress(Corrupt):
                    self._load(model, sees)
                found.append(model)
        return found

    def _load(self, model: ModelName, sees: Sees = everything) -> Manifest:
        """Raises FileNotFoundError (hidden ones, too), Corrupt."""
        path = self._manifest_path(model)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_MANIFEST + 1)
        except (NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(path) from None
        manifest = decoded(model, data)
        if manifest.owner and not sees(manifest.owner):
            raise FileNotFoundError(path)
        return msgspec.structs.replace(manifest, name=str(model), digest=digest_of(manifest.content))

    def _no_such_model(self, model: ModelName, sees: Sees) -> NoSuchModel:
        known = catalogue.load()
        if known.sources(model):
            hint = f"fetch it first: llsh pull {model.short}"
        else:
            here = self._seen(sees)
            near = did_you_mean(model.short, [*(m.short for m in here), *map(str, here), *known.models])
            hint = (
                f"did you mean {near}?"
                if near
                else "see `llsh list` for what is here, `llsh pull` brings more"
            )
        return NoSuchModel(f"no model {model.short}", hint=hint, model=str(model))

    def _find(self, path: str, sees: Sees) -> tuple[ModelPath, Manifest] | None:
        """The first meaning of `path` that exists; None for /models."""
        meanings = parse_path(path)
        if not meanings:
            return None
        for meaning in meanings:
            try:
                return meaning, self._load(meaning.model, sees)
            except FileNotFoundError:
                continue
        raise self._no_such_model(meanings[0].model, sees)

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
            raise self._no_such_model(model, everything) from None
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
        if manifest.base:
            details["base"] = parse_name(manifest.name).base.short
        if manifest.owner:
            details["owner"] = manifest.owner
        if manifest.lineage:
            found = msgspec.to_builtins(manifest.lineage)
            details |= {f"lineage.{name}": value for name, value in found.items() if value is not None}
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
                    remove(path)
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
