"""The simulator: the kernel's own code on devices that are a step-time model, in virtual time.

    python tests/bench/simulate.py make trace.csv --seconds 300 --rate 0.5     a synthetic trace
    python tests/bench/simulate.py run trace.csv                               simulate it
    python tests/bench/simulate.py run trace.csv --machine machine.json --devices 4 --set aging_s=5 --json

A machine of one's own: `fit` measures steps of a real daemon, `replay` runs a trace against it in real time,
and `compare` says how far the simulation of the same trace is from that. HOME is a home folder with the
bench's model. On a machine with other work give the daemon real-time priority (chrt -r 2, its worker 1):
docs/decisions.md tells what the comparison is without.

    python tests/bench/simulate.py fit machine.json --home HOME
    python tests/bench/simulate.py replay trace.csv real.jsonl --home HOME
    python tests/bench/simulate.py compare trace.csv real.jsonl --machine machine.json

It lives here and not in the package because the kernel may not import drivers, and nobody needs it to serve.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy
import outcomes
import simulation
import traces
from llmasos.syscalls import errors

BAR_AFTER_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    make = commands.add_parser("make", help="write a synthetic trace")
    make.add_argument("trace", type=Path)
    make.add_argument("--seconds", type=float, default=300.0)
    make.add_argument("--rate", type=float, default=0.5, help="requests a second")
    make.add_argument("--seed", type=int, default=1)
    make.set_defaults(does=_make)

    run = commands.add_parser("run", help="simulate a trace")
    run.add_argument("trace", type=Path)
    run.add_argument("--machine", type=Path, help="a JSON file as `fit` writes it")
    run.add_argument("--devices", type=int)
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a kernel setting")
    run.add_argument("--json", action="store_true")
    run.add_argument("--outcomes", type=Path, help="write what became of each request (JSON lines)")
    run.set_defaults(does=_run)

    fit = commands.add_parser("fit", help="measure a real daemon's steps and write a machine")
    fit.add_argument("machine", type=Path)
    fit.set_defaults(does=_fit)

    replay = commands.add_parser("replay", help="run a trace against a real daemon, in real time")
    replay.add_argument("trace", type=Path)
    replay.add_argument("outcomes", type=Path)
    replay.add_argument("--json", action="store_true")
    replay.set_defaults(does=_replay)
    for command in (fit, replay):
        command.add_argument("--home", type=Path, required=True)

    compare = commands.add_parser("compare", help="a trace simulated beside its replays")
    compare.add_argument("trace", type=Path)
    compare.add_argument("outcomes", type=Path, nargs="+", help="of one or more replays")
    compare.add_argument("--machine", type=Path, required=True)
    compare.set_defaults(does=_compare)

    arguments = parser.parse_args()
    try:
        return int(arguments.does(arguments))
    except (OSError, ValueError, errors.LLMasOSError) as problem:
        print(f"simulate: {problem}", file=sys.stderr)
        return 2


def _make(arguments: argparse.Namespace) -> int:
    made = traces.synthetic(arguments.seconds, arguments.rate, arguments.seed)
    traces.write(arguments.trace, made)
    print(f"{len(made)} requests in {arguments.trace}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    requests = traces.read(arguments.trace)
    settings = tomllib.loads("\n".join(arguments.set))
    found, figures = simulated(requests, machine_of(arguments.machine, arguments.devices), settings)
    if arguments.outcomes:
        outcomes.save(arguments.outcomes, found)
    print(json.dumps(figures) if arguments.json else outcomes.text(figures))
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    import fitting
    import replay
    from llmasos.drivers.native.model import MAX_PICKS, MAX_ROWS
    from llmasos.syscalls import table

    cells, alone = len(replay.GRID) * replay.REPEATS, len(replay.RESTS) * replay.ALONE
    with replay.serving(arguments.home) as client, _bar(alone + cells) as progress:
        rests = replay.rests(client, progress)
        decisions = replay.grid(client, lambda cell: progress(alone + cell))
        (pool,) = client.call(table.Lsdev()).devices[0].pools
    machine, off = fitting.machine(decisions, rests, pool.blocks_total, MAX_ROWS, MAX_PICKS)
    arguments.machine.write_bytes(msgspec.json.format(msgspec.json.encode(machine)) + b"\n")
    half, most = numpy.percentile(off, [50, 90])
    print(f"{arguments.machine}: {len(decisions)} steps, half are within {half:.1%}, 90 % within {most:.1%}")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    import replay

    requests = traces.read(arguments.trace)
    with replay.serving(arguments.home), _bar(len(requests)) as progress:
        found = replay.replay(requests, progress)
    outcomes.save(arguments.outcomes, found)
    figures = outcomes.summary(found)
    print(json.dumps(figures) if arguments.json else outcomes.text(figures))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    found, _ = simulated(traces.read(arguments.trace), machine_of(arguments.machine, None), {})
    replays = [outcomes.load(path) for path in arguments.outcomes]
    for name, values in (("TTFT", outcomes.ttft), ("inter-token", outcomes.gaps)):
        real = [outcomes.percentiles(values(one)) for one in replays]
        for part, ours in outcomes.percentiles(values(found)).items():
            theirs = [one[part] for one in real]
            off = ", ".join(f"{ours / one - 1:+.1%}" for one in theirs)
            print(f"{name:12}{part}  simulated {ours:8.2f} ms  real {theirs} ms  {off}")
    return 0


def machine_of(path: Path | None, devices: int | None) -> simulation.Machine:
    """The machine that a file describes, or the default one."""
    machine = simulation.Machine()
    if path is not None:
        machine = msgspec.json.decode(path.read_bytes(), type=simulation.Machine)
    return machine if devices is None else msgspec.structs.replace(machine, devices=devices)


def simulated(
    requests: list[traces.Request], machine: simulation.Machine, settings: dict[str, Any]
) -> tuple[list[outcomes.Outcome], dict[str, Any]]:
    """The outcomes of a trace, and their figures with the kernel's own."""
    with tempfile.TemporaryDirectory() as home, _bar(len(requests)) as progress:
        world = simulation.Simulation(Path(home), machine, requests, settings)
        found = world.run(progress)
    spent = numpy.array(world.kernel_seconds) * 1e6
    figures = outcomes.summary(found) | {
        "preemptions": world.pushes,
        "decisions": len(spent),
        "kernel_us_per_decision": round(float(spent.mean()), 1),
        "kernel_us_per_decision_p99": round(float(numpy.percentile(spent, 99)), 1),
    }
    return found, figures


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr that appears when somebody looks and a second has passed."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("simulating", total=total)
    seen = 0

    def progress(done: int) -> None:
        nonlocal seen
        if done == seen:
            return
        seen = done
        bar.update(task, completed=done)
        if not bar.live.is_started and (bar.tasks[task].elapsed or 0.0) > BAR_AFTER_S:
            bar.start()

    try:
        yield progress
    finally:
        bar.stop()


if __name__ == "__main__":
    sys.exit(main())
