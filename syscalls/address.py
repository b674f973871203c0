"""Where things are: the home folder, the runtime folder and the socket of the daemon.

Two environment variables and no more: LLMASOS_HOME (models, logs, and then also the socket) and
LLMASOS_SOCKET (the daemon's address, a ZeroMQ endpoint). Without them the XDG folders are used.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import errors

HOME_VARIABLE = "LLMASOS_HOME"
SOCKET_VARIABLE = "LLMASOS_SOCKET"

# sockaddr_un.sun_path holds 108 bytes on Linux, one of them the terminating zero.
LONGEST_SOCKET_PATH = 107


def home_folder() -> Path:
    """Folder of the model filesystem and the logs: $LLMASOS_HOME or $XDG_DATA_HOME/llmasos."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "llmasos"


def config_file() -> Path:
    """$LLMASOS_HOME/config.toml or $XDG_CONFIG_HOME/llmasos/config.toml."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / "config.toml"
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "llmasos" / "config.toml"


def runtime_folder() -> Path:
    """Folder of the sockets and the lock (mode 0700): under $LLMASOS_HOME, $XDG_RUNTIME_DIR or /tmp."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser().absolute() / "run"
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "llmasos"
    return Path("/tmp") / f"llmasos-{os.getuid()}"


def socket_address() -> str:
    """ZeroMQ endpoint of the daemon: $LLMASOS_SOCKET or ipc:// in the runtime folder."""
    return os.environ.get(SOCKET_VARIABLE) or f"ipc://{runtime_folder() / 'kernel.sock'}"


def check(address: str) -> None:
    """Raises InvalidArgument for what cannot be the address of a daemon."""
    path = address.removeprefix("ipc://") if isinstance(address, str) else ""
    local = path != address and 0 < len(os.fsencode(path)) <= LONGEST_SOCKET_PATH
    if not local and not re.fullmatch(r"tcp://\S+:[0-9]+", str(address)):
        raise errors.InvalidArgument(
            f"{address!r} is no address of a daemon",
            hint=f"ipc://PATH, of at most {LONGEST_SOCKET_PATH} bytes, or tcp://HOST:PORT; if none is given, "
            f"${SOCKET_VARIABLE} or one in ${HOME_VARIABLE}",
            field="address",
        )


def keys_folder() -> Path:
    """A client's own keys, and those of the daemons it trusts: beside the configuration."""
    return config_file().parent / "keys"


def log_file() -> Path:
    """Where a daemon started in the background writes what it prints."""
    return home_folder() / "llmasosd.log"
