"""Bars for docs/performance.md: one small picture a figure, one bar a system, as SVG."""

from __future__ import annotations

from pathlib import Path

import summary

OURS, THEIRS = "#1f6f8b", "#b8b8b8"
GROUPS = {
    "throughput": [
        ("decode1", "decode"),
        ("agents16", "output"),
        ("distinct16", "output"),
        ("prefill1024", "prefill"),
        ("interference_alone", "batch_alone"),
        ("interference", "batch_with_callers"),
    ],
    "latency": [
        ("interference_idle", "ttft_p50_idle"),
        ("interference", "ttft_p50_load"),
        ("interference", "ttft_p95_load"),
        ("chat8", "total"),
        ("coldstart", "first_token"),
        ("memory", "peak_pss"),
    ],
}


def draw(figures: list[summary.Figure], folder: Path) -> list[Path]:
    """Writes the pictures and returns their paths."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "llmasos", "font.size": 8})
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    rows = summary.rows(figures)
    written = []
    for name, keys in GROUPS.items():
        present = [key for key in keys if key in rows]
        if not present:
            continue
        tall = -(-len(present) // 3)
        picture, axes = pyplot.subplots(tall, 3, figsize=(11, 2.4 * tall), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, key in zip(axes.flat, present, strict=False):
            _bars(axis, key, rows[key])
        picture.tight_layout()
        path = folder / f"{name}.svg"
        picture.savefig(path, metadata={"Date": None})
        pyplot.close(picture)
        written.append(path)
    return written


def _bars(axis: object, key: tuple[str, str], row: dict[str, summary.Figure]) -> None:
    systems = list(row)[::-1]
    values = [row[system]["value"] for system in systems]
    figure = next(iter(row.values()))
    axis.axis("on")  # type: ignore[attr-defined]
    bars = axis.barh(  # type: ignore[attr-defined]
        systems, values, color=[OURS if summary.is_ours(system) else THEIRS for system in systems]
    )
    axis.bar_label(bars, [summary.shown(value) for value in values], padding=2)  # type: ignore[attr-defined]
    axis.margins(x=0.18)  # type: ignore[attr-defined]
    better = "more is better" if figure["better"] == "more" else "less is better"
    axis.set_title(f"{key[0]}: {key[1]}, {figure['unit']} ({better})", fontsize=8)  # type: ignore[attr-defined]
    axis.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
    axis.xaxis.set_visible(False)  # type: ignore[attr-defined]
