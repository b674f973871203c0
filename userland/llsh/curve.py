"""Curves in text: points in braille cells of 2 × 4 dots, with a scale."""

from __future__ import annotations

from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARGIN = 12

Points = Sequence[tuple[float, float]]


def draw(lines: Points, marks: Points, width: int, height: int) -> str:
    """A plot of `width` × `height` characters: `lines` are joined, `marks` are crosses on top of them."""
    columns, rows = max(8, width - _MARGIN), max(4, height - 2)
    points = [*lines, *marks]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    across = (2 * columns - 1) / ((right - left) or 1)
    down = (4 * rows - 1) / ((high - low) or 1)

    def place(point: tuple[float, float]) -> tuple[int, int]:
        return round((point[0] - left) * across), round((high - point[1]) * down)

    cells = [[0] * columns for _ in range(rows)]
    before: tuple[int, int] | None = None
    for x, y in map(place, lines):
        for at, height_at in _between(before, (x, y)):
            cells[height_at // 4][at // 2] |= _DOTS[height_at % 4][at % 2]
        before = (x, y)
    text = [[chr(0x2800 + dots) if dots else " " for dots in row] for row in cells]
    for x, y in map(place, marks):
        text[y // 4][x // 2] = "×"
    labels = {0: high, rows // 2: (high + low) / 2, rows - 1: low}
    drawn = [
        f"{f'{labels[n]:.4g}' if n in labels else '':>{_MARGIN - 2}} │{''.join(row)}".rstrip()
        for n, row in enumerate(text)
    ]
    scale = f"{left:g}{f'{right:g}':>{max(1, columns - len(f'{left:g}'))}}"
    return "\n".join([*drawn, " " * (_MARGIN - 1) + "└" + "─" * columns, " " * _MARGIN + scale]) + "\n"


def _between(a: tuple[int, int] | None, b: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from `a`, which is left out, to `b`."""
    if a is None:
        return [b]
    steps = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [
        (round(a[0] + (b[0] - a[0]) * n / steps), round(a[1] + (b[1] - a[1]) * n / steps))
        for n in range(1, steps + 1)
    ]
