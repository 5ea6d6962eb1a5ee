"""Edits from proofreading: fragments that must be one segment, and fragments that must not.

A CSV file has the columns ``kind`` (``merge`` or ``split``), ``a`` and ``b``, and may have
``comment``. An end is the id of a fragment or a point, three world coordinates z, y, x separated by
spaces or commas, which means the fragment there.

Fragments that merges join, directly or in a chain, are a *group*: one part from the outset. A split
makes its two ends, or their groups, *rivals*: never in one segment, not even through others; all
else is left to the evidence. That is a function of the pairs alone, whatever their order, and
:mod:`merge.agglomeration` says why it is exact in superblocks.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.blocks.sidecar import open_sidecar
from agq.blockwise.stitch.classes import Kinds
from agq.blockwise.storage.arrays import Ids, Pairs, load_arrays
from agq.blockwise.volumes.create import open_array, read_chunk
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import DamagedError, InputError
from agq.reading import read_file

MOST_BYTES = 2**28
"""Of a file of edits."""

_COLUMNS = ("kind", "a", "b")
_NUMBER = r"[-+]?\d{1,18}(?:\.\d{1,18})?"
_POINT = re.compile(rf"\s*({_NUMBER})(?:\s*,\s*|\s+)({_NUMBER})(?:\s*,\s*|\s+)({_NUMBER})\s*")
_FRAGMENT = re.compile(r"\s*(\d{1,20})\s*")
_NAMED = 5

End = int | tuple[Fraction, Fraction, Fraction]
"""A fragment, or a point in world units (z, y, x)."""


@dataclass(frozen=True)
class Edit:
    """A row of a file.

    Attributes
    ----------
    line
        Its line in the file.
    merges
        Whether the ends must be one segment; else they must not be.
    ends
        As written.
    fragments
        The fragments that they are, once found.
    """

    line: int
    merges: bool
    ends: tuple[End, End]
    fragments: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Constraints:
    """What edits ask for.

    Attributes
    ----------
    fragments, of
        Members of groups of two or more, ascending, and the smallest fragment of the group of
        each, uint64.
    rivals
        Pairs of groups, each by its smallest fragment, that must stay apart, uint64 (n, 2).
    """

    fragments: Ids
    of: Ids
    rivals: Pairs

    @property
    def groups(self) -> tuple[Ids, Ids]:
        """Members of groups, and the group of each."""
        return self.fragments, self.of

    @property
    def marks(self) -> tuple[Ids, Ids]:
        """Fragments that stand for a group with rivals, and that group."""
        marked = np.unique(self.rivals)
        return marked, marked

    @property
    def key(self) -> str:
        """What differs for other edits (64 hex digits)."""
        data = b"".join(column.tobytes() for column in self.arrays("").values())
        return hashlib.sha256(len(self.fragments).to_bytes(8, "little") + data).hexdigest()

    def __bool__(self) -> bool:
        return bool(len(self.fragments) or len(self.rivals))

    def whole(self, tags: Ids) -> NDArray[np.bool_]:
        """Return for each tag whether as many have the same one as its group has members."""
        groups, sizes = np.unique(self.of, return_counts=True)
        tag, back, counts = np.unique(tags, return_inverse=True, return_counts=True)
        whole: NDArray[np.bool_] = (sizes[np.searchsorted(groups, tag)] == counts)[back]
        return whole

    def arrays(self, prefix: str) -> dict[str, NDArray]:
        """Return what a file holds."""
        return {f"{prefix}.{n}": getattr(self, n) for n in ("fragments", "of", "rivals")}

    @classmethod
    def load(cls, path: Path, prefix: str) -> Constraints:
        """Read a file of what :meth:`arrays` returns.

        Raises
        ------
        DamagedError
            If it is missing or damaged.
        """
        arrays = load_arrays(path, f"{prefix}.")
        columns = [arrays[f"{prefix}.{name}"] for name in ("fragments", "of", "rivals")]
        if any(column.dtype != np.uint64 for column in columns) or columns[2].shape[1:] != (2,):
            raise DamagedError(f"{path}: file is damaged (columns of another type)")
        return cls(*columns)


def read_edits(path: Path) -> list[Edit]:
    """Read a file of edits.

    Raises
    ------
    InputError
        If it cannot be read; the message names the line.
    """
    try:
        text = read_file(path, most=MOST_BYTES).decode("utf-8-sig")
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip().lower() for name in next(rows, [])]
        if sorted({*header} - {"comment"}) != sorted(_COLUMNS) or len({*header}) != len(header):
            raise InputError(
                f"{path}: the first line must name the columns kind, a, b and, if wanted, comment;"
                f" it says {','.join(header)!r}"
            )
        edits = []
        for row in rows:
            if any(cell.strip() for cell in row):
                edits.append(_edit(path, rows.line_num, header, row))
    except FileNotFoundError:
        raise InputError(f"stitch.edits: {path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a CSV file in UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None
    return edits


def _edit(path: Path, line: int, header: Sequence[str], row: Sequence[str]) -> Edit:
    if len(row) != len(header):
        raise InputError(
            f"{path}, line {line}: {len(row)} values for {len(header)} columns"
            f' ({",".join(header)}); write a point as "z,y,x" in quotes, or with spaces'
        )
    values = dict(zip(header, row, strict=True))
    kind = values["kind"].strip().lower()
    if kind not in ("merge", "split"):
        raise InputError(f"{path}, line {line}: kind {values['kind']!r} is not merge or split")
    return Edit(
        line, kind == "merge", (_end(path, line, values, "a"), _end(path, line, values, "b"))
    )


def _end(path: Path, line: int, values: Mapping[str, str], name: str) -> End:
    if match := _FRAGMENT.fullmatch(values[name]):
        return int(match[1])
    if match := _POINT.fullmatch(values[name]):
        z, y, x = (Fraction(number) for number in match.groups())
        return z, y, x
    raise InputError(
        f"{path}, line {line}: {name} {values[name]!r} is neither a fragment id nor a point (z y x)"
    )


def find_fragments(
    path: Path,
    edits: Sequence[Edit],
    container: Path,
    grid: BlockGrid,
    blocks: NDArray[np.int64],
    unit: str,
) -> list[Edit]:
    """Find the fragments that ends are.

    Parameters
    ----------
    path
        Of the file of edits, for messages.
    container
        Holds ``fragments``.
    blocks
        Numbers of the blocks that take part, ascending.
    unit
        World unit of the grid, for messages.

    Raises
    ------
    InputError
        If an end is no fragment of these blocks; the message names the line.
    """
    wanted: dict[int, list[tuple[int, int, Triple | int]]] = {}
    present = set(blocks.tolist())
    for i, edit in enumerate(edits):
        for side, end in enumerate(edit.ends):
            block, what = _place(end, grid)
            if block is None:
                raise InputError(
                    f"{path}, line {edit.line}: {_told(end, unit)} is not in the volume"
                )
            if block not in present:
                raise InputError(
                    f"{path}, line {edit.line}: {_told(end, unit)} lies in block {block}, which"
                    " takes no part (not predicted, masked, or outside of the ROI)"
                )
            wanted.setdefault(block, []).append((i, side, what))
    found = np.zeros((len(edits), 2), np.uint64)
    array = open_array(container, "fragments", "r")
    for block in sorted(wanted):
        labels = read_chunk(array, grid.index(block))
        for i, side, what in wanted[block]:
            value = what if isinstance(what, int) else int(labels[what])
            if not value or not bool((labels == np.uint64(value)).any()):
                no = "lies on background" if not value else "does not exist"
                told = _told(edits[i].ends[side], unit)
                raise InputError(f"{path}, line {edits[i].line}: {told} {no}")
            found[i, side] = value
    return [
        Edit(edit.line, edit.merges, edit.ends, (int(a), int(b)))
        for edit, (a, b) in zip(edits, found.tolist(), strict=True)
    ]


def same_fragments(run_dir: Path, edits: Sequence[Edit]) -> tuple[list[Edit], dict[int, int]]:
    """Let one piece stand for all pieces of a fragment of another model (:mod:`names`).

    Parameters
    ----------
    run_dir
        Holds the sidecars.
    edits
        Whose fragments are found.

    Returns
    -------
    list
        The edits, each fragment by the smallest of its pieces that they name.
    dict
        Name of each of these pieces.
    """
    pieces = sorted({fragment for edit in edits for fragment in edit.fragments})
    names: dict[int, int] = {}
    for block, group in groupby(pieces, lambda piece: piece >> LOCAL_BITS):
        tables = open_sidecar(run_dir, block).frame("tables")
        local = np.array(list(group)) & (2**LOCAL_BITS - 1)
        originals = tables["original_labels"][np.searchsorted(tables["nodes"], local)]
        names |= zip((local + (block << LOCAL_BITS)).tolist(), originals.tolist(), strict=True)
    first = {name: piece for piece, name in reversed(names.items())}
    one = {piece: first[name] for piece, name in names.items()}
    made = [replace(e, fragments=(one[e.fragments[0]], one[e.fragments[1]])) for e in edits]
    return made, {piece: name for name, piece in first.items()}


def _place(end: End, grid: BlockGrid) -> tuple[int | None, Triple | int]:
    """Return the block of an end, None outside, and its voxel in the block or fragment."""
    if isinstance(end, int):
        number = end >> LOCAL_BITS
        return (number if number < grid.n_blocks else None), end
    placed = zip(end, grid.offset, grid.voxel_size, strict=True)
    voxel = [math.floor((value - offset) / size) for value, offset, size in placed]
    if any(not 0 <= v < n for v, n in zip(voxel, grid.volume_shape, strict=True)):
        return None, (0, 0, 0)
    index = [v // n for v, n in zip(voxel, grid.write_shape, strict=True)]
    inside = triple(v % n for v, n in zip(voxel, grid.write_shape, strict=True))
    return int(np.ravel_multi_index(index, grid.shape)), inside


def _told(end: End, unit: str) -> str:
    if isinstance(end, int):
        return f"fragment {end}"
    return f"point {', '.join(f'{float(value):.15g}' for value in end)} {unit}"


def constrain(path: Path, edits: Sequence[Edit]) -> Constraints:
    """Return what edits ask for, once their fragments are found.

    Raises
    ------
    InputError
        If they contradict each other, or a split has both ends in one fragment; the message names
        the lines.
    """
    forest = _Forest(edits)
    rivals = set()
    for edit in edits:
        if edit.merges:
            continue
        a, b = edit.fragments
        if a == b:
            raise InputError(
                f"{path}, line {edit.line}: both ends of the split lie in fragment {a}, and a"
                " fragment is never cut"
            )
        if forest.root(a) == forest.root(b):
            chain = forest.chain(a, b)
            lines = ", ".join(map(str, chain[:_NAMED])) + (", ..." if len(chain) > _NAMED else "")
            raise InputError(
                f"{path}, line {edit.line}: the split of fragments {a} and {b} contradicts the"
                f" merges that join them (line {lines}); remove one"
            )
        rivals.add(tuple(sorted((forest.root(a), forest.root(b)))))
    of = {fragment: forest.root(fragment) for fragment in sorted(forest.parent)}
    members = [fragment for fragment, root in of.items() if forest.size[root] > 1]
    return Constraints(
        np.array(members, np.uint64),
        np.array([of[member] for member in members], np.uint64),
        np.array(sorted(rivals), np.uint64).reshape(-1, 2),
    )


class _Forest:
    """Groups of fragments, each by its smallest one, and the merges that make them."""

    def __init__(self, edits: Sequence[Edit]) -> None:
        self.parent: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self._merges: dict[int, list[tuple[int, int]]] = {}
        for edit in edits:
            a, b = edit.fragments
            for fragment in (a, b):
                self.parent.setdefault(fragment, fragment)
                self.size.setdefault(fragment, 1)
            if not edit.merges or a == b:
                continue
            self._merges.setdefault(a, []).append((b, edit.line))
            self._merges.setdefault(b, []).append((a, edit.line))
            low, high = sorted((self.root(a), self.root(b)))
            if low != high:
                self.parent[high] = low
                self.size[low] += self.size[high]

    def root(self, fragment: int) -> int:
        while (above := self.parent[fragment]) != fragment:
            self.parent[fragment] = fragment = self.parent[above]
        return fragment

    def chain(self, a: int, b: int) -> list[int]:
        """Return the lines of the fewest merges that join two fragments of a group."""
        came: dict[int, tuple[int, int]] = {a: (a, 0)}
        edge = [a]
        while b not in came:
            beyond = []
            for fragment in edge:
                for other, line in self._merges[fragment]:
                    if other not in came:
                        came[other] = fragment, line
                        beyond.append(other)
            edge = beyond
        lines = []
        while b != a:
            b, line = came[b]
            lines.append(line)
        return sorted(lines)


def require_classes(
    path: Path, edits: Sequence[Edit], kinds: Kinds, names: Mapping[int, int]
) -> None:
    """Check that no merge joins classes that may not merge.

    Parameters
    ----------
    names
        What :func:`same_fragments` returns; else nothing.

    Raises
    ------
    InputError
        Naming the line of the first merge that does.
    """
    ends = np.array([e.fragments for e in edits if e.merges], np.uint64).reshape(-1, 2)
    named = np.array([names.get(end, end) for end in ends.ravel().tolist()], np.uint64)
    known = dict(zip(ends.ravel().tolist(), kinds.of(named).tolist(), strict=True))
    parent = {fragment: fragment for fragment in known}

    def root(fragment: int) -> int:
        while parent[fragment] != fragment:
            parent[fragment] = fragment = parent[parent[fragment]]
        return fragment

    for edit in edits:
        if not edit.merges:
            continue
        a, b = map(root, edit.fragments)
        if not kinds.join(known[a], known[b]):
            raise InputError(
                f"{path}, line {edit.line}: the merge of fragments {edit.fragments[0]} and"
                f" {edit.fragments[1]} joins classes that may not merge"
                " (stitch.classes_may_merge)"
            )
        parent[a] = b
        known[b] |= known[a]
