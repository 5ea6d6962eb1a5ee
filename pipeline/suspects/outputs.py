"""The list of suspects as tables: in a terminal, Parquet, CSV, and tasks of WEBKNOSSOS."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agq.blockwise.storage.files import atomic_file, make_folder, write_atomic
from agq.blockwise.volumes.triples import commas
from agq.pipeline.suspects.find import Suspect
from agq.pipeline.suspects.listed import STITCH
from agq.terminal import WholeTable

_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("kind", pa.string()),
        ("probability", pa.float64()),
        ("bits", pa.float64()),
        *((f"{name}", pa.uint64()) for name in ("segment", "other_segment")),
        *((f"{name}", pa.uint64()) for name in ("fragment", "other_fragment")),
        *((f"{name}", pa.int64()) for name in ("voxels", "other_voxels", "z", "y", "x")),
        *((f"world_{axis}", pa.int64()) for axis in "zyx"),
        ("why", pa.string()),
        ("link", pa.string()),
    ]
)


def suspects_table(suspects: Sequence[Suspect], title: str) -> WholeTable:
    """Return a table for a rich console."""
    numbers = ("p", "mbits", "voxels")
    table = WholeTable(
        title,
        ("kind", *numbers, "voxel z,y,x", "segments", "why"),
        numbers=numbers,
        legend="p: probability of an error; mbits: what mending it is worth, in 1/1000 bits of "
        "variation of information; voxels: of the smaller side",
    )
    for suspect in suspects:
        table.add_row(
            suspect.kind,
            f"{suspect.probability:.2f}",
            f"{1000 * suspect.bits:.2f}",
            str(suspect.voxels[0]),
            commas(suspect.voxel),
            commas(suspect.segments),
            suspect.why,
        )
    return table


def rows_of(
    suspects: Sequence[Suspect], links: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return flat rows, ranked from 1, each with the address of a viewer if there is one."""
    given = links or [""] * len(suspects)
    return [
        suspect.row(rank) | {"link": link}
        for rank, (suspect, link) in enumerate(zip(suspects, given, strict=True), 1)
    ]


def write_tables(
    folder: Path,
    suspects: Sequence[Suspect],
    dataset: str,
    stitch: str,
    links: Sequence[str] | None = None,
) -> list[Path]:
    """Write suspects.parquet, suspects.csv and webknossos.csv; return their paths.

    Parameters
    ----------
    folder
        Made if it is not there.
    dataset
        Name of the data set in WEBKNOSSOS.
    stitch
        Which one they are of (`agq.pipeline.stitched.version_of`).
    links
        Address of a viewer for each.
    """
    make_folder(folder)
    rows = rows_of(suspects, links)
    parquet, table, tasks = (
        folder / name for name in ("suspects.parquet", "suspects.csv", "webknossos.csv")
    )
    with atomic_file(parquet) as file:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata({STITCH: stitch})),
            file,
            compression="zstd",
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, _SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(table, text.getvalue().encode())
    write_atomic(tasks, _tasks(suspects, dataset).encode())
    return [parquet, table, tasks]


def _tasks(suspects: Sequence[Suspect], dataset: str) -> str:
    """Return lines as WEBKNOSSOS takes them to create tasks in bulk.

    Data set, task type, experience domain, minimum experience, x, y, z, rotation (three), number of
    instances, bounding box (six; none), project.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for suspect in suspects:
        z, y, x = suspect.voxel
        place = (x, y, z, 0, 0, 0)
        writer.writerow((dataset, suspect.kind, "agq", 1, *place, 1, 0, 0, 0, 0, 0, 0, "suspects"))
    return text.getvalue()
