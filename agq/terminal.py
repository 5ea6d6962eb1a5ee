"""Tables that are whole: no cell is cut, whether in a narrow terminal, a pipe or a file.

A table that fits is printed as such. Where it is too wide, the words of its widest columns go on
several lines, but no number does; where even single words do not fit, each row becomes a list of
its cells. What is no terminal is as wide as COLUMNS says, or 80. Consoles that print these tables
are made by :func:`console`; they print no text of others that a terminal would obey
(`agq.plain_text`).
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.control import Control
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from agq import waiting
from agq.plain_text import printable

SILENT_S = 2.0
"""Longest that a command is silent without a terminal."""

_GAP = 2
"""Spaces between columns."""

_UNLIMITED = 10_000

WIDTH: Final = 80
"""Columns of what is printed where nothing says how many there are."""


class _PlainConsole(Console):
    """Writes out what a terminal would obey in any text; its own colours and moves stay."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, in place of what the command was said to be doing."""
        if not (len(objects) == 1 and isinstance(objects[0], Control)):  # bars that move
            waiting.over()
        super().print(*objects, **options)

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

    A terminal shows it as `agq.waiting` does. Elsewhere a line is printed of what takes longer than
    `SILENT_S`.
    """
    shown = console(stderr=True)
    if shown.is_terminal:
        waiting.doing(text)
        try:
            yield waiting.doing
        finally:
            waiting.over()
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
        Headings. A column without a word in any row is left out.
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
        unlimited = options.update(width=_UNLIMITED)
        if self.title:
            yield Text(wrapped(self.title, options.max_width), "bold")
        shown = [i for i in range(len(self._columns)) if self._has_words(i)]
        widths = self._widths(console, unlimited, shown, options.max_width)
        if widths is None:
            for row, style in self._rows:
                yield self._list(row, style)
        else:
            table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
            for i, width in zip(shown, widths, strict=True):
                name = self._columns[i]
                table.add_column(
                    Text(name),
                    justify="right" if name in self._numbers else "left",
                    width=width,
                    overflow="fold",
                )
            for row, style in self._rows:
                table.add_row(*(row[i] for i in shown), style=style)
            yield from console.render(table, unlimited)
        if self.legend:
            yield Text(wrapped(self.legend, options.max_width), "dim")

    def _has_words(self, column: int) -> bool:
        return any(not isinstance(row[column], Text) or row[column].plain for row, _ in self._rows)

    def _widths(
        self, console: Console, options: ConsoleOptions, shown: Sequence[int], available: int
    ) -> list[int] | None:
        """Return the width of each column shown; None if the longest words do not fit."""
        least, widths = [], []
        for i in shown:
            cells = [Text(self._columns[i]), *(row[i] for row, _ in self._rows)]
            sizes = [Measurement.get(console, options, cell) for cell in cells]
            widths.append(max(size.maximum for size in sizes))
            whole = self._columns[i] in self._numbers
            least.append(widths[-1] if whole else max(size.minimum for size in sizes))
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
    """Return lines of name and value, below a title; a value may have several lines.

    Longer ones go on below, as far as words do.
    """
    lines = _lines(((name, Text(printable(value))) for name, value in rows), WIDTH)
    return Text("\n").join([Text(wrapped(title), "bold"), lines])


def wrapped(text: str, width: int = WIDTH) -> str:
    """Break the lines of a text between words; a word that is longer than a line stays whole."""
    return "\n".join(
        part
        for line in text.split("\n")
        for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        or [""]
    )


def _lines(rows: Iterable[tuple[str, Text]], most: int | None = None) -> Text:
    """Return lines of name and value; with `most`, values are broken to so many columns."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0) + _GAP
    if most is not None:
        rows = [(name, Text(wrapped(value.plain, most - width))) for name, value in rows]
    indent = Text("\n" + " " * width)
    lines = [
        Text.assemble((f"{name:<{width}}", "dim"), indent.join(value.split("\n")))
        for name, value in rows
    ]
    return Text("\n").join(lines)
