"""What a volume of any scale says of the voxels of a block: read at their centres.

A voxel takes the value of the overlay's voxel that its centre lies in, and 0 outside the overlay.
World units are whole numbers, so that is exact, and it does not depend on how the volume is cut.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.open import Volume
from agq.errors import InputError

MOST_VOXELS = 2**24
"""Most voxels of an overlay held at once, unless one plane under a block has more."""


def require_overlap(overlay: Volume, grid: BlockGrid) -> None:
    """Refuse an overlay that does not touch the volume: its offset or unit is wrong.

    Raises
    ------
    InputError
        If it covers none of it.
    """
    if not overlay.roi.intersects(grid.to_world((0, 0, 0), grid.volume_shape)):
        raise InputError(
            f"{overlay.name} covers {overlay.roi} in {overlay.unit}, which does not touch the "
            "volume; correct its offset or voxel size"
        )


def read_overlay(
    overlay: Volume,
    grid: BlockGrid,
    start: Sequence[int],
    stop: Sequence[int],
    *,
    most_voxels: int = MOST_VOXELS,
) -> npt.NDArray[Any]:
    """Return the value of an overlay at the centre of each voxel of a box.

    Parameters
    ----------
    overlay
        Any voxel size and offset, in the world unit of the grid.
    grid
        The blocks of the volume below it.
    start, stop
        First voxel and one past the last voxel of a box of that volume, (z, y, x).
    most_voxels
        Most voxels of the overlay to hold at once.

    Returns
    -------
    ndarray
        (z, y, x), of the overlay's dtype.
    """
    values = np.zeros([b - a for a, b in zip(start, stop, strict=True)], overlay.dtype)
    places, inside = [], []
    for axis in range(3):
        size, step = int(grid.voxel_size[axis]), int(overlay.voxel_size[axis])
        shift = int(grid.offset[axis] - overlay.offset[axis])
        # Twice the distance of the centres from the overlay's begin is whole.
        twice = (2 * np.arange(start[axis], stop[axis]) + 1) * size + 2 * shift
        place = twice // (2 * step)
        covered = np.flatnonzero((place >= 0) & (place < overlay.shape[axis]))
        if not covered.size:
            return values
        inside.append(slice(int(covered[0]), int(covered[-1]) + 1))
        places.append(place[covered])
    z, y, x = places
    top, left = int(y[0]), int(x[0])
    bottom, right = int(y[-1]) + 1, int(x[-1]) + 1
    planes = max(1, most_voxels // ((bottom - top) * (right - left)))
    slab = (z - z[0]) // planes
    for members in np.split(np.arange(z.size), np.flatnonzero(np.diff(slab)) + 1):
        first, last = int(z[members[0]]), int(z[members[-1]]) + 1
        box = overlay.read((first, top, left), (last, bottom, right))
        rows = slice(inside[0].start + int(members[0]), inside[0].start + int(members[-1]) + 1)
        values[rows, inside[1], inside[2]] = box[np.ix_(z[members] - first, y - top, x - left)]
    return values
