"""Measures LLMasOS and the installed peers in turn, on the same weights and prompts, and compares them.

    make bench                                               everything, 3 rounds, the table
    python tests/bench/run.py --rounds 1 --systems llmasos llama.cpp-q4_0 --workloads decode1
    python tests/bench/run.py --python /other/checkout/.venv/bin/python --write-docs
    python tests/bench/run.py --summary RESULTS.jsonl        the table of an earlier run
    python tests/bench/run.py --compare OLD.jsonl NEW.jsonl

A round runs every workload on every system, one after the other (A B C, A B C, …), with 2 threads each.
Figures are JSON lines in ~/.cache/llmasos-bench/results, what the systems said lies beside them.
`peers.py` installs peers; those that are missing are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import machine
import peers
import plots
import psutil
import summary
import workloads
from runner import Runner, RunnerFailed, warn
from tokenizers import Tokenizer

ROOT = peers.HERE.parent.parent
DOCS = ROOT / "docs" / "performance.md"
FRESH = [w.name for w in workloads.WORKLOADS if w.fresh_process]


class Session:
    """One run of the benchmark: systems, figures, and what is needed to make them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.home = Path(arguments.home)
        peers.pull(self.home, arguments.python)
        found = peers.files(self.home)
        self.tokenizer = Tokenizer.from_file(found["tokenizer.json"]["path"])
        self.shape = workloads.Shape.of(json.loads(Path(found["config.json"]["path"]).read_text()))
        self.workloads = [w for w in workloads.WORKLOADS if w.name in arguments.workloads]
        self.systems = {name: peers.SYSTEMS[name] for name in arguments.systems}
        self.info: dict[str, dict[str, Any]] = {}
        self.values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        self.busy: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.limits: dict[str, list[float]] = defaultdict(list)
        self.said: dict[tuple[str, str], str] = {}
        self.failed: dict[tuple[str, str], str] = {}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def measure(self) -> None:
        for name in list(self.systems):
            if reason := peers.missing(self.systems[name]):
                warn(f"{name} is skipped: {reason}")
                del self.systems[name]
        for number in range(self.arguments.rounds):
            for key, value in machine.limits(peers.CACHE, peers.THREADS).items():
                self.limits[key].append(value)
            self._fresh_round(number)
        lasting = [w for w in self.workloads if not w.fresh_process]
        runners: dict[str, Runner] = {}
        try:
            if lasting:
                self._start_all(runners)
            for number in range(self.arguments.rounds):
                for workload in lasting:
                    for name, runner in list(runners.items()):
                        self._one(runner, name, workload, number)
        finally:
            for runner in runners.values():
                runner.close()

    def _fresh_round(self, number: int) -> None:
        """The workloads that need a process of their own: a cold start, then memory in the same one."""
        fresh = sorted((w for w in self.workloads if w.fresh_process), key=lambda w: w.name)
        for name in self.systems if fresh else ():
            try:
                runner = self._start(name, fresh=True)
            except (RunnerFailed, OSError) as problem:
                self._fail(name, "load", problem)
                continue
            try:
                for workload in fresh:
                    self._one(runner, name, workload, number)
            finally:
                runner.close()

    def _start(self, name: str, fresh: bool = False) -> Runner:
        runner = Runner(name, self.systems[name], self.arguments.python, self.home, fresh)
        self.info[name] = runner.info
        return runner

    def _start_all(self, runners: dict[str, Runner]) -> None:
        """Starts every system and lets it do a little of everything, untimed."""
        for name in list(self.systems):
            warn(f"starting {name}")
            try:
                runners[name] = self._start(name)
                for workload in self.workloads:
                    if workload.fresh_process or workload.name.startswith("interference"):
                        continue
                    prompts = workloads.Prompts(self.encode, 99)
                    runners[name].run(workload.requests(prompts, 3), None)
            except (RunnerFailed, OSError) as problem:
                self._fail(name, "start", problem)
                if name in runners:
                    runners.pop(name).close()

    def _one(self, runner: Runner, name: str, workload: workloads.Workload, number: int) -> None:
        if (name, workload.name) in self.failed:
            return
        # The same prompts for every system, others in every round and workload.
        place = number * len(workloads.WORKLOADS) + workloads.WORKLOADS.index(workload)
        requests = workload.requests(workloads.Prompts(self.encode, place), 0)
        time.sleep(0.5)  # threads that spin after their work have stopped by now
        busy = psutil.cpu_percent(0.3) / 100
        try:
            run = runner.run(requests, workload.stop_after, workload.samples_memory)
            workloads.check(workload, requests, run)
            figures = workload.measure(run)
        except (RunnerFailed, ArithmeticError, IndexError, ValueError, RuntimeError) as problem:
            self._fail(name, workload.name, problem)
            return
        self.busy[name, workload.name].append(busy)
        for metric, value in figures.items():
            self.values[name, workload.name, metric].append(value)
        if number == 0:
            self.said[name, workload.name] = self._transcript(requests, run)
        words = ", ".join(f"{metric} {summary.shown(value)}" for metric, value in figures.items())
        noise = f"  (others used {busy:.0%} of the processors just before)" if busy > 0.1 else ""
        warn(f"round {number + 1}  {workload.name:18} {name:20} {words}{noise}")

    def _fail(self, name: str, where: str, problem: Exception) -> None:
        self.failed[name, where] = str(problem)
        warn(f"{name}, {where}: {problem}")

    def _transcript(self, requests: list[Any], run: dict[str, Any]) -> str:
        first = run["requests"][0]
        lengths = sorted({len(request["tokens"]) for request in run["requests"]})
        before = self.tokenizer.decode(requests[0].tokens[-32:], skip_special_tokens=False)
        after = self.tokenizer.decode(first["tokens"], skip_special_tokens=False)
        return f"{len(run['requests'])} requests, tokens out {lengths}\n…{before}\n>>> {after}"

    def figures(self) -> list[summary.Figure]:
        base = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "machine": machine.describe(),
            "commit": _commit(self.arguments.python),
        }
        units = {"read_1": "GB/s", "read_n": "GB/s"}
        out: list[summary.Figure] = []
        for key in ("read_1", "read_n", "int8", "bf16", "fp32"):
            runs = [value / 1e9 for value in self.limits[key]]
            # The most that was seen: interference only ever lowers a limit.
            figure = {
                "workload": "limits",
                "metric": key,
                "value": max(runs),
                "unit": units.get(key, "GOP/s"),
            }
            out.append(base | {"system": "machine"} | figure | {"better": "more", "runs": runs})
        for workload in self.workloads:
            for metric in workload.metrics:
                for name in self.systems:
                    if runs := self.values.get((name, workload.name, metric.name)):
                        out.append(base | self._figure(name, workload, metric, runs))
        return out

    def _figure(
        self, name: str, workload: workloads.Workload, metric: workloads.Metric, runs: list[float]
    ) -> summary.Figure:
        value = statistics.median(runs)
        info = self.info[name]
        share = None
        peak = max(self.limits[kind(info["format"])])
        if metric is workload.metrics[0] and peak:
            limits = workloads.Limits(max(self.limits["read_n"]), peak, info["weights_bytes"])
            share = workloads.fraction(workload.name, value, self.shape, limits)
        return {
            "system": name,
            "version": info["version"],
            "format": info["format"],
            "weights_bytes": info["weights_bytes"],
            "workload": workload.name,
            "metric": metric.name,
            "value": value,
            "median": value,
            "unit": metric.unit,
            "better": metric.better,
            "runs": runs,
            "fraction": share,
            "busy": max(self.busy[name, workload.name]),
        }

    def transcripts(self) -> str:
        parts = [f"== {name}, {workload}\n{text}\n" for (name, workload), text in self.said.items()]
        parts += [f"== {name}, {where}: FAILED\n{text}\n" for (name, where), text in self.failed.items()]
        return "\n".join(parts)


