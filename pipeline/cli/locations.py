"""What users type to name a volume or a position."""

from pathlib import Path
from typing import TYPE_CHECKING

from agq.errors import InputError
from agq.pipeline.folder import RunFolder

if TYPE_CHECKING:
    from agq.blockwise.volumes.create import Kind, Volume

Triple = tuple[int, int, int]


def open_location(location: str, kind: "Kind", unit: str = "nm") -> "Volume":
    """Open ``path``, ``path::dataset`` or a run folder (its segmentation), in a world unit.

    Raises
    ------
    InputError
        If there is no such volume.
    """
    from agq.blockwise.volumes.create import open_volume  # every command line loads this module

    path, _, dataset = location.partition("::")
    if not dataset and RunFolder(Path(path)).exists():
        return open_volume(
            RunFolder(Path(path)).container, "segmentation", level=0, kind=kind, unit=unit
        )
    return open_volume(path, dataset or None, kind=kind, unit=unit)


def parse_triple(name: str, text: str, least: int | None = None) -> Triple:
    """Read ``z,y,x``.

    Raises
    ------
    InputError
        If it is not three whole numbers, or one is below `least`.
    """
    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name} {text}: expected three whole numbers z,y,x") from None
    if least is not None and min(z, y, x) < least:
        raise InputError(f"{name} {text}: every number must be at least {least}")
    return z, y, x
