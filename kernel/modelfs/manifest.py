"""What a model is made of, as its manifest says: which blobs, of what base, whose, and how it came to be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import msgspec
from llmasos.syscalls.errors import Corrupt
from msgspec import Meta, Struct

SCHEMA = 1
MAX_MANIFEST = 4 * 1024 * 1024

Digest = Annotated[str, Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")]
Size = Annotated[int, Meta(ge=0, le=2**53)]


class ManifestFile(Struct, frozen=True):
    """A file of a model: its name, "sha256:…" and bytes."""

    path: FileName
    digest: Digest
    size: Size


class Lineage(Struct, frozen=True, omit_defaults=True):
    """How a model came to be that was made here. `base`: the digest of the model that was trained, or merged
    with the adapter of digest `adapter`. `run`: the training run's id; `dataset`: the digest of the data;
    `recipe`: a training.Recipe as JSON; `version`: of LLMasOS. The rest is the end of the run, as in
    training.TrainResult."""

    base: str
    run: str = ""
    adapter: str = ""
    dataset: str = ""
    recipe: str = ""
    version: str = ""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    eval_loss: float | None = None


class Manifest(Struct, frozen=True, omit_defaults=True):
    """What a model is. `created` is seconds since the epoch. `base`: this is an adapter, of the model whose
    manifest has this digest. `owner`: only who commands this tenant sees it; empty: everybody does.

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
    base: Annotated[str, Meta(pattern=r"\A(sha256:[0-9a-f]{64})?\Z")] = ""
    owner: str = ""
    lineage: Lineage | None = None
    name: str = ""
    digest: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    @property
    def digests(self) -> set[str]:
        """The blobs that the model consists of; what `gc` and `unlink` take as pinned."""
        return {f.digest for f in self.files} | ({self.base} if self.base else set())

    @property
    def content(self) -> bytes:
        """What `digest` is of. When it was pulled is not part of what it is: pulled again, a model has the
        same digest."""
        return msgspec.json.encode(msgspec.structs.replace(self, created=0.0, name="", digest=""))


_from_json = msgspec.json.Decoder(Manifest)


def digest_of(data: bytes) -> str:
    """ "sha256:…" of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """ "sha256:…" of a file's content."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def decoded(model: object, data: bytes) -> Manifest:
    """The manifest of `model` that a file holds. Raises Corrupt."""
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
    return manifest
