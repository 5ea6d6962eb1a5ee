"""Ids that stay: segments keep the id of the last stitch if they hold the same fragments.

Once a stitch with other results begins, the id map of the last one is moved aside (`lut-before`).
A fragment knows its id there; going up the tree, so does a cluster whose fragments all had the same
one (:mod:`segments`). A segment of such fragments, as many as had that id, is the same as before.
All others get ids above any that was ever given, in the order of their smallest fragment. Which
fragments went from one id to another is a table, `lut/changed_ids.parquet`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.steps import Step
from agq.blockwise.stitch.superblocks import StitchFiles, SuperblockTask, SuperblockTree
from agq.blockwise.storage.arrays import Columns, Ids, Numbers, load_arrays
from agq.blockwise.storage.files import atomic_file, require_folder, write_atomic
from agq.blockwise.volumes.triples import Triple, checked_triple
from agq.errors import DamagedError
from agq.reading import read_record

SEVERAL = np.uint64(2**64 - 1)
"""In the place of an id: fragments that had different ones."""

_RECORD = "record.json"
_SHOWN = 5

_SCHEMA = pa.schema(
    [
        ("before", pa.uint64()),
        ("after", pa.uint64()),
        ("fragments", pa.int64()),
        ("voxels", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Before:
    """The ids of the last stitch, in a folder of their own.

    Attributes
    ----------
    key
        Of the step that made them.
    most
        The largest id ever given.
    blocks
        Digest of the blocks that they are of.
    grid_shape, leaf_shape
        Blocks of the volume, and of a leaf of the map.
    """

    key: str
    most: int
    blocks: str
    grid_shape: Triple
    leaf_shape: Triple

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return what a folder holds, None if there is nothing.

        Raises
        ------
        InputError
            If its record is damaged.
        """
        try:
            record = read_record(folder / _RECORD)
        except FileNotFoundError:
            return None
        try:
            shapes = [checked_triple(n, record[n], 1) for n in ("grid_shape", "leaf_shape")]
            return cls(str(record["key"]), int(record["most"]), str(record["blocks"]), *shapes)
        except (KeyError, TypeError, ValueError):
            raise DamagedError(f"{folder / _RECORD}: file is damaged") from None

    def move(self, files: StitchFiles) -> None:
        """Move the id map of the last stitch aside, in the place of what lies there.

        Cut off anywhere, the same call later ends in the same: a map with a record is a whole one.
        """
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        write_atomic(files.lut / _RECORD, json.dumps(record).encode())
        Step.forget(files.run_dir, "lut")
        if files.before.exists():
            shutil.rmtree(files.before)
        files.lut.rename(files.before)

    def ids_of(self, files: StitchFiles, fragments: Ids) -> Ids:
        """Return the ids that fragments of the same blocks had; 0 for background."""
        numbers, _ = BlockGrid.split_ids(fragments)
        tree = SuperblockTree(self.grid_shape, self.leaf_shape)
        ids = np.zeros(len(fragments), np.uint64)
        for leaf, blocks in tree.leaves(np.unique(numbers)):
            rows = np.isin(numbers, blocks)
            lut = BlockLut.open(files.before / "map" / files.map(leaf).name)
            ids[rows] = lut.segments_of(fragments[rows])
        return ids


def largest_id(segments: Path) -> int:
    """Return the largest id in a table of segments; 0 if it has none."""
    metadata = pq.read_metadata(segments)
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return max((int(group.column(0).statistics.max) for group in groups), default=0)


def arrow_table(columns: Sequence[NDArray[Any]], schema: pa.Schema) -> pa.Table:
    """Return columns of numbers as a table; they are not copied.

    `pyarrow.array` would do, but it imports pandas.
    """
    arrays = []
    for field, column in zip(schema, columns, strict=True):
        assert field.type == pa.from_numpy_dtype(column.dtype)
        buffer = pa.py_buffer(np.ascontiguousarray(column))
        arrays.append(pa.Array.from_buffers(field.type, len(column), [None, buffer], 0))
    return pa.Table.from_arrays(arrays, schema=schema)


