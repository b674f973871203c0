"""`llmasosd --check`: whether a daemon could serve here, and what to do if not. Changes nothing."""

from __future__ import annotations

import fcntl
import grp
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq
from llmasos.syscalls import address, errors

from .config import Config
from .journal import is_foreign, of_another_version
from .ledger import schema

LEAST_DISK = 1 << 30
LEAST_FILES = 4096


def check(configured: Callable[[], tuple[Config, str]], device_names: Callable[[Config], list[str]]) -> int:
    """Prints a line a finding, "ok" or "bad"; returns how many are bad. `configured` is what a start would
    run with: the configuration and the endpoint, or InvalidArgument."""
    bad = 0
    for fine, text in _findings(configured, device_names):
        print(f"{'ok ' if fine else 'bad'}  {text}")
        bad += not fine
    return bad


def _findings(
    configured: Callable[[], tuple[Config, str]], device_names: Callable[[Config], list[str]]
) -> Iterator[tuple[bool, str]]:
    home, runtime = address.home_folder(), address.runtime_folder()
    try:
        config, endpoint = configured()
    except errors.InvalidArgument as problem:
        yield False, f"{problem}"
    else:
        file = address.config_file()
        yield True, f"configuration: {file if file.exists() else 'defaults, there is no ' + str(file)}"
        yield _socket(endpoint.removeprefix("ipc://"), config.socket_group)
        if config.listen and not _serves(runtime / "lock"):
            yield _listen(config.listen)
        for name in device_names(config):
            yield _device(name)
    for what, folder in (("home", home), ("runtime folder", runtime)):
        yield _folder(what, folder)
    yield _disk(home)
    yield _files()
    serves = _serves(runtime / "lock")
    if not serves and is_foreign(home / "journal", schema()):
        yield False, f"journal: {of_another_version(home / 'journal')}"
    yield True, f"another daemon: {'runs' if serves else 'none'}"


def _device(name: str) -> tuple[bool, str]:
    if name.startswith("cuda:"):
        card = Path(f"/dev/nvidia{name.removeprefix('cuda:')}")
        if not card.exists():
            return False, f"device {name}: no {card}; load its driver or change `devices`"
    return True, f"device {name}"


def _socket(path: str, group: str) -> tuple[bool, str]:
    folder = Path(path).parent
    if folder != address.runtime_folder() and not os.access(folder, os.W_OK | os.X_OK):
        return False, f"socket: {folder} cannot be written to; make it or change {address.SOCKET_VARIABLE}"
    if Path(path).exists() and not Path(path).is_socket():
        return False, f"socket: {path} is there and no socket; change {address.SOCKET_VARIABLE}"
    if group:
        try:
            grp.getgrnam(group)
        except KeyError:
            return False, f"socket: there is no group {group!r}; change the setting `socket_group`"
    return True, f"socket: {path}"


def _listen(where: str) -> tuple[bool, str]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        try:
            socket.bind(where)
        except zmq.ZMQError as problem:
            return False, f"listen: {problem}; change the setting `listen`"
    return True, f"listen: {where}"


def _folder(what: str, folder: Path) -> tuple[bool, str]:
    """A folder has to be ours and writable, or possible to make."""
    there = folder
    while not there.exists():
        there = there.parent
    if folder.is_symlink() or (there == folder and folder.stat().st_uid != os.getuid()):
        return False, f"{what}: {folder} belongs to somebody else; set {address.HOME_VARIABLE}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return (
            False,
            f"{what}: {there} cannot be written to; change its rights or set {address.HOME_VARIABLE}",
        )
    return True, f"{what}: {folder}{'' if there == folder else ' (will be made)'}"


def _disk(home: Path) -> tuple[bool, str]:
    there = home
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"disk: {free / 1e9:.1f} GB free for {home}"
    if free < LEAST_DISK:
        return False, f"{text}, at least {LEAST_DISK / 1e9:.1f} are needed; remove models with `llsh rm`"
    return True, text


def _files() -> tuple[bool, str]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: {'unlimited' if hard == resource.RLIM_INFINITY else hard}"
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        return False, f"{text}, at least {LEAST_FILES} are needed; raise `ulimit -Hn` or LimitNOFILE"
    return True, text


def _serves(lock: Path) -> bool:
    """Whether somebody holds the lock of this runtime folder."""
    try:
        with lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
