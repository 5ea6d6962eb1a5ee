"""Rescaling and elastic deformation of a crop, within its sections.

`scipy.ndimage` does the work. Of the libraries for this, gunpowder comes with a graph and
processes of its own, MONAI and batchgenerators draw from global or their own random states and
know nothing of section faults; what is left to take from them is what scipy has.
"""

import math

import numpy as np
from scipy import ndimage

from agq.model.training.config import AugmentConfig

_SPACING = 32
"""Voxels between the places whose displacement is drawn."""


def warp_margin(shape: tuple[int, int, int], config: AugmentConfig) -> int:
    """Return the voxels in y and x that a crop needs around it to be warped.

    Parameters
    ----------
    shape : tuple of int
        (z, y, x) of what is wanted after warping.
    """
    if config.warp == 0 and not config.elastic_chance:
        return 0
    return math.ceil(max(shape[1:]) / 2 * config.rescale + config.elastic) + 1


def warp(
    raw: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Stretch and bend raw and labels alike, by chance; otherwise crop their middle.

    Of (z, y + 2 m, x + 2 m), m = `warp_margin`, it makes `shape` (z, y, x) of the same dtypes: raw
    interpolated linearly, labels nearest.
    """
    margin = warp_margin(shape, config)
    _, y, x = shape
    rescaled = bends = rng.random() < config.warp
    if config.elastic_chance is not None:
        bends = rng.random() < config.elastic_chance
    if not (rescaled or bends):
        inner = (slice(None), slice(margin, margin + y), slice(margin, margin + x))
        return raw[inner], labels[inner]
    # Symmetric in the logarithm, and never beyond the margin.
    largest = 1 + config.rescale * rescaled
    scales = largest ** rng.uniform(-1, 1, 1 + config.rescale_apart)
    reach = config.elastic * bends
    coarse = rng.uniform(-reach, reach, (2, *(-(-n // _SPACING) + 2 for n in (y, x))))
    rows = np.arange(y)[:, None] / _SPACING
    columns = np.arange(x)[None] / _SPACING
    at = np.broadcast_arrays(rows, columns)
    places = []
    for axis, size in enumerate((y, x)):
        centre = margin + (size - 1) / 2
        straight = (np.indices((y, x))[axis] - (size - 1) / 2) * scales[axis % len(scales)] + centre
        places.append(straight + ndimage.map_coordinates(coarse[axis], at, order=1))
    out_raw = np.empty(shape, raw.dtype)
    out_labels = np.empty(shape, labels.dtype)
    # Labels by their voxel and not through scipy, which computes in doubles.
    near = [
        np.clip(np.rint(p).astype(np.int64), 0, n - 1)
        for p, n in zip(places, labels.shape[1:], strict=True)
    ]
    for z in range(shape[0]):
        ndimage.map_coordinates(raw[z], places, out_raw[z], order=1, mode="nearest")
        out_labels[z] = labels[z][near[0], near[1]]
    return out_raw, out_labels