def kind(form: str) -> str:
    """Which of the machine's peaks a format's products run at."""
    if form in ("float32", "fp32"):
        return "fp32"
    return "bf16" if form in ("bfloat16", "bf16", "float16") else "int8"


def _commit(python: str) -> str:
    """The commit of the checkout that an interpreter runs, + when it has changes."""
    code = "import llmasos, os; print(os.path.dirname(llmasos.__file__))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    folder = found.stdout.strip() or str(ROOT)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def document(figures: list[summary.Figure]) -> str:
    """What stands between the markers in docs/performance.md."""
    first = figures[0]
    rounds = max(len(figure["runs"]) for figure in figures)
    versions = {
        f["system"]: f"{f['system']} {f['version']} ({f['format']})" for f in figures if "version" in f
    }
    busy = max((figure.get("busy", 0.0) for figure in figures), default=0.0)
    noise = f" Others used up to {busy:.0%} of the processors just before a figure." if busy > 0.1 else ""
    return "\n".join(
        [
            f"{first['date'][:10]}, commit {first['commit']}, {first['machine']}.",
            f"Medians of {rounds} interleaved rounds, {peers.THREADS} threads each.{noise}",
            f"{', '.join(versions.values())}.",
            "",
            summary.table(figures),
            "",
            summary.limits_table(figures),
        ]
    )


def write_docs(figures: list[summary.Figure]) -> None:
    DOCS.write_text(summary.between(DOCS.read_text(), "bench", document(figures)))
    for path in plots.draw(figures, DOCS.parent / "plots"):
        warn(f"wrote {path}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [workload.name for workload in workloads.WORKLOADS]
    add = parser.add_argument
    add("--systems", nargs="+", choices=list(peers.SYSTEMS), default=list(peers.DEFAULT), metavar="SYSTEM")
    add("--workloads", nargs="+", choices=names, default=names, metavar="WORKLOAD")
    add("--rounds", type=int, default=3)
    add("--python", default=sys.executable, help="interpreter of the checkout under test")
    add("--home", default=str(peers.CACHE / "home"), help="LLMasOS's home with the model")
    add("--out", type=Path, help="where the figures go")
    add("--write-docs", action="store_true", help="tables and plots into docs/performance.md and docs/plots")
    add("--summary", type=Path, metavar="FILE", help="only the table of an earlier run")
    add("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="only compare two earlier runs")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    if chosen.compare:
        print(summary.compare(*map(summary.read, chosen.compare)))
        return 0
    if chosen.summary:
        figures = summary.read(chosen.summary)
    else:
        session = Session(chosen)
        session.measure()
        figures = session.figures()
        out = chosen.out or peers.CACHE / "results" / time.strftime("%Y%m%d-%H%M%S.jsonl")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(figure) + "\n" for figure in figures))
        out.with_suffix(".txt").write_text(session.transcripts())
        warn(f"figures in {out}, what the systems said in {out.with_suffix('.txt')}")
    print(document(figures))
    if chosen.write_docs:
        write_docs(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
