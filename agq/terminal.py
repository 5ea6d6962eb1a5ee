"""Tables that are whole: no cell is cut, whether in a narrow terminal, a pipe or a file.

A table that fits is printed as such. In a narrower terminal the words of its widest columns go on
several lines; where even single words do not fit, each row becomes a list of its cells. What is no
terminal has no width, so a table there is as wide as it needs. Consoles that print these tables
are made by :func:`console`; they print no text of others that a terminal would obey
(`agq.plain_text`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from agq.plain_text import printable

SILENT_S = 2.0
"""Longest that a command is silent without a terminal."""

_GAP = 2
"""Spaces between columns."""

_UNLIMITED = 10_000


class _PlainConsole(Console):
    """Writes out what a terminal would obey in any text; its own colours and moves stay."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def console(*, stderr: bool = False, wrap: bool = False) -> Console:
    """Return a console that leaves lines as long as they are, or wraps them itself."""
    return _PlainConsole(
        stderr=stderr, highlight=False, soft_wrap=not wrap, markup=False, emoji=False
    )


@contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """Say on standard error what a command is at; yields what is to be called with what comes next.

    A terminal shows it at once, and no more when it is over. Elsewhere a line is printed of what
    takes longer than `SILENT_S`.
    """
    shown = console(stderr=True)
    if shown.is_terminal:
        with shown.status(Text(printable(text))) as status:
            yield lambda now: status.update(Text(printable(now)))
        return
    timers: list[threading.Timer] = []

    def say(now: str) -> None:
        for timer in timers:
            timer.cancel()
        timers[:] = [threading.Timer(SILENT_S, shown.print, [f"{now} ..."])]
        timers[0].daemon = True
        timers[0].start()

    say(text)
    try:
        yield say
    finally:
        timers[0].cancel()


class WholeTable:
    """A table for a rich console.

    Parameters
    ----------
    title
        Line above it; the run or volume that the table is about.
    columns
        Headings.
    numbers
        Headings of the columns that are aligned at the right.
    legend
        Line below it that explains short headings.
    """

    def __init__(
        self, title: str, columns: Sequence[str], *, numbers: Sequence[str] = (), legend: str = ""
    ) -> None:
        self.title = title
        self.legend = legend
        self._columns = columns
        self._numbers = numbers
        self._rows: list[tuple[list[Any], str]] = []

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def add_row(self, *cells: Any, style: str = "") -> None:
        """Add a row; cells are texts, which may hold line ends, or other renderables of rich."""
        row = [Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells]
        self._rows.append((row, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        available = options.max_width if console.is_terminal else _UNLIMITED
        unlimited = options.update(width=_UNLIMITED)
        if self.title:
            yield Text(self.title, "bold")
        widths = self._widths(console, unlimited, available)
        if widths is None:
            for row, style in self._rows:
                yield self._list(row, style)
        else:
            table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
            for name, width in zip(self._columns, widths, strict=True):
                table.add_column(
                    Text(name),
                    justify="right" if name in self._numbers else "left",
                    width=width,
                    overflow="fold",
                )
            for row, style in self._rows:
                table.add_row(*row, style=style)
            yield from console.render(table, unlimited)
        if self.legend:
            yield Text(self.legend, "dim")

    def _widths(
        self, console: Console, options: ConsoleOptions, available: int
    ) -> list[int] | None:
        """Return the width of each column; None if the longest words do not fit."""
        least, widths = [], []
        for i, name in enumerate(self._columns):
            cells = [Text(name), *(row[i] for row, _ in self._rows)]
            sizes = [Measurement.get(console, options, cell) for cell in cells]
            least.append(max(size.minimum for size in sizes))
            widths.append(max(size.maximum for size in sizes))
        while sum(widths) + _GAP * (len(widths) - 1) > available:
            wide = [i for i, width in enumerate(widths) if width > least[i]]
            if not wide:
                return None
            widths[max(wide, key=widths.__getitem__)] -= 1
        return widths

    def _list(self, row: Sequence[Any], style: str) -> Text:
        """Return a row as lines of heading and cell; cells without words are left out."""
        cells = zip(self._columns, row, strict=True)
        text = _lines((name, cell) for name, cell in cells if isinstance(cell, Text))
        text.append("\n")
        text.stylize_before(style)
        return text


def facts(title: str, rows: Iterable[tuple[str, str]]) -> Text:
    """Return lines of name and value, below a title; a value may have several lines."""
    lines = _lines((name, Text(printable(value))) for name, value in rows)
    return Text("\n").join([Text(title, "bold"), lines])


def _lines(rows: Iterable[tuple[str, Text]]) -> Text:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0) + _GAP
    indent = Text("\n" + " " * width)
    lines = [
        Text.assemble((f"{name:<{width}}", "dim"), indent.join(value.split("\n")))
        for name, value in rows
    ]
    return Text("\n").join(lines)
