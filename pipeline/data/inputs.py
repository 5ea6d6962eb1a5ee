"""The volumes and the region that a configuration names."""

import hashlib
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

from funlib.geometry import Coordinate, Roi

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.open import Kind, Volume, open_volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Box, triple
from agq.errors import InputError
from agq.owners import stranger
from agq.paths import expanded, require_utf8
from agq.pipeline.config.schema import RoiSettings, VolumeSettings
from agq.pipeline.data.importer import import_volume, is_import_of
from agq.pipeline.data.sections import exists, is_importable, open_sections
from agq.pipeline.folder import RunFolder


def open_input(
    settings: VolumeSettings | None,
    run: RunFolder,
    kind: Kind,
    field: str,
    unit: str | None = None,
) -> Volume:
    """Open a configured volume; image files are imported into the run folder first.

    Parameters
    ----------
    settings
        The section that names it.
    run
        The run folder.
    kind
        What it is used for.
    field
        Name of the section.
    unit
        World unit of the run, if another volume decides it; the section's unit then is that of
        the numbers in the section.

    Raises
    ------
    InputError
        With the configuration field in front.
    """
    if settings is None:
        raise InputError(f"{field}: no such volume is named; --set {field}.path=... names it")
    unit = unit or settings.unit
    try:
        settings = _with_unit(settings, unit)
        path, dataset = settings.path, settings.dataset
        require_utf8(expanded(path).absolute() if "://" not in path else path, "path")
        target = run.path / "imported" / _import_name(settings, kind)
        if (target / kind).exists() and not exists(path):
            path, dataset = str(target), kind  # the files have done their work
        elif is_importable(path):
            if owner := stranger(run.path, run.record_path):
                raise InputError(
                    f"{path} is an image file, which would be copied into {run.path}, and that "
                    f"belongs to {owner}; agq import turns it into zarr in a folder of your own"
                )
            path, dataset = str(_import_once(settings, target, kind)), kind
        placed = settings.model_dump(exclude={"path", "dataset", "allow_gaps", "gap_value"})
        for name in ("voxel_size", "offset"):
            if placed[name] is not None:
                placed[name] = [
                    Decimal(number) * PER_NANOMETRE[unit] / PER_NANOMETRE[settings.unit]
                    for number in placed[name]
                ]
        return open_volume(path, dataset, kind=kind, **placed | {"unit": unit})
    except InputError as error:
        raise InputError(f"{field}: {error}") from error.__cause__


def _with_unit(settings: VolumeSettings, unit: str) -> VolumeSettings:
    """Return the section with its unit settled: that of the run where it has no numbers."""
    if settings.voxel_size is None and settings.offset is None:
        return settings.model_copy(update={"unit": unit})
    if settings.unit != unit and "unit" not in settings.model_fields_set:
        raise InputError(
            f"voxel_size and offset without a unit, in a run that counts in {unit}: set unit to "
            "that of the numbers"
        )
    return settings


def _import_name(settings: VolumeSettings, kind: Kind) -> str:
    path = str(expanded(settings.path).absolute())
    key = repr((path, settings.dataset, settings.voxel_size, settings.offset, settings.unit))
    if settings.allow_gaps:
        key += repr(settings.gap_value)
    return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.zarr"


def _import_once(settings: VolumeSettings, target: Path, kind: Kind) -> Path:
    """Import image files into the run folder, unless that was done before; return the container."""
    gap_value = settings.gap_value if settings.allow_gaps else None
    stack = open_sections(settings.path, settings.dataset, gap_value=gap_value)
    options: Any = {"offset": settings.offset, "kind": kind, "unit": settings.unit}
    if not (target / kind).exists():
        # The same files under another path.
        for other in sorted(target.parent.glob(f"{kind}-*.zarr")):
            if is_import_of(other / kind, stack):
                with suppress(InputError):
                    import_volume(stack, other, kind, settings.voxel_size, **options)
                    return other
    import_volume(stack, target, kind, settings.voxel_size, **options)
    return target


def roi_box(roi: RoiSettings | None, grid: BlockGrid) -> Box | None:
    """Return the ROI of a configuration as voxels of the volume; None for the whole volume.

    Raises
    ------
    InputError
        If it is not on the voxel grid, or outside the volume.
    """
    if roi is None:
        return None
    if roi.units == "voxels":
        start, shape = triple(roi.offset), triple(roi.shape)
        stop = triple(first + size for first, size in zip(start, shape, strict=True))
    else:
        try:
            start, stop = grid.to_voxels(Roi(roi.offset, roi.shape))
        except InputError as error:
            raise InputError(f"input.roi: {error}") from None
    if min(start) < 0 or any(b > size for b, size in zip(stop, grid.volume_shape, strict=True)):
        raise InputError(
            f"input.roi: voxels {list(start)} to {list(stop)} are outside the volume of "
            f"{list(grid.volume_shape)} voxels"
        )
    return start, stop


def world_roi(box: Box | None, grid: BlockGrid) -> Roi:
    """Return a voxel box of the volume in world units; None is the whole volume."""
    start, stop = (Coordinate(corner) for corner in box or ((0, 0, 0), grid.volume_shape))
    return Roi(grid.offset + start * grid.voxel_size, (stop - start) * grid.voxel_size)
