"""Tables that fit: on a narrow terminal the least important columns go first, then the longest shrink.

In a pipe a table is plain text: every column, padded by spaces, no boxes and no tabs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

GAP = 2
"""Spaces between two columns."""


@dataclass(frozen=True, slots=True)
class Column:
    """`drop` 0 stays for ever; otherwise the column with the highest number leaves first.

    `least` is the width in cells that a shortened column keeps, None: never shortened.
    """

    title: str
    right: bool = False
    drop: int = 0
    least: int | None = None
    style: Callable[[str], str] | None = None


@dataclass(slots=True)
class Table:
    """Rows of text under `columns`."""

    columns: list[Column]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        self.rows.append([_one_line(cell) for cell in cells])

    def plain(self) -> str:
        """Every column in full, one line a row; the last column is not padded."""
        widths = self._widths()
        titles = [column.title for column in self.columns]
        lines = []
        for row in [*([titles] if any(titles) else []), *self.rows]:
            cells = [
                _pad(cell, width, column.right)
                for cell, width, column in zip(row, widths, self.columns, strict=True)
            ]
            lines.append((" " * GAP).join(cells).rstrip())
        return "\n".join(lines) + "\n"

    def fitted(self, width: int) -> RichTable:
        """A rich table of at most `width` cells."""
        from rich.table import Table as RichTable
        from rich.text import Text

        widths = self._fit(width)
        table = RichTable(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        table.show_header = any(column.title for column in self.columns)
        for index, cells in widths.items():
            column = self.columns[index]
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=cells,
            )
        for row in self.rows:
            styled = []
            for index in widths:
                style = self.columns[index].style
                styled.append(Text(row[index], style=style(row[index]) if style else ""))
            table.add_row(*styled)
        return table

    def _fit(self, width: int) -> dict[int, int]:
        """Width in cells of each column that stays, by its place."""
        widths = dict(enumerate(self._widths()))

        def excess() -> int:
            return sum(widths.values()) + GAP * (len(widths) - 1) - width

        def shrinkable() -> int:
            return sum(max(0, cells - self._least(index, cells)) for index, cells in widths.items())

        while excess() > shrinkable():
            index = max(widths, key=lambda place: self.columns[place].drop)
            if self.columns[index].drop == 0:
                break
            del widths[index]
        while excess() > 0:
            longest = max(widths, key=lambda place: widths[place] - self._least(place, widths[place]))
            if widths[longest] <= self._least(longest, widths[longest]):
                break
            widths[longest] -= 1
        return widths

    def _least(self, index: int, cells: int) -> int:
        least = self.columns[index].least
        return cells if least is None else min(cells, least)

    def _widths(self) -> list[int]:
        from rich.cells import cell_len

        return [
            max([cell_len(column.title), *(cell_len(row[index]) for row in self.rows)])
            for index, column in enumerate(self.columns)
        ]


def _one_line(text: str) -> str:
    """`text` as one printable cell."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _pad(text: str, width: int, right: bool) -> str:
    from rich.cells import cell_len

    blanks = " " * max(0, width - cell_len(text))
    return blanks + text if right else text + blanks
