"""How the processes of a device group come to be. A group is N ranks that step together: rank 0 talks to the
kernel, the others do what it does. A group lives and dies as one: when a rank ends, so does every other.

    local      rank 0 starts the others on this machine; they meet in a file that only this user can open,
               for torch's own TCP store listens on every interface and asks nobody who he is
    torchrun   all ranks are started by torch's elastic agent, over several machines if wanted:
               torchrun --nnodes 2 --nproc-per-node 8 -m llmasos.drivers.worker --device 'cuda*16' --bus …
               Set GLOO_SOCKET_IFNAME to the network between them, which has to be a private one

Another way to start ranks (Ray, Slurm) is another Launcher. Imports no torch.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from llmasos.syscalls import errors

BEAT_S = 10.0
"""How often a rank says that it lives."""

TIMEOUT_S = 60.0
"""A rank that has said nothing for so long is frozen; the others end."""

WORK_S = 600.0
"""How long a rank waits for the others in anything that they do together, to meet first of all. Longer than
the other one: a rank at the lowest priority of a busy machine may be minutes behind, and lives."""

BROKEN = 71
"""Exit code of a rank that ends because another did."""


@dataclass
class Place:
    """Where a process is in its group: `rank` of `size`, the `local`-th of the `here` on its machine. `url`
    is where the ranks meet (torch's init_method), `others` are those that this one has started."""

    rank: int
    size: int
    local: int
    here: int
    url: str
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _leaving: bool = False

    def watch(self) -> None:
        """From now on this rank ends when one that it has started does, but for `leaving`."""
        threading.Thread(target=self._watch, daemon=True, name="watches ranks").start()

    def leaving(self) -> None:
        """Ranks may end from now on."""
        self._leaving = True

    def leave(self) -> None:
        """Waits for the others' end."""
        self._leaving = True
        for other in self.others:
            other.wait(WORK_S)

    def _watch(self) -> None:
        ranks = {os.pidfd_open(other.pid): rank for rank, other in enumerate(self.others, 1)}
        poll = select.poll()
        for pidfd in ranks:
            poll.register(pidfd, select.POLLIN)
        ended = [ranks[pidfd] for pidfd, _ in poll.poll()]
        if not self._leaving:
            end(f"rank {ended[0]} ended")


class Launcher(Protocol):
    def join(self, size: int, command: list[str]) -> Place:
        """Makes this process a rank of a group of `size`. `command` are a module and its arguments, with
        which a launcher starts what ranks it has to. Raises InvalidArgument."""
        ...


class Local:
    """Rank 0 starts the others: `command`, behind it --parent, --rank and --rendezvous. They die with the
    thread that has started them."""

    def join(self, size: int, command: list[str]) -> Place:
        folder = Path(tempfile.mkdtemp(prefix="llmasos-ranks-"))  # mode 0700
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        place = _meeting_here(0, size, f"file://{folder}/store")
        for rank in range(1, size):
            where = ["--parent", str(os.getpid()), "--rank", str(rank), "--rendezvous", place.url]
            place.others.append(
                subprocess.Popen([sys.executable, "-m", *command, *where], stdin=subprocess.DEVNULL)
            )
        place.watch()
        return place


class Started:
    """A rank that Local has started."""

    def __init__(self, rank: int, url: str) -> None:
        self._rank, self._url = rank, url

    def join(self, size: int, command: list[str]) -> Place:
        return _meeting_here(self._rank, size, self._url)


class Torchrun:
    """Everybody has been started already, and is told his place by torch's variables."""

    def join(self, size: int, command: list[str]) -> Place:
        rank, started, local, here = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        if started != size:
            raise errors.InvalidArgument(
                f"torchrun has started {started} ranks, {size} are asked for",
                hint="--nnodes times --nproc-per-node has to be the size of the group",
            )
        return Place(rank, size, local, here, "env://")


def launcher(rank: int, url: str) -> Launcher:
    """The one that this process was started by; `rank` and `url` are what --rank and --rendezvous say."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Torchrun()
    return Started(rank, url) if rank else Local()


def _meeting_here(rank: int, size: int, url: str) -> Place:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # read when torch's gloo makes its sockets
    return Place(rank, size, rank, size, url)


def end(why: str) -> NoReturn:
    """Ends this rank at once, from whatever thread: the others follow."""
    print(f"group: {why}; all of it ends", file=sys.stderr, flush=True)
    os._exit(BROKEN)
