"""The raw voxels of blocks as a predictor sees them.

Here a section that is named bad is replaced by the nearest one that is not, and grey values are
stretched, so that what a block reads depends on the volume and the settings of the run alone: never
on the shape or the order of blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError

_KEPT_BYTES = 2**25


class BlockError(Exception):
    """A block whose data cannot be used; the message says why."""


@dataclass(frozen=True)
class RawBlocks:
    """Reads blocks of a raw volume.

    Attributes
    ----------
    volume, grid
        What is read, and how it is cut.
    instead
        Of a bad section, the section that is read in its place.
    contrast
        float32 (1 or sections, 2): the grey values that become black and white, of the whole volume
        or of each section; None: grey values stay as they are.
    """

    volume: Volume
    grid: BlockGrid
    instead: Mapping[int, int]
    contrast: npt.NDArray[np.float32] | None

    @classmethod
    def open(cls, spec: PredictSpec) -> "RawBlocks":
        """Open what a prediction reads.

        Raises
        ------
        InputError
            If it is missing, or does not fit the grid.
        """
        raw, grid = open_volume(**spec.raw), spec.block_grid()
        if raw.shape != grid.volume_shape:
            raise InputError(
                f"{raw.name} has {raw.shape} voxels, but the run was made for {grid.volume_shape}; "
                "use another run folder or start over with --overwrite"
            )
        contrast = None if spec.contrast is None else np.array(spec.contrast, np.float32)
        return cls(
            raw.keeping(_KEPT_BYTES), grid, nearest_good(spec.bad_sections, raw.shape[0]), contrast
        )

    def read(self, number: int) -> npt.NDArray[Any]:
        """Read the raw voxels of a block, (z, y, x), always of the grid's `read_shape`.

        Where the volume is smaller than the window, it is continued by reflection behind its end.
        The dtype is that of the volume; stretched float values lie in [0, 1].

        Raises
        ------
        BlockError
            If values are NaN or infinite.
        InputError
            If the storage cannot read them.
        """
        start, stop = self.grid.read_box(number)
        raw = self.volume.read(start, stop)
        sections = np.arange(start[0], stop[0])
        for z in sections.tolist():
            if (source := self.instead.get(z)) is not None:
                raw[z - start[0]] = self.volume.read((source, *start[1:]), (source + 1, *stop[1:]))[
                    0
                ]
                sections[z - start[0]] = source
        if raw.dtype.kind == "f" and not (finite := np.isfinite(raw)).all():
            bad = int(raw.size - np.count_nonzero(finite))
            raise BlockError(f"raw has {bad} NaN or infinite of {raw.size} voxels")
        # A constant block is skipped; it must not be stretched section by section.
        if self.contrast is not None and raw.min() != raw.max():
            ends = self.contrast[sections] if len(self.contrast) > 1 else self.contrast
            raw = _stretched(raw, ends)
        missing = [(0, want - n) for want, n in zip(self.grid.read_shape, raw.shape, strict=True)]
        return np.pad(raw, missing, mode="reflect") if any(m for _, m in missing) else raw


def _stretched(raw: npt.NDArray[Any], ends: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    black, white = (ends[:, i, None, None] for i in (0, 1))
    stretched = (raw.astype(np.float32) - black) / (white - black)
    np.clip(stretched, 0, 1, out=stretched)
    if raw.dtype.kind == "f":
        return stretched
    stretched *= np.float32(np.iinfo(raw.dtype).max)
    return np.rint(stretched, out=stretched).astype(raw.dtype)


def nearest_good(bad: Sequence[int], depth: int) -> dict[int, int]:
    """Return, for each bad section, the nearest one that is not; of two, the one before.

    Parameters
    ----------
    bad
        Indices of sections.
    depth
        Sections of the volume.

    Raises
    ------
    InputError
        If a section is not in the volume, or none is left.
    """
    named = sorted(set(bad))
    if named and not 0 <= named[0] <= named[-1] < depth:
        outside = named[0] if named[0] < 0 else named[-1]
        raise InputError(f"section {outside} is not in the volume, which has 0 to {depth - 1}")
    if len(named) == depth:
        raise InputError("every section of the volume is bad: none is left to take its place")
    good = np.setdiff1d(np.arange(depth), named)
    after = np.searchsorted(good, named)
    before = good[np.maximum(after - 1, 0)]
    behind = good[np.minimum(after, good.size - 1)]
    nearer = np.abs(behind - named) < np.abs(named - before)
    return dict(zip(named, np.where(nearer, behind, before).tolist(), strict=True))
