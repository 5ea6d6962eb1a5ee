"""Small prediction runs: a volume with marked blocks, prepared folders, results as bytes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.predict.coordinator import PredictSpec
from agq.blockwise.volumes.create import create_array
from tests.helpers import ROOT
from tests.helpers.runs import blobs

VOXEL_SIZE = (30, 6, 6)
OFFSET = (60, -12, 600)

# 3 x 3 x 3 blocks; nothing is a multiple of the write shape.
SHAPE = (11, 37, 40)
WRITE = (4, 16, 16)


def raw_volume(shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Blobs that use no marked value."""
    return np.minimum(blobs(shape), 249).astype(np.uint8)


def mark(grid: BlockGrid, raw: np.ndarray, number: int, value: int) -> None:
    """Mark one block with a voxel that no other block reads."""
    start, _ = grid.write_box(number)
    inside = tuple(a + after for a, after in zip(start, grid.after, strict=True))
    raw[inside] = value
    readers = [
        n
        for n in range(grid.n_blocks)
        if all(a <= i < b for i, a, b in zip(inside, *grid.read_box(n), strict=True))
    ]
    assert readers == [number], "the mark is in the context of another block"


def make_grid(shape: tuple[int, int, int] = SHAPE, **changes: Any) -> BlockGrid:
    values = {"before": (0, 0, 0), "after": (1, 1, 1), "write_shape": WRITE} | changes
    return BlockGrid(volume_shape=shape, voxel_size=VOXEL_SIZE, offset=OFFSET, **values)


def make_run(
    folder: Path,
    raw: np.ndarray,
    grid: BlockGrid | None = None,
    *,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> PredictSpec:
    """Write raw and empty outputs; return the specification of a run in `folder`."""
    grid = grid or make_grid(raw.shape)
    folder.mkdir(parents=True, exist_ok=True)
    placed: dict[str, Any] = {"voxel_size": grid.voxel_size, "offset": grid.offset}
    source = create_array(
        folder / "in.zarr",
        "raw",
        shape=raw.shape,
        chunks=tuple(min(16, n) for n in raw.shape),
        dtype=raw.dtype,
        **placed,
    )
    source[:] = raw
    run = folder / "run"
    spec = PredictSpec(
        run_dir=str(run),
        raw={"path": str(folder / "in.zarr"), "dataset": "raw"},
        grid=grid.to_dict(),
        **{
            "factory": "tests.helpers.fakes:threshold",
            "options": options or {},
            "affinities": True,
            "prefetch": 1,
            "timeout_s": 60,
            **changes,
        },
    )
    BlockWriter.create(run, grid, affinities=spec.affinities)
    return spec


def outputs(spec: PredictSpec) -> dict[str, str]:
    """Digest of every chunk and sidecar file of a run; nothing else may lie there."""
    run = Path(spec.run_dir)
    files = [*(run / "data.zarr").rglob("*"), *(run / "sidecars").rglob("*")]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.suffix not in (".tmp", ".partial")
    }


COORDINATOR = """
import sys
from pathlib import Path
from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict.coordinator import PredictSpec, run_predict
spec = PredictSpec.model_validate_json(Path(sys.argv[1]).read_text())
done = Journal(Path(spec.run_dir) / "journal" / "predict").done(spec.block_grid().n_blocks)
report = run_predict(spec, (~done).nonzero()[0])
print(report.done, report.failed)
"""


def start_coordinator(folder: Path, spec: PredictSpec) -> "subprocess.Popen[str]":
    """Start a run in a process group of its own; it computes what the journal does not have."""
    file = folder / "spec.json"
    file.write_text(spec.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