class SegmentsBefore:
    """The segments of the last stitch in the order of their smallest fragments, read once."""

    def __init__(self, table: Path) -> None:
        self._columns = ["smallest_fragment", "segment", "fragments"]
        self._batches = pq.ParquetFile(table).iter_batches(columns=self._columns)
        self._rows = [np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64)]

    def keep(self, smallest: Ids, before: Ids, fragments: Numbers) -> Ids:
        """Return the ids of segments that are as before, 0 for others.

        Parameters
        ----------
        smallest
            Their smallest fragments, ascending, and above those of earlier calls.
        before
            The id that all their fragments had.
        fragments
            How many there are.
        """
        ids = np.zeros(len(smallest), np.uint64)
        if not len(smallest):
            return ids
        for batch in self._until(smallest[-1]):
            columns = [batch[name].to_numpy() for name in self._columns]
            pairs = zip(self._rows, columns, strict=True)
            self._rows = [np.concatenate(pair) for pair in pairs]
        first, segment, count = self._rows
        if len(first):
            row = np.minimum(np.searchsorted(first, smallest), len(first) - 1)
            same = (first[row] == smallest) & (segment[row] == before) & (count[row] == fragments)
            ids[same] = segment[row[same]]
        rest = int(np.searchsorted(first, smallest[-1], side="right"))
        self._rows = [column[rest:] for column in self._rows]
        return ids

    def _until(self, last: np.uint64) -> Any:
        while not len(self._rows[0]) or self._rows[0][-1] < last:
            batch = next(self._batches, None)
            if batch is None:
                return
            yield batch


@dataclass(frozen=True)
class ChangedTable(Columns):
    """Fragments that went from one id to another; 0 is background.

    Attributes
    ----------
    before, after
        The ids.
    fragments, voxels
        How many have gone.
    """

    before: Ids
    after: Ids
    fragments: Numbers
    voxels: Numbers

    def summed(self) -> ChangedTable:
        """Return one row for each pair of ids, sorted."""
        if not len(self):
            return self
        pairs, row = np.unique(
            np.stack((self.before, self.after), axis=1), axis=0, return_inverse=True
        )
        fragments, voxels = np.zeros((2, len(pairs)), np.int64)
        np.add.at(fragments, row.reshape(-1), self.fragments)
        np.add.at(voxels, row.reshape(-1), self.voxels)
        return ChangedTable(pairs[:, 0], pairs[:, 1], fragments, voxels)


@dataclass(frozen=True)
class FindChanged(SuperblockTask):
    """Write which ids changed in leaves; the id map must exist."""

    before: Before

    def run(self) -> None:
        """Write the table of each leaf."""
        files = StitchFiles(self.run_dir)
        for leaf, _ in self.items:
            path = files.changed(leaf)
            if path.exists():
                continue
            nodes = load_arrays(files.evidence(leaf), "nodes.ids", "nodes.sizes")
            ids = nodes["nodes.ids"]
            old, new = (
                self.before.ids_of(files, ids),
                BlockLut.open(files.map(leaf)).segments_of(ids),
            )
            ones = np.ones(len(ids), np.int64)
            table = ChangedTable(old, new, ones, nodes["nodes.sizes"]).take(old != new)
            files.save(path, table.summed().arrays("changed"))


@dataclass(frozen=True)
class WriteChanged(SuperblockTask):
    """Write which ids changed in leaves, in one table; one process holds its rows."""

    def run(self) -> list[dict[str, Any]]:
        """Return what became of the ids that changed most, by voxels."""
        files = StitchFiles(self.run_dir)
        leaves = self.items.places()
        tables = [ChangedTable.load(files.changed(leaf), "changed") for leaf in leaves]
        table = ChangedTable.concatenate(tables).summed()
        require_folder(self.run_dir)
        rows = arrow_table([getattr(table, name) for name in table.names()], _SCHEMA)
        with atomic_file(files.lut / "changed_ids.parquet") as file:
            pq.write_table(rows, file, compression="zstd")
        return _largest_changes(table)


def _largest_changes(table: ChangedTable) -> list[dict[str, Any]]:
    old, row = np.unique(table.before, return_inverse=True)
    voxels = np.zeros(len(old), np.int64)
    np.add.at(voxels, row, table.voxels)
    shown: list[dict[str, Any]] = []
    for i in np.lexsort((old, -voxels))[:_SHOWN].tolist():
        after: NDArray[np.uint64] = table.after[row == i]
        shown.append({"before": int(old[i]), "after": after[:_SHOWN].tolist(), "into": len(after)})
    return shown
