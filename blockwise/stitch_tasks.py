"""Tasks that the stitch gives to dask: paths and numbers in, files out.

Nothing large passes through the scheduler. Every task may run twice or be cut off anywhere: its
file appears whole or not at all, with the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockwise.agglomerate import Agglomeration, MergeTable, Thresholds, agglomerate
from blockwise.array_files import pack_arrays, unpack_arrays
from blockwise.contacts import Evidence, collect, merge_evidence
from blockwise.files import write_atomic
from blockwise.grid import BlockGrid
from blockwise.relabel import SegmentIds, build_lut
from blockwise.sidecar import Sidecar, read_sidecar

PRESENT_FILE = "present.npy"
EVIDENCE_FILE = "evidence.npz"
AGGLOMERATION_FILE = "agglomeration.npz"
SEGMENTS_FILE = "table.npz"
_LARGEST = 10


def contacts_batch(
    run_dir: str, contacts_folder: str, part: str, grid: dict[str, Any], numbers: Sequence[int]
) -> int:
    """Write the evidence that a batch of blocks owns to the file ``part``; return its rows."""
    present = np.load(Path(contacts_folder) / PRESENT_FILE, mmap_mode="r", allow_pickle=False)

    def read(number: int) -> Sidecar:
        return read_sidecar(Path(run_dir), number, overlap=False)

    evidence = collect(numbers, BlockGrid.from_dict(grid), present, read)
    write_atomic(part, evidence.to_bytes())
    return len(evidence.contacts)


def merge_parts(contacts_folder: str, parts: Sequence[str]) -> dict[str, Any]:
    """Add the parts up and write the evidence of the whole run; return its counts."""
    evidence = merge_evidence(Evidence.from_bytes(Path(part).read_bytes()) for part in parts)
    write_atomic(Path(contacts_folder) / EVIDENCE_FILE, evidence.to_bytes())
    return {"fragments": len(evidence.nodes), "contacts": len(evidence.contacts)}


def agglomerate_run(contacts_folder: str, across: float, within: float) -> dict[str, Any]:
    """Agglomerate the evidence of the run and write segments and merges; return their count."""
    folder = Path(contacts_folder)
    evidence = Evidence.from_bytes((folder / EVIDENCE_FILE).read_bytes())
    result = agglomerate(evidence.nodes.ids, evidence.contacts, Thresholds(across, within))
    write_atomic(
        folder / AGGLOMERATION_FILE,
        pack_arrays(
            {
                "ids": result.ids,
                "sizes": evidence.nodes.sizes,
                "representatives": result.representatives,
                "merge_u": result.merges.u,
                "merge_v": result.merges.v,
                "merge_numerator": result.merges.numerator,
                "merge_denominator": result.merges.denominator,
            },
            compress=False,
        ),
    )
    return {"merges": len(result.merges)}


def read_agglomeration(contacts_folder: Path) -> tuple[Agglomeration, NDArray[np.int64]]:
    """Read what :func:`agglomerate_run` wrote: the result, and the voxels of each fragment."""
    arrays = unpack_arrays((Path(contacts_folder) / AGGLOMERATION_FILE).read_bytes())
    merges = MergeTable(
        *(arrays[f"merge_{name}"] for name in ("u", "v", "numerator", "denominator"))
    )
    return Agglomeration(arrays["ids"], arrays["representatives"], merges), arrays["sizes"]


def write_lut(
    contacts_folder: str, lut_folder: str, n_blocks: int, segment_ids: SegmentIds, min_size: int
) -> dict[str, Any]:
    """Write the id map by block and the table of segments; return counts and largest segments."""
    result, sizes = read_agglomeration(Path(contacts_folder))
    lut, table = build_lut(result, sizes, n_blocks, segment_ids=segment_ids, min_size=min_size)
    folder = Path(lut_folder)
    lut.save(folder)
    columns = {"id": table.ids, "voxels": table.sizes, "fragments": table.fragments}
    write_atomic(folder / SEGMENTS_FILE, pack_arrays(columns, compress=False))
    largest = np.lexsort((table.ids, -table.sizes))[:_LARGEST]
    return {
        "segments": len(table.ids),
        "small_segments": table.small_segments,
        "small_voxels": table.small_voxels,
        "largest": [
            {name: int(column[row]) for name, column in columns.items()} for row in largest
        ],
    }
