"""Sidecars decoded as a whole; the product takes only the frames it needs."""

from pathlib import Path

from agq.blockwise.blocks.packs import sidecar_bytes, sidecar_path
from agq.blockwise.blocks.sidecar import AxisPlanes, Sidecar, SidecarFile, open_sidecar
from agq.blockwise.storage.files import write_atomic

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


def unpack_sidecars(run_dir: Path, numbers) -> None:
    """Lay sidecars out as they are before the stitch packs them."""
    for number in numbers:
        write_atomic(sidecar_path(run_dir, number), sidecar_bytes(run_dir, number))
    for pack in (run_dir / "sidecars").glob("*.agqp"):
        pack.unlink()
