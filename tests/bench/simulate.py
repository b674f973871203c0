"""The simulator: the kernel's own code on devices that are a step-time model, in virtual time.

    python tests/bench/simulate.py make trace.csv --seconds 300 --rate 0.5     a synthetic trace
    python tests/bench/simulate.py run trace.csv                               simulate it
    python tests/bench/simulate.py run trace.csv --machine machine.json --devices 4 --set aging_s=5 --json

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
        simulated_ = simulation.Simulation(Path(home), machine, requests, settings)
        found = simulated_.run(progress)
    spent = numpy.array(simulated_.kernel_seconds) * 1e6
    figures = outcomes.summary(found) | {
        "preemptions": simulated_.pushes,
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
