"""What is exported: a layer of a run or any volume, at a level, inside a box, in its data type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate, Roi

from agq.blockwise.volumes.boxes import boxes, unordered
from agq.blockwise.volumes.open import Kind, Volume, open_levels
from agq.blockwise.volumes.triples import Box, Triple, triple
from agq.errors import InputError
from agq.pipeline.config.recorded import read_target
from agq.pipeline.folder import RunFolder
from agq.pipeline.view.layers import LazyVolume, config_layers

LayerName = Literal["segmentation", "fragments", "raw", "truth"]

Step = Callable[[int, int], None]
"""Takes items done, and items in all."""

_MOST_VOXELS: Final = 2**22
"""Of a box that is read at once, unless one stored chunk is larger."""


@dataclass(frozen=True)
class Part:
    """A box of voxels, and what becomes of their labels.

    Attributes
    ----------
    volume
        The box as a volume; its offset is the corner of its first voxel.
    name
        Name of the layer.
    finest
        Voxel size of the finest level of the volume, (z, y, x).
    labels
        Whether voxels are labels, and not grey values.
    dtype
        Type in the file.
    most
        Largest label in the box.
    ids
        Labels in ascending order, 0 first, whose places are written in their stead; None: labels
        are written as they are.
    """

    volume: Volume
    name: str
    finest: Coordinate
    labels: bool
    dtype: np.dtype[Any]
    most: int = 0
    ids: npt.NDArray[np.uint64] | None = None

    @property
    def largest(self) -> int:
        """Largest label in the file."""
        return self.most if self.ids is None else len(self.ids) - 1

    def read(self, start: Sequence[int], stop: Sequence[int]) -> npt.NDArray[Any]:
        """Read voxels as the file has them.

        Raises
        ------
        InputError
            If labels are not those of the first look: the volume has changed meanwhile.
        """
        data = self.volume.read(start, stop)
        if not self.labels:
            return data
        places = data
        if self.ids is not None:
            places = np.searchsorted(self.ids, data).clip(max=len(self.ids) - 1)
        elsewhere = self.ids is not None and (self.ids[places] != data).any()
        if elsewhere or (data.size and int(data.max()) > self.most):
            raise InputError(f"{self.volume.name} has changed meanwhile; export it again")
        return places.astype(self.dtype, copy=False)

    def boxes(self) -> list[Box]:
        """Cut it into boxes of about a stored chunk, in C order."""
        return boxes((0, 0, 0), self.volume.shape, _box_shape(self.volume))

    def sections(self) -> Iterator[npt.NDArray[Any]]:
        """Yield its sections in order; a few are read at once where their chunks hold several."""
        depth, height, width = self.volume.shape
        at_once = max(1, min(self.volume.chunks[0], _MOST_VOXELS // (height * width)))
        for z in range(0, depth, at_once):
            yield from self.read((z, 0, 0), (min(z + at_once, depth), height, width))


def open_part(
    source: str,
    *,
    layer: LayerName = "segmentation",
    level: int = 0,
    roi: Box | None = None,
    voxel_size: Sequence[int] | None = None,
    unit: str | None = None,
) -> Part:
    """Open what is exported; no voxel is read.

    Parameters
    ----------
    source
        Run folder, ``path`` or ``path::dataset``.
    layer
        Of a run; of another volume, whether voxels are labels or grey values (``raw``).
    level
        Of its resolutions; 0 is the finest.
    roi
        First voxel and one past the last of the finest level, (z, y, x); None: all of it.
    voxel_size, unit
        Of a volume that does not say them.

    Raises
    ------
    InputError
        If there is no such volume, level or box.
    """
    kind: Kind = "raw" if layer == "raw" else "labels"
    path, _, dataset = source.partition("::")
    if not dataset and RunFolder(Path(path)).exists():
        levels = _levels_of_run(Path(path), layer)
    else:
        given = {"voxel_size": voxel_size, "unit": unit}
        levels = open_levels(path, dataset or None, kind=kind, **given)
    if level >= len(levels):
        raise InputError(
            f"--level {level}: {levels[0].name} has {len(levels)} levels, from 0 (the finest)"
        )
    finest, volume = levels[0], levels[level]
    if roi is not None:
        volume = _cropped(volume, finest, roi)
    return Part(volume, layer, finest.voxel_size, kind == "labels", volume.dtype)


def _levels_of_run(run_dir: Path, layer: LayerName) -> list[Volume]:
    for found in config_layers(read_target(run_dir)):
        if found.name == layer and isinstance(found.data, LazyVolume):
            return [found.data.volume, *(level.volume for _, level in found.data.coarser)]
    raise InputError(f"--layer {layer}: {run_dir} has none")


def _cropped(volume: Volume, finest: Volume, roi: Box) -> Volume:
    """Return the voxels of a level that a box of the finest one touches."""
    start, stop = roi
    if any(b > n for b, n in zip(stop, finest.shape, strict=True)):
        raise InputError(
            f"--roi: voxels {list(start)} to {list(stop)} are outside the volume of "
            f"{list(finest.shape)} voxels"
        )
    factor = [a // b for a, b in zip(volume.voxel_size, finest.voxel_size, strict=True)]
    first = [a // f for a, f in zip(start, factor, strict=True)]
    last = [-(-b // f) for b, f in zip(stop, factor, strict=True)]
    size = volume.voxel_size
    begin, end = (volume.offset + Coordinate(corner) * size for corner in (first, last))
    return volume.crop(Roi(begin, end - begin))


def with_labels(part: Part, *, widest: int, relabel: bool, on_progress: Step) -> Part:
    """Look at all labels and choose the type that holds them.

    Parameters
    ----------
    part
        What is exported.
    widest
        Most bits that the format has for labels.
    relabel
        Write consecutive labels: the places of the labels in ascending order.
    on_progress
        Takes boxes looked at.

    Raises
    ------
    InputError
        If a label is below 0, or does not fit.
    """
    if not part.labels:
        if relabel:
            raise InputError(f"--relabel: {part.name} holds grey values, not labels")
        return part
    volume, places = part.volume, part.boxes()

    def look(box: Box) -> tuple[int, int, npt.NDArray[np.uint64]]:
        data = volume.read(*box)
        ids = np.unique(data) if relabel else np.zeros(0)
        return int(data.min()), int(data.max()), ids.astype(np.uint64)

    least = most = 0
    found = np.zeros(1, np.uint64)
    on_progress(0, len(places))
    for done, (low, high, ids) in enumerate(unordered(look, places), start=1):
        least, most = min(least, low), max(most, high)
        found = np.union1d(found, ids)
        on_progress(done, len(places))
    if least < 0:
        raise InputError(f"{volume.name}: label {least} is below 0; 0 is background")
    part = replace(part, most=most, ids=found if relabel else None)
    bits = next(b for b in (16, 32, 64) if part.largest < 2**b)
    if bits > widest:
        raise InputError(
            f"{volume.name}: label {most} does not fit the {widest} bits of this format; give "
            "--relabel for consecutive labels and a table of them"
        )
    return replace(part, dtype=np.dtype(f"uint{bits}"))


def _box_shape(volume: Volume) -> Triple:
    """Return whole stored chunks of about `_MOST_VOXELS` voxels, along x first."""
    shape = list(volume.chunks)
    for axis in (2, 1, 0):
        room = max(1, _MOST_VOXELS // math.prod(shape))
        shape[axis] *= min(room, -(-volume.shape[axis] // shape[axis]))
    return triple(shape)
