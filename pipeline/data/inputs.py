"""The volumes and the region that a configuration names."""

import hashlib
from decimal import Decimal
from pathlib import Path

from funlib.geometry import Coordinate, Roi

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.open import Kind, Volume, open_volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Box, triple
from agq.errors import InputError
from agq.paths import expanded, require_utf8
from agq.pipeline.config.schema import RoiSettings, VolumeSettings
from agq.pipeline.data.importer import import_volume, is_importable
from agq.pipeline.folder import RunFolder


def open_input(
    settings: VolumeSettings, run: RunFolder, kind: Kind, field: str, unit: str | None = None
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
    unit = unit or settings.unit
    try:
        settings = _with_unit(settings, unit)
        path, dataset = settings.path, settings.dataset
        require_utf8(expanded(path).absolute() if "://" not in path else path, "path")
        if is_importable(path):
            path, dataset = str(_import_once(settings, run, kind)), kind
        placed = settings.model_dump(exclude={"path", "dataset"})
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


def _import_once(settings: VolumeSettings, run: RunFolder, kind: Kind) -> Path:
    """Import image files into the run folder; returns at once if that was done before."""
    path, dataset, offset, unit = settings.path, settings.dataset, settings.offset, settings.unit
    size = settings.voxel_size
    if size is None:
        raise InputError(f"{path} holds no voxel size; give voxel_size (z, y, x) in {unit}")
    key = repr((str(expanded(path).absolute()), dataset, size, offset, unit))
    name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.zarr"
    target = run.path / "imported" / name
    import_volume(
        path, target, kind, size, key=dataset, offset=offset or (0, 0, 0), kind=kind, unit=unit
    )
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
