"""The order of section files: by the numbers in their names, with gaps and duplicates found.

Names are compared without case. A sign before a number counts where only some names have it
(``z1``, ``z-1``); where all have it, it separates (``scan-1``, ``scan-2``). A dot between digits
is a decimal point, unless a number such as ``1.10`` shows that both sides count.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby, pairwise
from math import gcd
from pathlib import Path

from agq.errors import InputError

_NUMBER = re.compile(r"((?<![0-9])[-+\u2212])?([0-9]+(?:\.[0-9]+)*)")
# Of several numbers in a name one counts sections if at least this part of its range is there:
# a time or a date does not.
_INDEX_FILL = 0.5
_CHANNEL = re.compile(r"(?:^|[^a-z])(?:c|ch|chan|channel)[-_ ]?$")
_MOST_SPAN = 1000
_LISTED = 8

_CHANNELS = 7

Row = tuple[Decimal, ...]


@dataclass(frozen=True)
class Numbered:
    """Files in the order of their numbers.

    Attributes
    ----------
    places
        A file for each section, or None where the number of one is missing.
    missing
        Names of the missing sections, as their files would be numbered.
    """

    places: tuple[Path | None, ...]
    missing: tuple[str, ...]


def in_order(files: Sequence[Path], where: str) -> Numbered:
    """Put section files in order.

    Parameters
    ----------
    files
        At least one, each with a suffix.
    where
        The folder or glob, for messages.

    Returns
    -------
    Numbered
        Without numbers in any name: the files by name.

    Raises
    ------
    InputError
        If two files have the same number, or the names do not follow one pattern.
    """
    folder = os.path.commonpath([file.parent for file in files])
    # Without the suffix; sections may lie in folders that are numbered too.
    stems = {file: str(file.relative_to(folder).with_suffix("")) for file in files}
    files = sorted(files, key=lambda file: (stems[file].casefold(), stems[file], file.suffix))
    parsed = [_parse(stems[file].casefold()) for file in files]
    if not any(names.numbers for names in parsed):
        return Numbered(tuple(files), ())
    rows = _rows(files, parsed, where)
    order = sorted(range(len(files)), key=rows.__getitem__)
    for one, other in pairwise(order):
        if rows[one] == rows[other]:
            raise InputError(
                f"{where}: {files[one].name} and {files[other].name} have the same number; remove "
                "one of the two, or name the sections by a glob that leaves it out"
            )
    return _with_gaps([files[i] for i in order], [rows[i] for i in order], where)


def listed(names: Sequence[str]) -> str:
    """Return a list for a message, cut where it is long."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@dataclass(frozen=True)
class _Name:
    """A file name: the texts around its numbers, and the numbers with their signs."""

    texts: tuple[str, ...]
    signs: tuple[str, ...]
    numbers: tuple[str, ...]


def _parse(stem: str) -> _Name:
    texts, signs, numbers, end = [], [], [], 0
    for match in _NUMBER.finditer(stem):
        texts.append(stem[end : match.start()])
        signs.append((match[1] or "").replace("\u2212", "-"))
        numbers.append(match[2])
        end = match.end()
    return _Name((*texts, stem[end:]), tuple(signs), tuple(numbers))


def _rows(files: Sequence[Path], names: Sequence[_Name], where: str) -> list[Row]:
    """Return the numbers of each name that differ between the names."""
    first = names[0]
    for file, name in zip(files, names, strict=True):
        # What follows the first number may be a text of any kind: a date, a checksum.
        if name.texts[0] != first.texts[0] or bool(name.numbers) != bool(first.numbers):
            raise InputError(
                f"{where}: {files[0].name} and {file.name} are not named alike, so they are not "
                "one stack; name its sections by a glob"
            )
    columns: list[tuple[Decimal, ...]] = []
    for n, (text, _) in enumerate(zip(first.texts, first.numbers, strict=False)):
        if any(name.texts[n : n + 1] != (text,) or len(name.numbers) <= n for name in names):
            break
        for column in _columns([(name.signs[n], name.numbers[n]) for name in names]):
            if len(set(column)) > 1:
                columns.append(column)
                if _CHANNEL.search(text) and len(set(column)) <= _CHANNELS:
                    raise InputError(
                        f"{where}: {files[0].name} to {files[-1].name} are several channels, not "
                        "one stack; name one channel by a glob"
                    )
    if not columns:
        columns = [(Decimal(0),) * len(files)]
    return list(zip(*columns, strict=True))


def _columns(tokens: Sequence[tuple[str, str]]) -> Iterator[tuple[Decimal, ...]]:
    """Read the same number of every name: one column, or one for each side of its dots."""
    signed = len({bool(sign) for sign, _ in tokens}) > 1 or len({sign for sign, _ in tokens}) > 1
    parts = [text.split(".") for _, text in tokens]
    decimals = all(len(part) < 3 for part in parts) and (
        len({len(part[1]) for part in parts if len(part) == 2}) < 2
        or not any(len(part) == 2 and part[1].endswith("0") and part[1] != "0" for part in parts)
    )
    if decimals:
        yield tuple(Decimal(text) * (-1 if signed and sign == "-" else 1) for sign, text in tokens)
        return
    for n in range(max(map(len, parts))):
        yield tuple(Decimal(part[n]) if n < len(part) else Decimal(-1) for part in parts)


def _with_gaps(files: list[Path], rows: list[Row], where: str) -> Numbered:
    """Find the column that counts the sections, and what it leaves out."""
    width = len(rows[0])
    whole = [_Runs([[row[n] for row in rows]]) for n in range(width)]
    # The last number may start again whenever one before it changes: wafer 1 section 1, 2, ...
    groups = [[row[-1] for row in group] for _, group in groupby(rows, lambda row: row[:-1])]
    restarting = [_Runs(groups)] if 2 * len(groups) <= len(rows) else []
    candidates = [runs for runs in (*whole, *restarting) if runs.rising]
    if not candidates:
        return Numbered(tuple(files), ())
    best = max(candidates, key=lambda runs: runs.fill)
    if width > 1 and best.fill < _INDEX_FILL:
        return Numbered(tuple(files), ())
    if best.span > _MOST_SPAN * len(files):
        raise InputError(
            f"{where}: the numbers of {files[0].name} to {files[-1].name} do not count sections: "
            f"{best.span - len(files)} would be missing; rename the files"
        )
    places: list[Path | None] = []
    missing: list[str] = []
    here = iter(files)
    for value, there in best.steps():
        places.append(next(here) if there else None)
        if not there:
            missing.append(str(value))
    return Numbered(tuple(places), tuple(missing))


class _Runs:
    """Runs of rising numbers, and the step that all their differences are multiples of."""

    def __init__(self, runs: list[list[Decimal]]) -> None:
        self._runs = runs
        differences = [b - a for run in runs for a, b in pairwise(run)]
        self.rising = all(difference > 0 for difference in differences)
        if not self.rising:
            return
        # As whole numbers of the last decimal.
        scale = max((-int(d.as_tuple().exponent) for d in differences), default=0)
        whole = [int(d.scaleb(max(0, scale))) for d in differences]
        step = gcd(*whole) or 1
        self._step = Decimal(step).scaleb(-max(0, scale))
        self.span = len(runs) + sum(whole) // step
        self.fill = sum(map(len, runs)) / self.span

    def steps(self) -> Iterator[tuple[Decimal, bool]]:
        """Yield every number of the runs, and whether it is there."""
        for run in self._runs:
            value = run[0]
            for number in run:
                while value < number:
                    yield value, False
                    value += self._step
                yield number, True
                value = number + self._step
