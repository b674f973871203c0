"""From figures to tables: medians, ratios against the best peer, fractions of the machine's limits.

A figure is one JSON object a line: date, machine, commit, system, version, format, workload, metric, value
(the median of `runs`), unit, better, runs, fraction, busy.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
OURS = "llmasos"


def read(path: Path) -> list[Figure]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def is_ours(system: str) -> bool:
    return system == OURS or system.startswith(OURS + "-")


def rows(figures: Iterable[Figure]) -> dict[tuple[str, str], dict[str, Figure]]:
    """By (workload, metric), then by system; the machine's own figures left out. The last of equals wins."""
    table: dict[tuple[str, str], dict[str, Figure]] = {}
    for figure in figures:
        if figure["system"] != "machine":
            table.setdefault((figure["workload"], figure["metric"]), {})[figure["system"]] = figure
    return table


def best_peer(row: dict[str, Figure]) -> Figure | None:
    """The peer with the best median."""
    peers = [figure for name, figure in row.items() if not is_ours(name)]
    if not peers:
        return None
    choose = max if peers[0]["better"] == "more" else min
    return choose(peers, key=lambda figure: figure["value"])


def ratio(ours: Figure, theirs: Figure) -> float:
    """How many times better ours is: above 1 is better, whichever way the metric points.

    The median of the rounds' own ratios when both were measured in the same rounds, as the machine's pace
    drifts between them; of the medians otherwise.
    """
    if ours["unit"] != theirs["unit"] or ours["better"] != theirs["better"]:
        raise ValueError(f"{ours['metric']}: {ours['unit']} is not {theirs['unit']}")

    def one(a: float, b: float) -> float:
        top, bottom = (a, b) if ours["better"] == "more" else (b, a)
        return top / bottom if bottom else float("inf")

    if len(ours["runs"]) == len(theirs["runs"]):
        return statistics.median(one(a, b) for a, b in zip(ours["runs"], theirs["runs"], strict=True))
    return one(ours["value"], theirs["value"])


def shown(value: float) -> str:
    """Three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"


def table(figures: Iterable[Figure]) -> str:
    """Markdown: a row a figure, a column a system, and our ratio over the best peer."""
    by_row = rows(figures)
    systems = list(dict.fromkeys(name for row in by_row.values() for name in row))
    systems.sort(key=lambda name: not is_ours(name))
    lines = [
        "| workload | metric | " + " | ".join(systems) + " | best peer | ratio |",
        "| --- | --- |" + " --- |" * (len(systems) + 2),
    ]
    for (workload, metric), row in by_row.items():
        best = best_peer(row)
        cells = [shown(row[name]["value"]) if name in row else "–" for name in systems]
        ours = row.get(OURS)
        compared = f"**{ratio(ours, best):.2f}**" if ours and best else "–"
        unit = next(iter(row.values()))["unit"]
        name = best["system"] if best else "–"
        lines.append(f"| {workload} | {metric}, {unit} | " + " | ".join(cells) + f" | {name} | {compared} |")
    return "\n".join(lines)


def limits_table(figures: Iterable[Figure]) -> str:
    """Markdown: what the machine can do, and each system's share of it."""
    figures = list(figures)
    machine = [figure for figure in figures if figure["system"] == "machine"]
    lines = ["| limit | value |", "| --- | --- |"]
    lines += [f"| {figure['metric']} | {shown(figure['value'])} {figure['unit']} |" for figure in machine]
    by_row = {key: row for key, row in rows(figures).items() if any(f.get("fraction") for f in row.values())}
    systems = list(dict.fromkeys(name for row in by_row.values() for name in row))
    lines += ["", "| share of the limit | " + " | ".join(systems) + " |", "| --- |" + " --- |" * len(systems)]
    for (workload, _), row in by_row.items():
        shares = [row[name].get("fraction") if name in row else None for name in systems]
        lines.append(f"| {workload} | " + " | ".join("–" if s is None else f"{s:.0%}" for s in shares) + " |")
    return "\n".join(lines)


def compare(before: Iterable[Figure], after: Iterable[Figure]) -> str:
    """Markdown: the same systems in two files, and how many times better the second is."""
    old, new = rows(before), rows(after)
    lines = ["| system | workload | metric | before | after | ratio |", "| --- |" + " --- |" * 5]
    for key, row in new.items():
        for name, figure in row.items():
            if (earlier := old.get(key, {}).get(name)) is not None:
                values = f"{shown(earlier['value'])} | {shown(figure['value'])}"
                lines.append(
                    f"| {name} | {key[0]} | {key[1]}, {figure['unit']} | {values} "
                    f"| {ratio(figure, earlier):.2f} |"
                )
    return "\n".join(lines)


def between(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers `name` replaced. Raises ValueError without markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no {begin} … {end} in the document")
    return f"{head}{begin}\n{body}\n{end}{tail}"
