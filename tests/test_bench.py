"""The benchmark's arithmetic: medians, ratios, percentiles, limits, and the prompts' sameness."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The bench's modules, which are scripts that find each other by their folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    import summary
    import systems.base
    import workloads

    yield {"summary": summary, "workloads": workloads, "base": systems.base}
    for name in ("summary", "workloads", "systems", "systems.base"):
        sys.modules.pop(name, None)


def figure(system: str, runs: list[float], better: str = "more", **more: Any) -> dict[str, Any]:
    middle = sorted(runs)[len(runs) // 2]
    given = {"workload": "decode1", "metric": "decode", "unit": "tokens/s", "fraction": None}
    return given | {"system": system, "value": middle, "better": better, "runs": runs} | more


def test_the_ratio_is_the_median_of_the_rounds(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    summary = bench["summary"]
    # The machine was half as fast in the last round; the ratio does not see it.
    lines = [figure("llmasos", [200, 210, 100]), figure("a", [50, 50, 25]), figure("b", [100, 100, 50])]
    file = tmp_path / "figures.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = summary.rows(summary.read(file))["decode1", "decode"]
    assert summary.best_peer(row)["system"] == "b"
    assert summary.ratio(row["llmasos"], row["b"]) == 2.0
    assert "| b | **2.00** |" in summary.table(lines)


def test_less_can_be_better(bench: dict[str, ModuleType]) -> None:
    summary = bench["summary"]
    ours, a, b = (
        figure(name, runs, "less", unit="s")
        for name, runs in (("llmasos", [0.5, 0.4, 0.6]), ("a", [2.0, 2.0, 2.0]), ("b", [1.0, 1.1]))
    )
    row = summary.rows([ours, a, b])["decode1", "decode"]
    assert summary.best_peer(row)["system"] == "b"
    assert summary.ratio(ours, a) == 4.0
    # Not the same rounds: the medians are compared.
    assert summary.ratio(ours, b) == pytest.approx(b["value"] / 0.5)
    with pytest.raises(ValueError):
        summary.ratio(ours, figure("c", [1.0]))


def test_our_variants_are_no_peers(bench: dict[str, ModuleType]) -> None:
    summary = bench["summary"]
    lines = [figure("llmasos", [10.0]), figure("llmasos-fp32", [99.0]), figure("peer", [5.0])]
    assert summary.best_peer(summary.rows(lines)["decode1", "decode"])["system"] == "peer"
    assert "**2.00**" in summary.table(lines)


def test_markers(bench: dict[str, ModuleType]) -> None:
    between = bench["summary"].between
    assert between("a <!-- x -->old<!-- /x --> b", "x", "new") == "a <!-- x -->\nnew\n<!-- /x --> b"
    with pytest.raises(ValueError):
        between("a", "x", "new")


def test_figures_read_off_the_times(bench: dict[str, ModuleType]) -> None:
    workloads = bench["workloads"]
    measure = {workload.name: workload.measure for workload in workloads.WORKLOADS}
    # Two tokens came with the first event: five of seven were made in the second after it.
    one = {"times": [1.0, 1.5, 2.0], "counts": [2, 1, 4], "tokens": list(range(7)), "at": 0.0, "prompt": 32}
    assert measure["decode1"]({"requests": [one]}) == {"decode": 5.0}
    assert measure["prefill1024"]({"requests": [one | {"prompt": 1024}]}) == {"prefill": 1024.0}
    assert measure["distinct16"]({"requests": [one, one | {"times": [1.0, 3.0, 4.0]}]}) == {"output": 3.5}
    callers = [{"background": False, "times": [at + wait], "at": at} for at, wait in ((3, 0.1), (4, 0.3))]
    late = {"background": False, "times": [], "at": 5.0}
    waits = measure["interference"]({"requests": [*callers, late], "seconds": 20.0})
    assert waits["ttft_p50_load"] == pytest.approx(0.3)
    assert 10 < waits["ttft_p95_load"] < 15  # who got nothing by the end counts


def test_percentiles(bench: dict[str, ModuleType]) -> None:
    percentile = bench["workloads"].percentile
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.95) == pytest.approx(1.95)


def test_what_the_machine_allows(bench: dict[str, ModuleType]) -> None:
    workloads = bench["workloads"]
    shape = workloads.Shape(30, 576, 9, 3, 64, 1536, 49152)
    assert shape.matmul() + shape.head() == pytest.approx(2 * 134.5e6, rel=0.01)
    limits = workloads.Limits(read=30e9, peak=800e9, weights=98e6)
    # One stream: weights read once a token.
    assert workloads.fraction("decode1", 30e9 / 98e6, shape, limits) == pytest.approx(1.0)
    assert 0.4 < workloads.fraction("prefill1024", 1800, shape, limits) < 0.6
    assert workloads.fraction("memory", 1.0, shape, limits) is None


def test_prompts_are_the_same_for_all_and_never_begin_alike(bench: dict[str, ModuleType]) -> None:
    workloads = bench["workloads"]

    def encode(text: str) -> list[int]:
        return [hash(word) for word in text.split()]

    for workload in workloads.WORKLOADS:
        again = [workload.requests(workloads.Prompts(encode, 3), 0) for _ in range(2)]
        assert again[0] == again[1]
    prompts = workloads.Prompts(encode)
    starts = [tuple(prompts.take(16)) for _ in range(200)]
    assert len(set(starts)) == len(starts)
    chat = workloads.BY_NAME["chat8"].requests(prompts, 0)[0]
    assert [len(turn) for turn in chat.turns] == [40] * 7


def test_the_loop_follows_turns_and_repeats(bench: dict[str, ModuleType]) -> None:
    base = bench["base"]

    class Echo(base.Engine):  # type: ignore[misc, name-defined]
        """Answers each request with its length, a token a poll."""

        def __init__(self) -> None:
            self.open: list[list[Any]] = []

        def submit(self, requests: list[Any]) -> None:
            self.open += [[request, 0] for request in requests]

        def poll(self, timeout_s: float) -> list[tuple[str, list[int], bool]]:
            events = []
            for entry in list(self.open):
                entry[1] += 1
                done = entry[1] == entry[0].new
                events.append((entry[0].key, [len(entry[0].tokens)], done))
                if done:
                    self.open.remove(entry)
            return events

        def cancel(self, keys: list[str]) -> None:
            self.open = [entry for entry in self.open if entry[0].key not in keys]

    chat = base.Request("turn.0", [1, 2], 3, turns=[[5], [6, 7]])
    run = base.drive(Echo(), [chat])
    assert [request["key"] for request in run["requests"]] == ["turn.0", "turn.1", "turn.2"]
    assert [request["prompt"] for request in run["requests"]] == [2, 6, 11]
    run = base.drive(Echo(), [base.Request("load", list(range(20)), 2, repeat=True)], stop_after=0.05)
    assert len(run["requests"]) > 2
    assert {request["prompt"] for request in run["requests"]} == {20}
