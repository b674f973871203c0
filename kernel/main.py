"""llmasosd: in which order the daemon starts and stops.

    supervisor   folders → lock → kernel and one worker per device → (kernel listens, workers attach) → watch
    kernel       configuration → model filesystem → tables → sockets → "ready" → loop

Stops the other way round: SIGTERM or the shutdown call drains the kernel, which ends with code 0, then the
workers are stopped and the lock is released.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from llmasos.syscalls import address, errors, garbage, turns

from . import systemd
from .config import Config, InForce, load

USAGE = """\
The kernel of LLMasOS: runs models as processes, for the shell llsh and every other client.

examples:
  llmasosd                          serve until Ctrl-C or `llsh shutdown`
  llmasosd --set kv_fraction=0.6    give more of the free memory to contexts
  llmasosd --set devices='["cpu"]'  drive the CPU only
  llmasosd --check                  say whether it could serve here, and what to do if not
  llmasosd --fsck                   verify every file of the model filesystem and exit

signals: TERM and INT drain (running answers get 5 s) and stop, a second one stops at once; HUP reads the
configuration again, all of it or nothing (see dmesg)

exit codes: 0 stopped as asked, 1 cannot run here (folders, an address that is taken), or --check or --fsck
found a fault, 2 wrong usage or configuration, 65 the journal is damaged, 70 stopped without draining (a
second signal, or the kernel died meanwhile), 75 another daemon of this user runs already
"""


def main() -> int:
    """Entry point of `llmasosd`."""
    parser = argparse.ArgumentParser(
        "llmasosd", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    settings = ", ".join(Config.__struct_fields__)
    parser.add_argument("--version", action="version", version=f"llmasosd {metadata.version('llmasos')}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help=f"override a setting: {settings}"
    )
    parser.add_argument(
        "--check", action="store_true", help="check configuration, folders, devices and disk, and exit"
    )
    parser.add_argument("--systemd-unit", action="store_true", help="print a unit for systemd and exit")
    parser.add_argument("--fsck", action="store_true", help="verify the model filesystem and exit")
    parser.add_argument("--kernel", type=int, metavar="FD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    def configured() -> tuple[Config, str]:
        return load(address.config_file(), arguments.set), _endpoint()

    if arguments.kernel is not None:
        return run_kernel(InForce(arguments.kernel), _endpoint(), lambda: configured()[0])
    if arguments.systemd_unit:
        print(systemd.unit(), end="")
        return 0
    if arguments.check:
        from .check import check

        return 1 if check(configured, device_names) else 0
    try:
        config, _ = configured()
    except errors.InvalidArgument as problem:
        print(f"llmasosd: {problem}", file=sys.stderr)
        return 2
    if arguments.fsck:
        return _fsck()
    return run_supervisor(config, arguments.set)


def _endpoint() -> str:
    endpoint = address.socket_address()
    path = endpoint.removeprefix("ipc://")
    if not path or path.startswith("@"):  # those of Linux that have no file have no mode: all could connect
        raise errors.InvalidArgument(
            f"{endpoint} names no file, whose mode says who may connect",
            hint=f"set {address.SOCKET_VARIABLE} to ipc:// and the path of one",
        )
    if path == endpoint:
        raise errors.InvalidArgument(f"{endpoint}: the daemon listens on ipc:// only", field="socket")
    if len(path.encode()) > address.LONGEST_SOCKET_PATH:
        raise errors.InvalidArgument(
            f"the socket path is longer than {address.LONGEST_SOCKET_PATH} bytes: {path}",
            hint=f"set {address.SOCKET_VARIABLE} or a shorter {address.HOME_VARIABLE}",
        )
    return endpoint


def device_names(config: Config) -> list[str]:
    """What to drive: the configured devices, or the cpu and every NVIDIA device that is there."""
    cards = len(glob.glob("/dev/nvidia[0-9]*"))
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # CUDA counts these from 0 on
        cards = min(cards, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return config.devices or ["cpu", *(f"cuda:{index}" for index in range(cards))]


def private_folder(folder: Path) -> None:
    """Makes `folder` with mode 0700. Raises PermissionDenied when it belongs to somebody else."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise errors.PermissionDenied(f"{folder} belongs to somebody else", hint="set LLMASOS_HOME")
    folder.chmod(0o700)


