"""What the Tab key knows: names of models and pids, from the daemon if one runs. Never starts one."""

from __future__ import annotations

from llmasos.syscalls import address, errors

# A key press must not hang: whatever takes longer completes nothing.
PATIENCE_S = 0.5


def models(incomplete: str) -> list[str]:
    """Installed models that begin with `incomplete`, without the tag `latest`."""
    names = [path.removeprefix("/models/").replace(":latest", "", 1) for path in _ls("/models")]
    return [name for name in names if name.startswith(incomplete)]


def pids(incomplete: str) -> list[str]:
    """Processes that the caller may see."""
    return [number for path in _ls("/proc") if (number := path.rsplit("/", 1)[-1]).startswith(incomplete)]


def snapshots(incomplete: str) -> list[str]:
    """The caller's snapshots."""
    names = [path.removeprefix("/sessions/") for path in _ls("/sessions")]
    return [name for name in names if name.startswith(incomplete)]


def paths(incomplete: str) -> list[str]:
    """Entries of the model filesystem in the folder that `incomplete` names so far."""
    return [path for path in _ls(incomplete.rpartition("/")[0] or "/") if path.startswith(incomplete)]


def _ls(path: str) -> list[str]:
    from ..client import Client
    from ..daemon import is_listening

    where = address.socket_address()
    if not is_listening(where):
        return []
    try:
        with Client(where, timeout_s=PATIENCE_S) as client:
            return [entry.path for entry in client.ls(path)]
    except errors.LLMasOSError:
        return []
