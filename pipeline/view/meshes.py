"""Meshes of a run that an export has made, and which of them to show first."""

from pathlib import Path

from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.reading import read_record


def meshes_of(run_dir: Path) -> Path | None:
    """Return the folder of a run's meshes; None if it has none, or was stitched since."""
    from agq.blockwise.export.target import MARK
    from agq.blockwise.stitch.steps import Step

    out = RunFolder(run_dir).precomputed
    try:
        version = read_record(out / MARK).get("version")
        marker = Step.read(run_dir, "pyramid")
    except (InputError, OSError):
        return None
    folder = out / "mesh"
    current = marker.get("done") and marker.get("key") == version
    return folder if current and (folder / "info").is_file() else None


def largest_segments(run_dir: Path, count: int) -> list[int]:
    """Return the ids of the segments with most voxels, the largest first."""
    import pyarrow.parquet as pq

    from agq.blockwise.stitch.superblocks import StitchFiles

    file = StitchFiles(run_dir).segments
    if not file.is_file():
        return []
    table = pq.read_table(file, columns=["segment", "voxels"])
    order = [("voxels", "descending"), ("segment", "ascending")]
    found: list[int] = table.sort_by(order)["segment"][:count].to_pylist()
    return found
