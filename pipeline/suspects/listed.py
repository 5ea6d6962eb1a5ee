"""The list of suspects of a run, as `agq suspects` has left it: for whoever shows them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from agq.errors import InputError
from agq.pipeline.stitched import version_of
from agq.reading import read_file

FOLDER: Final = "suspects"
"""In the run folder."""

TABLE: Final = f"{FOLDER}/suspects.parquet"
STITCH: Final = b"stitch"
"""Name, in the metadata of the table, of the stitch that the suspects are of."""

MOST: Final = 1000
"""Rows that are shown."""

_BYTES: Final = 2**26


def picture_of(rank: int) -> str:
    """Return the path, in the run folder, of the picture of a suspect."""
    return f"{FOLDER}/pictures/{rank:04}.png"


def read_suspects(run_dir: Path) -> list[dict[str, Any]]:
    """Return the first rows of the list of a run, as `find.Suspect.row`.

    There are none where nothing is listed, and where the run was stitched again since.

    Raises
    ------
    InputError
        If the table cannot be read.
    """
    path = run_dir / TABLE
    if not path.is_file():
        return []
    try:
        table = pq.read_table(
            io.BytesIO(read_file(path, most=_BYTES, within=run_dir, follow=False))
        )
        rows: list[dict[str, Any]] = table.slice(0, MOST).to_pylist()
        stitch = (table.schema.metadata or {}).get(STITCH, b"").decode()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read ({error}); run `agq suspects` again") from None
    try:
        return rows if stitch == version_of(run_dir) else []
    except InputError:
        return []


def read_suspect(run_dir: Path, rank: int) -> dict[str, Any]:
    """Return one row of the list, counted from 1.

    Raises
    ------
    InputError
        If the list has no such row.
    """
    rows = read_suspects(run_dir)
    if not 1 <= rank <= len(rows):
        raise InputError(
            f"--suspect {rank}: {run_dir} lists {len(rows)} suspects of its stitch; "
            "`agq suspects` lists them"
        )
    return rows[rank - 1]
