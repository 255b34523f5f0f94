"""A table of text that is never cut: for a terminal, with its last column wrapped, or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.text import Text

from graphopt.report import markdown

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | Text

_GAP = 3
_LEAST = 28
"""Columns left for the last cell below which it goes to a line of its own."""


@dataclass
class Table:
    """``align`` has one letter a column, ``l`` or ``r``; the last column is for remarks of any length.

    ``side_by_side``: every column but the first is text of its own, and wrapped in its own place.
    """

    titles: list[str]
    align: str
    rows: list[list[Text]] = field(default_factory=list)
    side_by_side: bool = False

    def add(self, *cells: Cell) -> None:
        """One row; missing cells are empty."""
        row = [cell if isinstance(cell, Text) else Text(cell) for cell in cells]
        self.rows.append(row + [Text()] * (len(self.align) - len(row)))

    def lines(self, console: Console, width: int | None) -> Iterator[Text]:
        """The table line by line, at most ``width`` columns wide where that is possible."""
        titles = [Text(title, style="bold") for title in self.titles]
        rows = [titles, *self.rows] if any(self.titles) else self.rows
        widths = [max((row[i].cell_len for row in rows), default=0) for i in range(len(self.align))]
        if self.side_by_side and width is not None and sum(widths) + _GAP * (len(widths) - 1) > width:
            shared = _shared(widths[1:], width - widths[0] - _GAP * (len(widths) - 1))
            if min(shared, default=0) >= 1:
                yield from self._wrapped(rows, [widths[0], *shared], console)
                return
        widths.pop()
        start = sum(widths) + _GAP * len(widths)
        # Where the cells do not fit, the first one (a name, as a rule) has a line of its own, the others the next.
        below = 4 + start - widths[0] - _GAP if widths else 0
        stacked = width is not None and start - _GAP > width and 4 < below - _GAP <= width
        for row in rows:
            line = Text()
            if stacked:
                if row[0].plain:
                    yield row[0]
                if not any(row[1:]):
                    continue
                line, start = Text("    "), below
            for cell, wide, side in list(zip(row[:-1], widths, self.align, strict=False))[stacked:]:
                pad = Text(" " * (wide - cell.cell_len))
                line = line + (pad + cell if side == "r" else cell + pad) + Text(" " * _GAP)
            yield from _with_remark(line, row[-1], start, console, width)

    def _wrapped(self, rows: list[list[Text]], widths: list[int], console: Console) -> Iterator[Text]:
        for row in rows:
            parts = [list(cell.wrap(console, wide)) or [Text()] for cell, wide in zip(row[1:], widths[1:], strict=True)]
            for k in range(max(map(len, parts))):
                here = [row[0] if not k else Text(), *(part[k] if k < len(part) else Text() for part in parts)]
                line = Text()
                for cell, wide, side in zip(here, widths, self.align, strict=True):
                    cell.rstrip()
                    pad = Text(" " * max(wide - cell.cell_len, 0))
                    line = line + (pad + cell if side == "r" else cell + pad) + Text(" " * _GAP)
                line.rstrip()
                yield line

    def markdown(self) -> Iterator[str]:
        """The table as GitHub reads it, line by line; columns at the end without a word in them are left out."""
        rows = [self.titles, *([cell.plain for cell in row] for row in self.rows)]
        used = max((k + 1 for row in rows for k, text in enumerate(row) if text.strip()), default=0)
        rule = ["---:" if side == "r" else "---" for side in self.align[:used]]
        lines = [[markdown.cell(text) for text in row[:used]] for row in rows]
        for cells in (lines[0], rule, *lines[1:]):
            yield markdown.Row(f"| {' | '.join(cells)} |")


def _with_remark(line: Text, remark: Text, start: int, console: Console, width: int | None) -> Iterator[Text]:
    """``remark`` behind ``line`` where it fits, else wrapped beside it, or below it where there is no room."""
    if width is None or start + remark.cell_len <= width:
        whole = line + remark
        whole.rstrip()
        yield whole
        return
    if not remark.plain:
        line.rstrip()
        yield line
        return
    beside = width - start >= _LEAST
    indent = start if beside else 4 + len(line.plain) - len(line.plain.lstrip())  # below, and deeper than its row
    wrapped = list(remark.wrap(console, max(width - indent, 10)))
    if beside:
        line = line + wrapped.pop(0)
    line.rstrip()
    yield line
    for more in wrapped:
        more.rstrip()
        yield Text(" " * indent) + more


def _shared(wanted: list[int], room: int) -> list[int]:
    """``room`` dealt out to columns: what is narrow gets what it wants, the others the same."""
    given = [0] * len(wanted)
    for left, k in enumerate(sorted(range(len(wanted)), key=lambda k: wanted[k])):
        given[k] = max(min(wanted[k], room // (len(wanted) - left)), 0)
        room -= given[k]
    return given
