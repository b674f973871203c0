"""Limits and defaults of the kernel: one frozen struct, set by a TOML file or `--set name=value`.

Precedence: --set, then the file, then the defaults here. Unknown names are errors.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from llmasos.drivers.base import MOST_RANKS
from llmasos.syscalls.errors import InvalidArgument
from llmasos.syscalls.types import Capability, OwnerPath, Quota
from llmasos.syscalls.wire import MAX_REQUESTS
from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
Limit = Annotated[int, Meta(ge=1)]

_DEVICE = re.compile(r"cpu|cuda:[0-9]+|(cpu|cuda)\*(?P<ranks>[0-9]+)|null(:[0-9]+)?|simulated(:[0-9]+)?")

MOST_INTEGER = 2**63 - 1
"""What travels and what C takes."""

LIVE = frozenset(
    (
        "kv_fraction",
        "kv_dtype",
        "step_tokens",
        "step_ms",
        "draft_tokens",
        "max_bad_frames",
        "session_grace_s",
        "max_requests",
        "max_processes",
        "max_processes_per_owner",
        "quotas",
        "aging_s",
        "crash_limit",
    )
)
"""Settings that take effect when the configuration is read again (SIGHUP); those of the KV memory for models
loaded from then on. The others need a restart."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every knob of the kernel."""

    devices: list[str] = []
    """Devices to drive (cpu, cuda:0, null, …). Empty: cpu, and every NVIDIA device that is there. `cuda*4` is
    a group: four devices that compute each model together, for models too big for one of them."""

    kv_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.4
    """Share of a device's free memory that the KV blocks of one model may take."""

    kv_dtype: Annotated[str, Meta(pattern="^(|float32|bfloat16|int8)$")] = ""
    """In which type contexts are kept (float32, bfloat16, int8). Empty: what suits model and device."""

    swap_host_bytes: Count = 2 << 30
    """Most bytes of the host's memory that hold contexts pushed out of a device's. 0: none."""

    swap_disk_bytes: Count = 8 << 30
    """Most bytes of the disk that hold them when the host's memory is full. 0: none, they are recomputed."""

    step_tokens: Count = 0
    """Most tokens a step computes. 0: what the driver advises."""

    step_ms: Annotated[float, Meta(gt=0)] = 100.0
    """While several want something, a step takes no longer than this, on a quick device less: who arrives
    waits for the step that runs."""

    draft_tokens: Annotated[int, Meta(ge=0, le=64)] = 8
    """Most tokens that are guessed ahead for one context and verified in the same step. 0: no guessing."""

    user_rights: tuple[Capability, ...] = (Capability.SEE, Capability.INFER, Capability.PROCESS)
    """What other users of this machine may do, when the socket lets them in (`socket_group`)."""

    socket_group: str = ""
    """Group that may connect to the local socket. Empty: nobody but the daemon's user and root."""

    session_grace_s: Annotated[float, Meta(ge=0)] = 30.0
    """After a restart of the kernel its clients have so long to return before their processes are ended."""

    listen: Annotated[str, Meta(pattern=r"^(|tcp://[^\s]+:[0-9]+)\Z")] = ""
    """Where keys that `llsh key authorize` let in may connect, as in tcp://0.0.0.0:5570. Empty: nowhere."""

    max_bad_frames: Limit = 100
    """A connection that sends so many frames that are no messages is not listened to any more."""

    max_memory: Annotated[int, Meta(ge=2**27)] = 2**30
    """Bytes of the kernel process, which holds no weights, at which every connection is closed: a message of
    endless parts takes memory without bound, and the peer that sends it cannot be told from others."""

    max_sessions: Limit = 1024
    max_requests: Limit = MAX_REQUESTS
    """Open requests of one session."""

    max_processes: Limit = 4096
    """Processes of all owners together."""

    max_processes_per_owner: Limit = 2048
    """Processes of one user, those of its labels included."""

    quotas: dict[OwnerPath, Quota] = {}
    """Limits by owner path: `[quotas."alice"]`, `[quotas."alice/agent"]`. They count for all below a path."""

    max_imports: Limit = 4
    """Imports that may run at once; each is a process."""

    max_trainers: Limit = 2
    """Training runs whose models and optimizers are in memory at once; further ones wait for their turn."""

    aging_s: Annotated[float, Meta(gt=0)] = 2.0
    """A runnable process that got nothing for this long goes first, whatever its class."""

    log_lines: Limit = 4096
    """Lines that dmesg keeps."""

    flight_steps: Limit = 1024
    """Scheduling decisions that the flight recorder keeps."""

    crash_limit: Limit = 2
    """A request that was running in this many driver deaths is failed instead of recomputed."""

    def __post_init__(self) -> None:
        for name in self.devices:
            match = _DEVICE.fullmatch(name)
            if match is None:
                raise ValueError(f"`devices`: there is no kind {name!r}; use cpu, cuda:0 or cpu*2")
            if match["ranks"] and not 2 <= int(match["ranks"]) <= MOST_RANKS:
                raise ValueError(f"`devices`: a group has 2 to {MOST_RANKS} devices, not {name}")
            if self.devices.count(name) > 1:
                raise ValueError(f"`devices` names {name} twice")
        if self.listen and not 1 <= int(self.listen.rpartition(":")[2]) <= 65535:
            raise ValueError(f"`listen` has a port from 1 to 65535, not {self.listen}")  # libzmq wraps it


