"""Volumes of branching tubes, as neurites are."""

import numpy as np
from scipy import ndimage


def neurites(shape: tuple[int, int, int], count: int, seed: int = 0) -> np.ndarray:
    """Return labels 1 to `count`: smooth tubes with branches; none touches itself by chance much.

    The first to reach a voxel keeps it.
    """
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint64)
    for label in range(1, count + 1):
        place = rng.uniform(0, 1, 3) * shape
        paths = [_walk(rng, place, shape)]
        for _ in range(rng.integers(0, 3)):
            paths.append(_walk(rng, paths[0][rng.integers(len(paths[0]))], shape))
        axis = np.ones(shape, bool)
        places = np.concatenate(paths).astype(int)
        axis[tuple(places[((places >= 0) & (places < shape)).all(1)].T)] = False
        tube = ndimage.distance_transform_edt(axis) <= rng.uniform(2, 5)
        parts, _ = ndimage.label(tube & (labels == 0), np.ones((3, 3, 3)))
        sizes = np.bincount(parts.reshape(-1))[1:]
        if len(sizes):
            labels[parts == sizes.argmax() + 1] = label
    return labels


def _walk(rng: np.random.Generator, place: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    steps = ndimage.gaussian_filter1d(rng.normal(size=(4 * max(shape), 3)), 12, axis=0)
    steps /= 2 * np.linalg.norm(steps, axis=1, keepdims=True)
    return place + np.cumsum(steps, 0)
