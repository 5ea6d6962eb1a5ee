"""Volumes of cells, their surfaces, and how far a mesh is off them."""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import cKDTree

from agq.blockwise.export.meshes.cells import triangles
from agq.blockwise.export.meshes.fragments import Fragment
from agq.blockwise.export.meshes.surface import Mesh


def cells(shape, n: int, seed: int) -> np.ndarray:
    """Warped Voronoi cells."""
    rng = np.random.default_rng(seed)
    points = rng.random((n, 3)) * shape
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    warp = [gaussian_filter(rng.standard_normal(shape), 5).ravel() * 150 for _ in range(3)]
    return 1 + cKDTree(points).query(voxels + np.stack(warp, -1))[1].reshape(shape)


def fragments_of(labels: np.ndarray, label: int) -> Fragment:
    owners, found = triangles(np.pad(labels.astype(np.uint64), 1), (-1, -1, -1), labels.shape)
    numbers, places = np.unique(found[owners == label], return_inverse=True)
    return Fragment(int((labels == label).sum()), numbers, places.reshape(-1, 3).astype(np.uint32))


def surface_distance(mesh: Mesh, inside: np.ndarray) -> np.ndarray:
    """Return how far each vertex is off the border of the voxels; in thirds, rounded down."""
    return surface_distances(inside)(mesh)


def surface_distances(inside: np.ndarray, most: int = 2) -> Callable[[Mesh], np.ndarray]:
    """Return `surface_distance` for meshes with no vertex more than `most` voxels outside."""
    low = np.argwhere(inside).min(axis=0)
    high = np.argwhere(inside).max(axis=0) + 1
    cut = inside[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    fine = np.pad(cut, most).repeat(3, 0).repeat(3, 1).repeat(3, 2)
    distance = np.maximum(distance_transform_edt(fine), distance_transform_edt(~fine)) - 1

    def of(mesh: Mesh) -> np.ndarray:
        places = np.floor((mesh.vertices[:, ::-1] - low + most) * 3).astype(int)
        return distance[tuple(places.T)] / 3

    return of
