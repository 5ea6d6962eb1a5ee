"""Sidecars decoded as a whole; the product takes only the frames it needs."""

from pathlib import Path

from agq.blockwise.blocks.sidecar import AxisPlanes, Sidecar, SidecarFile, open_sidecar

FRAMES = ("low", "high", "outer")


def sidecar_from(data: bytes) -> Sidecar:
    """Decode the contents of a file."""
    return _whole(SidecarFile(data))


def read_sidecar(run_dir: Path, number: int) -> Sidecar:
    """Decode the sidecar of a block."""
    return _whole(open_sidecar(run_dir, number))


def _whole(file: SidecarFile) -> Sidecar:
    z, y, x = (
        AxisPlanes(**{n: a for f in FRAMES for n, a in file.frame(f"{f}_{axis}").items()})
        for axis in range(3)
    )
    return Sidecar(number=file.number, planes=(z, y, x), **file.frame("tables"))
