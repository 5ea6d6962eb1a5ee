"""How far voxels are from the surface of their segment."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt


def radii_of(
    compact: npt.NDArray[np.int32], size: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """Return the nanometres from each voxel to the surface of its segment.

    The end of the array is no surface.

    Parameters
    ----------
    compact
        Labels, (z, y, x).
    size
        Nanometres of a voxel, (z, y, x).
    """
    squares = _squares(compact, np.array(size, float))
    if np.isinf(squares[0, 0, 0]):
        return np.full(compact.shape, min(n * s for n, s in zip(compact.shape, size, strict=True)))
    return np.asarray(np.sqrt(squares) + min(size) / 2)


@numba.njit(cache=True, nogil=True)
def _squares(
    labels: npt.NDArray[np.int32], size: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:  # pragma: no cover (compiled)
    """Return the squared distance from each voxel to the nearest beside one of another label.

    Axis by axis; a search ends where the distance along the axis alone is larger.
    """
    depth, height, width = labels.shape
    found = np.full(labels.shape, np.inf)
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                label = labels[z, y, x]
                if (
                    (x > 0 and labels[z, y, x - 1] != label)
                    or (x + 1 < width and labels[z, y, x + 1] != label)
                    or (y > 0 and labels[z, y - 1, x] != label)
                    or (y + 1 < height and labels[z, y + 1, x] != label)
                    or (z > 0 and labels[z - 1, y, x] != label)
                    or (z + 1 < depth and labels[z + 1, y, x] != label)
                ):
                    found[z, y, x] = 0.0
            for x in range(1, width):
                found[z, y, x] = min(found[z, y, x], found[z, y, x - 1] + 1)
            for x in range(width - 2, -1, -1):
                found[z, y, x] = min(found[z, y, x], found[z, y, x + 1] + 1)
            for x in range(width):
                found[z, y, x] = (found[z, y, x] * size[2]) ** 2
    plane = np.empty((height, width))
    for z in range(depth):
        plane[:] = found[z]
        for y in range(height):
            for x in range(width):
                best = plane[y, x]
                for k in range(1, height):
                    step = (k * size[1]) ** 2
                    if step >= best:
                        break
                    if y >= k:
                        best = min(best, plane[y - k, x] + step)
                    if y + k < height:
                        best = min(best, plane[y + k, x] + step)
                found[z, y, x] = best
    plane = np.empty((depth, width))
    for y in range(height):
        plane[:] = found[:, y]
        for z in range(depth):
            for x in range(width):
                best = plane[z, x]
                for k in range(1, depth):
                    step = (k * size[0]) ** 2
                    if step >= best:
                        break
                    if z >= k:
                        best = min(best, plane[z - k, x] + step)
                    if z + k < depth:
                        best = min(best, plane[z + k, x] + step)
                found[z, y, x] = best
    return found