def run_supervisor(config: Config, overrides: list[str]) -> int:
    """Takes the lock and keeps kernel and workers running."""
    from .faults import keep_prompts_private
    from .supervisor import Supervisor

    keep_prompts_private()
    runtime = address.runtime_folder()
    try:
        private_folder(address.home_folder())
        private_folder(runtime)
    except (OSError, errors.PermissionDenied) as problem:
        print(f"llmasosd: {problem}", file=sys.stderr)
        return 1
    # A second bind would silently steal the socket's path, so the lock decides who serves.
    with (runtime / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"llmasosd: another daemon serves {address.socket_address()}", file=sys.stderr)
            return 75
        in_force = InForce(os.memfd_create("llmasos-configuration"))
        in_force.keep(config)
        kernel = [sys.executable, "-m", "llmasos.kernel.main", "--kernel", str(in_force.fd)]
        for override in overrides:
            kernel += ["--set", override]
        bus = str(runtime / "bus.sock")
        worker = [sys.executable, "-m", "llmasos.drivers.worker", "--bus", bus]
        worker += ["--parent", str(os.getpid()), "--device"]
        workers = {name: [*worker, name] for name in device_names(config)}
        return Supervisor(kernel, in_force.fd, workers).run()


def run_kernel(in_force: InForce, endpoint: str, reload: Callable[[], Config]) -> int:
    """The kernel process: standard input is the supervisor's pipe, one line on standard output says ready.
    `reload` reads the configuration again."""
    from .faults import keep_prompts_private
    from .journal import Journal
    from .ledger import schema
    from .loop import Kernel
    from .modelfs.store import ModelFS
    from .sockets import Sockets, clock
    from .supervisor import DAMAGED
    from .tiers import host_folder

    turns.short()
    garbage.collect_rarely()
    keep_prompts_private()
    # libzmq aborts when descriptors run out; connections are bounded far below the hard limit.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    home = address.home_folder()
    store = ModelFS(home)
    store.gc(set())
    store.sessions.sweep()
    store.datasets.sweep()
    try:
        journal = Journal(home / "journal", schema())
    except errors.LLMasOSError as problem:
        print(f"llmasosd: {problem}", file=sys.stderr, flush=True)
        return DAMAGED if isinstance(problem, errors.Corrupt) else 1
    born = clock()
    config = in_force.read()
    bus = address.runtime_folder() / "bus.sock"
    kernel = Kernel(
        config,
        store,
        device_names(config),
        lambda: clock() - born,
        int.from_bytes(os.urandom(8), "little"),
        host_folder(home),
        journal.rows,
        time.time(),
        bus,
    )
    kernel.log.info(f"llmasosd boots, kernel pid {os.getpid()}, home {home}")
    try:
        sockets = Sockets(kernel, journal, endpoint, bus, home)
        where = ", ".join(filter(None, (endpoint, config.listen)))
        kernel.log.info(f"listening on {where}, devices {', '.join(kernel.devices)}")
        print(f"ready, listening on {endpoint}", flush=True)
        sockets.run(sys.stdin.fileno(), reload, in_force)
    except errors.Unavailable as problem:
        # Nobody was told of what is not in the journal, so the next kernel goes on from there.
        print(f"llmasosd: {problem}", file=sys.stderr, flush=True)
        return 1
    kernel.tiers.sweep()
    journal.close()
    return 0


def _fsck() -> int:
    from .modelfs.store import ModelFS

    home = address.home_folder()
    if not home.is_dir():
        print(f"llmasosd: there is no folder {home}", file=sys.stderr)
        return 1
    try:
        store = ModelFS(home)
        problems, garbage = store.fsck(), store.garbage()
    except OSError as problem:
        print(f"llmasosd: {problem}", file=sys.stderr)
        return 1
    for line in problems + garbage:
        print(line)
    if garbage:  # of an import that was killed, for instance: it takes room and harms nothing
        print(f"llmasosd: {len(garbage)} of these only take room; the next start of llmasosd removes them")
    print(f"llmasosd: {len(problems)} problems" if problems else "llmasosd: the model filesystem is clean")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
