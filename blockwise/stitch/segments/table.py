"""The table of segments: one pass over the leaves, slab by slab.

The blocks of one layer of leaves in z have consecutive numbers, so layers come in the order of
fragment ids and only one has to be sorted at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agq.blockwise.stitch.files import StitchFiles
from agq.blockwise.stitch.segments.ids import ClusterTable
from agq.blockwise.stitch.settings import SegmentIds
from agq.blockwise.stitch.superblocks import Superblock
from agq.blockwise.storage.files import atomic_file
from agq.blockwise.storage.npz import array_table, load_arrays

_LARGEST = 10
_ROWS = 2**16
"""Rows of a row group; fixed, so that the bytes do not depend on the superblocks."""

_SCHEMA = pa.schema(
    [
        ("segment", pa.uint64()),
        ("smallest_fragment", pa.uint64()),
        ("voxels", pa.int64()),
        ("fragments", pa.int64()),
        *((f"{end}_{axis}", pa.int64()) for end in ("begin", "end") for axis in "zyx"),
    ]
)


def write_segments(
    run_dir: str, segment_ids: SegmentIds, leaves: Sequence[Superblock]
) -> dict[str, Any]:
    """Write the table of segments in ascending order; return counts and the largest segments.

    The table has the columns ``segment``, ``smallest_fragment``, ``voxels``, ``fragments`` and the
    bounding box in voxels, ``begin_z`` .. ``end_x`` (one past the last voxel).
    """
    files = StitchFiles(Path(run_dir))
    small = np.zeros(2, np.int64)
    count = 0
    for leaf in leaves:
        arrays = load_arrays(files.names(leaf), "small", "segments.ids")
        small += arrays["small"]
        count += len(arrays["segments.ids"])
    largest: list[tuple[int, int, int]] = []
    with (
        atomic_file(files.smallest) as ids_file,
        atomic_file(files.segments) as table_file,
        pq.ParquetWriter(table_file, _SCHEMA, compression="zstd") as writer,
    ):
        header = {"descr": "<u8", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(ids_file, header)
        waiting: list[pa.Table] = []
        done = 0
        for _, layer in groupby(sorted(leaves), lambda leaf: leaf.index[0]):
            segments = _layer(files, list(layer))
            ids_file.write(segments.ids.tobytes())
            numbers = segments.ids
            if segment_ids == "consecutive":
                numbers = np.arange(done + 1, done + len(segments) + 1, dtype=np.uint64)
            done += len(segments)
            largest = _largest(largest, numbers, segments)
            waiting.append(_arrow(numbers, segments))
            waiting = _flush(writer, waiting, _ROWS)
        _flush(writer, waiting, 1)
    return {
        "segments": count,
        "small_segments": int(small[0]),
        "small_voxels": int(small[1]),
        "largest": [
            {"id": number, "voxels": voxels, "fragments": fragments}
            for voxels, number, fragments in largest
        ],
    }


def _layer(files: StitchFiles, leaves: Sequence[Superblock]) -> ClusterTable:
    parts = [
        array_table(ClusterTable, "segments", load_arrays(files.names(leaf), "segments."))
        for leaf in leaves
    ]
    table = ClusterTable(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "voxels", "fragments", "boxes")
        )
    )
    return table.take(np.argsort(table.ids, kind="stable"))


def _largest(
    known: list[tuple[int, int, int]], numbers: NDArray[np.uint64], segments: ClusterTable
) -> list[tuple[int, int, int]]:
    rows = np.lexsort((numbers, -segments.voxels))[:_LARGEST].tolist()
    found = [
        (int(segments.voxels[row]), int(numbers[row]), int(segments.fragments[row])) for row in rows
    ]
    return sorted(known + found, key=lambda entry: (-entry[0], entry[1]))[:_LARGEST]


def _arrow(numbers: NDArray[np.uint64], segments: ClusterTable) -> pa.Table:
    boxes = np.ascontiguousarray(segments.boxes.T)
    columns = [numbers, segments.ids, segments.voxels, segments.fragments, *boxes]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=_SCHEMA)


def _flush(writer: pq.ParquetWriter, waiting: list[pa.Table], least: int) -> list[pa.Table]:
    """Write full row groups (any rest too, if ``least`` is 1); return what waits for more rows."""
    table = pa.concat_tables(waiting) if waiting else _SCHEMA.empty_table()
    while table.num_rows >= least:
        writer.write_table(table.slice(0, _ROWS).combine_chunks(), row_group_size=_ROWS)
        table = table.slice(_ROWS)
    return [table] if table.num_rows else []
