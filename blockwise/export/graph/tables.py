"""Tables of an exported graph, and how they are read: a Parquet file for each superblock.

::

    OUT/graph.json                    what was exported: grid, unit, key of the stitch
    OUT/fragments/0-Z-Y-X.parquet     fragments of a leaf superblock
    OUT/edges/0-Z-Y-X.parquet         contacts whose first fragment lies in it
    OUT/merges/L-Z-Y-X.parquet        merges that superblock of level L decided, best first

Scores are fractions relative to the thresholds of the stitch: ``numerator / denominator``, of which
`units` of the record are an affinity of 1; ``score`` is the same as affinity. Voxels are those of
the volume, (z, y, x); world positions are of their lower corners.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from agq.errors import InputError
from agq.reading import read_record

RECORD = "graph.json"
VERSION = 2
"""Of the tables: 1 had no class and no affinity of edges."""

Table = Literal["fragments", "edges", "merges"]

_PAIR = [
    ("u", pa.uint64()),
    ("v", pa.uint64()),
    ("numerator", pa.int64()),
    ("denominator", pa.int64()),
    ("score", pa.float64()),
]


def _places(*names: str) -> list[tuple[str, pa.DataType]]:
    return [(f"{name}_{axis}", pa.int64()) for name in names for axis in "zyx"]


SCHEMAS: dict[Table, pa.Schema] = {
    "fragments": pa.schema(
        [
            ("id", pa.uint64()),
            ("segment", pa.uint64()),
            ("voxels", pa.int64()),
            *_places("begin", "end", "point"),
        ]
    ),
    "edges": pa.schema(
        [
            *_PAIR,
            ("class", pa.string()),
            ("affinity", pa.float64()),
            ("contacts", pa.int64()),
            ("area", pa.int64()),
            *_places("voxel", "world"),
        ]
    ),
    "merges": pa.schema(_PAIR),
}
"""Columns of each table.

``segment`` is 0 for fragments of segments that are too small. ``class`` is ``across`` or ``within``
for contacts across a block border or inside a block, and ``overlap`` for fragments that only
overlap; ``affinity`` is the mean, without threshold. ``contacts`` counts touching pairs of voxels,
``area`` is that of their faces in square world units. An edge between fragments that only
overlap has neither, no affinity and no position.
"""


def read_graph(folder: Path, table: Table) -> Iterator[pa.Table]:
    """Yield the rows of a table, superblock by superblock.

    Merges come in an order in which they can be made: parts before what is made of them.

    Raises
    ------
    InputError
        If the folder holds no graph, or one that is not complete.
    """
    try:
        record = read_record(folder / RECORD)
    except FileNotFoundError:
        raise InputError(f"{folder}: no graph is exported there (it has no {RECORD})") from None
    if not record.get("done"):
        raise InputError(f"{folder}: the export is not complete; run the same command again")
    files = (folder / table).glob("*.parquet")
    for file in sorted(files, key=lambda f: [int(n) for n in f.stem.split("-")]):
        yield pq.read_table(file, schema=SCHEMAS[table])