def changed(old: Config, new: Config) -> list[str]:
    """The names of the settings in which two configurations differ."""
    return [name for name in Config.__struct_fields__ if getattr(old, name) != getattr(new, name)]


def load(path: Path, overrides: list[str]) -> Config:
    """The configuration from the file at `path` (if it exists) and `name=value` texts (values are TOML).

    Raises InvalidArgument naming what is wrong.
    """
    values: dict[str, object] = {}
    try:
        if path.exists():
            if not path.is_file():  # a pipe would never end
                raise InvalidArgument(f"configuration: {path} is no file")
            values.update(tomllib.loads(path.read_text()))
        for override in overrides:
            name, equals, value = override.partition("=")
            if not equals:
                raise InvalidArgument(f"--set {override}: expected name=value", field=name)
            values.update(_override(name.strip(), value.strip()))
        _fits(values)
        return msgspec.convert(values, Config)
    except OSError as problem:
        raise InvalidArgument(f"configuration: {path} cannot be read: {problem.strerror}") from None
    except (UnicodeDecodeError, RecursionError):
        raise InvalidArgument(f"configuration: {path} is no text in TOML") from None
    except (ValueError, msgspec.ValidationError) as problem:
        names = [override.partition("=")[0].strip() for override in overrides]
        told = [name for name in names if re.search(rf"`(\$\.)?{re.escape(name)}\b", str(problem))]
        said = f"--set {told[0]}" if told else path
        raise InvalidArgument(f"configuration: {problem}", hint=f"see {said} and `llmasosd --help`") from None


class InForce:
    """The configuration that counts, where a kernel that is started again finds it: the file may hold by then
    what nobody asked to be read, or what cannot be. `fd` is a file without a name that outlives kernels."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def keep(self, config: Config) -> None:
        data = msgspec.msgpack.encode(config)
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))

    def read(self) -> Config:
        return msgspec.msgpack.decode(os.pread(self.fd, os.fstat(self.fd).st_size, 0), type=Config)


def _fits(value: object, name: str = "") -> None:
    """Raises ValueError when a number below `value` needs more than 64 bits."""
    if isinstance(value, dict):
        for key, item in value.items():
            _fits(item, name or key)
    elif isinstance(value, list):
        for item in value:
            _fits(item, name)
    elif isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise ValueError(f"`{name}` has a number that does not fit into 64 bits")


def _override(name: str, value: str) -> dict[str, object]:
    try:
        return tomllib.loads(f"{name} = {value}")
    except tomllib.TOMLDecodeError:
        quoted = value.replace("\\", "\\\\").replace('"', '\\"')
        return tomllib.loads(f'{name} = "{quoted}"')
