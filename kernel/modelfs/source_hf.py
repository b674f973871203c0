"""`hf:owner/repo[/FILE.gguf][@revision]`: a repository on the Hugging Face Hub, through huggingface_hub.

Its cache (HF_HOME), token (HF_TOKEN), endpoint (HF_ENDPOINT) and offline switch (HF_HUB_OFFLINE) count as
everywhere else, and so does its way of resuming a download. Weights are linked from the cache, not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub as hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars
from llmasos.syscalls.errors import PullFailed, RefusedFile

from . import layout
from .origin import GGUF, Origin, Repository, parse_repository
from .staging import MAX_TEXT, Staging

_T = TypeVar("_T")


class _Listing(NamedTuple):
    """A revision of a repository: its commit, its files with their sizes (0: not known), its license."""

    commit: str
    sizes: dict[str, int]
    license: str


def fetch(place: str, stage: Staging) -> Origin:
    """Brings a repository's files into the cache and stages them.

    Raises InvalidArgument, PullFailed, RefusedFile, UnsupportedModel, Corrupt.
    """
    wanted = parse_repository(place)
    stage.progress.show("resolve", wanted.repo)
    disable_progress_bars()
    needed = layout.ADAPTER_CONFIG if stage.adapter else layout.CONFIG
    listing = _ask(wanted, lambda: _list(wanted, wanted.file or needed))
    fetcher = _Fetcher(wanted, listing, stage)
    top = [name for name in listing.sizes if "/" not in name or layout.is_pooling(name)]
    if wanted.file:
        if not wanted.file.endswith(".gguf"):
            raise RefusedFile(f"{wanted.file} is no .gguf file", file=wanted.file)
        chosen = stage.choose([wanted.file], fetcher.text)
    else:
        layout.refuse_code(top)
        chosen = stage.choose(top, fetcher.text)
    for name in chosen.texts:
        stage.add_text(name, fetcher.text(name))
    for name in filter(layout.is_license, top):
        stage.add_text("LICENSE", fetcher.text(name))
    stage.need(sum(listing.sizes.get(name, 0) for name in chosen.weights if not fetcher.is_cached(name)))
    for name in chosen.weights:
        stage.refer(GGUF if name.endswith(".gguf") else name, fetcher.file(name))
    license_ = listing.license or (
        layout.license_of_card(fetcher.text("README.md").decode(errors="replace"))
        if "README.md" in top
        else ""
    )
    return Origin(f"hf:{wanted.repo}{'/' if wanted.file else ''}{wanted.file}@{listing.commit}", license_)


class _Fetcher:
    """Gets single files of one revision into the cache."""

    def __init__(self, wanted: Repository, listing: _Listing, stage: Staging) -> None:
        self.wanted = wanted
        self.listing = listing
        self.stage = stage
        folder = f"models--{wanted.repo.replace('/', '--')}"
        self.blobs = Path(constants.HF_HUB_CACHE) / folder / "blobs"

    def is_cached(self, name: str) -> bool:
        return isinstance(
            hub.try_to_load_from_cache(self.wanted.repo, name, revision=self.listing.commit), str
        )

    def text(self, name: str) -> bytes:
        if self.listing.sizes.get(name, 0) > MAX_TEXT:
            raise RefusedFile(f"{name} of {self.listing.sizes[name]} bytes", file=name)
        return self._download(name).read_bytes()

    def file(self, name: str) -> Path:
        if self.is_cached(name):
            return self._download(name)
        total = self.listing.sizes.get(name, 0)
        with self.stage.progress.watching("download", name, total, self._incomplete):
            return self._download(name)

    def _download(self, name: str) -> Path:
        def download() -> Path:
            return Path(hub.hf_hub_download(self.wanted.repo, name, revision=self.listing.commit))

        return _ask(self.wanted, download)

    def _incomplete(self) -> int:
        """Bytes there of the file on its way: the cache names it `.incomplete` until it is whole."""
        sizes = [0]
        for path in self.blobs.glob("*.incomplete"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        return max(sizes)


def _list(wanted: Repository, needed: str) -> _Listing:
    """What there is; offline, what the cache holds, if it has the file `needed`."""
    try:
        about: Any = hub.HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as problem:  # offline, or the Hub cannot be reached: what does the cache hold?
        if (cached := _cached(wanted, needed)) is not None:
            return cached
        raise problem
    sizes = {file.rfilename: file.size or 0 for file in about.siblings}
    license_ = getattr(about.card_data, "license", None) if about.card_data else None
    return _Listing(about.sha, sizes, license_ if isinstance(license_, str) else "")


def _cached(wanted: Repository, needed: str) -> _Listing | None:
    """The revision as far as it lies in the cache."""
    probe = hub.try_to_load_from_cache(wanted.repo, needed, revision=wanted.revision)
    if not isinstance(probe, str):
        return None
    snapshot = Path(probe).parent
    files = [*snapshot.iterdir(), *snapshot.glob(layout.POOLINGS)]
    sizes = {str(file.relative_to(snapshot)): file.stat().st_size for file in files if file.is_file()}
    return _Listing(snapshot.name, sizes, "")


def _ask(wanted: Repository, question: Callable[[], _T]) -> _T:
    """`question`, its errors said in our words."""
    where = f"hf:{wanted.repo}"
    try:
        return question()
    except errors.GatedRepoError:
        raise PullFailed(
            f"{where} is gated", hint="accept its terms on huggingface.co and set HF_TOKEN for the daemon"
        ) from None
    except errors.RevisionNotFoundError:
        raise PullFailed(f"{where} has no revision {wanted.revision}") from None
    except errors.RepositoryNotFoundError:
        raise PullFailed(
            f"there is no {where}", hint="check the spelling; private repositories need HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise PullFailed(
            f"{where} is not in the cache and the Hub cannot be reached", hint=_network_hint()
        ) from None
    except errors.EntryNotFoundError:
        raise PullFailed(f"{where} has no file {wanted.file}") from None
    except errors.OfflineModeIsEnabled:
        raise PullFailed(f"{where} is not in the cache", hint="unset HF_HUB_OFFLINE to fetch it") from None
    except Exception as problem:
        if isinstance(problem, MemoryError) or (
            isinstance(problem, OSError) and problem.filename is not None
        ):
            raise  # not the Hub's fault: the disk is full, say
        # Which HTTP library the errors come from changes with huggingface_hub's version.
        text = str(problem).partition("\n")[0][:200]
        raise PullFailed(f"{where}: {type(problem).__name__}: {text}", hint=_network_hint()) from None


def _network_hint() -> str:
    return f"is {constants.ENDPOINT} reachable from here? HF_ENDPOINT names a mirror"
