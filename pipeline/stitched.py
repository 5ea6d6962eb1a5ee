"""Whether a run is stitched to the end, and what changes when it is stitched again."""

from pathlib import Path

from agq.errors import InputError


def version_of(run_dir: Path) -> str:
    """Return what changes when a run is stitched again.

    Raises
    ------
    InputError
        If it is not stitched to the end.
    """
    from agq.blockwise.stitch.steps import Step

    for step in ("relabel", "pyramid"):
        marker = Step.read(run_dir, step)
        if not marker.get("done"):
            raise InputError(
                f"{run_dir}: not stitched to the end; run `agq stitch {run_dir}` first"
            )
    return str(marker["key"])
