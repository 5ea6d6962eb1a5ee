"""One closed surface of a segment: merged from fragments, simplified within bounds.

Merging goes by the numbers of vertices, and the order of vertices and faces is canonical: the mesh
does not depend on how the volume was cut. A segment of more than `MOST_FACES` triangles is the
exception, because it would not fit: each fragment is simplified first, with its borders as they
are, so it stays closed, but other blocks give another mesh of it.

A simplified mesh is taken only if it is closed, encloses the volume of the voxels within
`VOLUME_ERROR`, and no vertex is more than `MOST_OFF` voxels from a vertex of the full one. Each
coarser level of detail may be twice as far off in both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import fast_simplification
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from agq.blockwise.export.meshes.cells import places_of
from agq.blockwise.export.meshes.fragments import Fragment

MOST_FACES = 2**23
"""Triangles of a segment before simplification; about 1 GiB of memory."""

PART_KEEP = 0.4
"""Share of the faces of a fragment that is kept where a segment has more."""

VOLUME_ERROR = 0.02
MOST_OFF = 1.0

_FEWEST = 60
"""Faces below which nothing is simplified."""

COARSER = 4
"""A level of detail has about so many times the faces of the next coarser one."""

ROOT_FACES = 2**12
"""A level of more faces has a coarser one."""

_FACTORS = (1, 2, 4)
_APART = 0.05
"""Voxels by which vertices at the same place are moved apart."""

_one_at_a_time = threading.Lock()  # the library keeps the mesh it works on in one global place

Floats = npt.NDArray[np.float64]
Faces = npt.NDArray[np.int64]


class Mesh(NamedTuple):
    """A closed surface.

    Attributes
    ----------
    vertices
        Places (x, y, z) in voxels.
    faces
        Places in `vertices`, (n, 3), counter-clockwise seen from outside.
    """

    vertices: Floats
    faces: Faces


def merge(fragments: Iterable[Fragment], shape: Sequence[int]) -> Mesh:
    """Return the surface of a segment from the fragments of all blocks.

    Parameters
    ----------
    fragments
        In any order.
    shape
        Voxels of the volume, (z, y, x).
    """
    parts = list(fragments)
    before = np.append(0, np.cumsum([len(part.vertices) for part in parts]))
    numbers = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate(
        [part.faces.astype(np.int64) + n for part, n in zip(parts, before, strict=False)]
    )
    known, places = np.unique(numbers, return_inverse=True)
    return Mesh(places_of(known, shape), _sorted(places[faces]))


def merge_large(fragments: Iterable[Fragment], shape: Sequence[int], keep: float) -> Mesh:
    """Return the surface of a segment whose fragments are simplified one by one, borders kept.

    Parameters
    ----------
    fragments, shape
        As for `merge`.
    keep
        Share of the faces of a fragment to keep.
    """
    vertices, faces, n = [], [], 0
    for part in fragments:
        places = places_of(part.vertices, shape)
        if len(part.faces) > _FEWEST:
            part_places, part_faces = _simplified(places, part.faces, keep, preserve_border=True)
        else:
            part_places, part_faces = places, part.faces.astype(np.int64)
        vertices.append(part_places)
        faces.append(part_faces + n)
        n += len(part_places)
    known, places_in = np.unique(np.concatenate(vertices), axis=0, return_inverse=True)
    return Mesh(known, _sorted(places_in.reshape(-1)[np.concatenate(faces)]))


def simplify(mesh: Mesh, voxels: int, resolution: Sequence[float], keep: float) -> list[Mesh]:
    """Return levels of detail: the finest has about the share `keep` of the faces of a mesh.

    A level has more faces where bounds ask for it; where it would have more than half of those of
    the finer one, there is none. Each encloses the volume of the voxels: its vertices are moved
    along their normals by what corners have lost, half a voxel at most.

    Parameters
    ----------
    mesh
        Closed surface.
    voxels
        Of the segment.
    resolution
        Length of a voxel along (x, y, z), in any unit: errors are weighed in it.
    keep
        Share of the faces to keep.
    """
    size = np.asarray(resolution, float) / min(resolution)
    tree = cKDTree(mesh.vertices)
    found: list[Mesh] = []
    while not found or len(found[-1].faces) > ROOT_FACES:
        finer = found[-1] if found else mesh
        share = 1 / COARSER if found else keep
        level = _bounded(finer, tree, voxels, size, share, 2 ** len(found))
        if found and (level is None or 2 * len(level.faces) > len(finer.faces)):
            break
        found.append(_with_volume(mesh, voxels) if level is None else level)
    return found


def _bounded(
    mesh: Mesh, tree: cKDTree, voxels: int, size: Floats, keep: float, slack: float
) -> Mesh | None:
    """Return a mesh with about the share `keep` of the faces; None if bounds forbid it."""
    if len(mesh.faces) <= _FEWEST:
        return None
    for factor in _FACTORS:
        target = max(_FEWEST, int(keep * factor * len(mesh.faces)))
        if target >= len(mesh.faces):
            break
        share = target / len(mesh.faces)
        simple = _separated(*_simplified(mesh.vertices * size, mesh.faces, share))
        if simple is None:
            continue
        moved = _with_volume(Mesh(simple.vertices / size, simple.faces), voxels)
        error = abs(enclosed(moved) / voxels - 1)
        off = tree.query(moved.vertices)[0].max()
        if error <= slack * VOLUME_ERROR and off <= slack * MOST_OFF:
            return moved
    return None


def _simplified(
    vertices: Floats, faces: npt.NDArray[Any], keep: float, **options: Any
) -> tuple[Floats, Faces]:
    with _one_at_a_time:
        found = fast_simplification.simplify(
            vertices, faces.astype(np.int32), target_reduction=1 - keep, **options
        )
    return np.array(found[0]), np.array(found[1], np.int64)


def enclosed(mesh: Mesh) -> float:
    """Return the volume that a closed surface encloses."""
    a, b, c = ((mesh.vertices - mesh.vertices[0])[mesh.faces[:, k]] for k in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def is_closed(faces: Faces) -> bool:
    """Return whether each edge belongs to two faces, which pass along it in opposite directions."""
    if len(faces) == 0:
        return False
    tail, head = _half_edges(faces)
    n = int(faces.max()) + 1
    there, back = np.sort(tail * n + head), np.sort(head * n + tail)
    return bool((there == back).all() and (np.diff(there) > 0).all() and (tail != head).all())


def _half_edges(faces: Faces) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where the three sides of each face begin and end."""
    return faces.ravel(), np.roll(faces, -1, axis=1).ravel()


def _sorted(faces: Faces) -> Faces:
    """Return faces in the one order: the smallest vertex first, and ascending."""
    first = faces.argmin(axis=1)[:, None]
    turned = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1)
    return turned[np.lexsort(turned.T[::-1])]


def _with_volume(mesh: Mesh, volume: float) -> Mesh:
    """Return a mesh whose vertices are moved along their normals so that it encloses a volume."""
    vertices, faces = mesh
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    areas = np.cross(b - a, c - a)
    normals = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(normals, faces[:, k], areas)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals /= np.maximum(lengths, 1e-12)
    by, moved = 0.0, vertices
    for _ in range(8):
        a, b, c = (moved[faces[:, k]] for k in range(3))
        area = float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)
        by += (volume - enclosed(Mesh(moved, faces))) / max(area, 1e-12)
        by = min(max(by, -0.5), 0.5)
        moved = vertices + by * normals
    return Mesh(moved, faces)


def _separated(vertices: Floats, faces: Faces) -> Mesh | None:
    """Return a closed mesh of one whose sheets may meet at edges and vertices; None if impossible.

    Simplification pinches thin necks: four faces then meet at an edge. Around such an edge, faces
    that enclose the same wedge of the inside are joined, with a vertex of their own in its middle.
    Every vertex becomes one for each fan of faces around it; those at one place are moved apart.
    """
    faces = unfolded(faces)
    if len(faces) == 0:
        return None
    if not is_closed(faces):
        joined = _joined_sides(vertices, faces)
        if joined is None:
            return None
        one, other, crowded = joined
        # Corner k of face f is 3 f + k, where its side of that number begins.
        ends = np.concatenate([one, _after(one)]), np.concatenate([_after(other), other])
        n = faces.size
        _, fans = connected_components(coo_array((np.ones(len(ends[0])), ends), shape=(n, n)))
        origin = faces.ravel()[np.unique(fans, return_index=True)[1]]
        corners = faces.ravel()
        faces = fans.reshape(-1, 3).astype(np.int64)
        halfway = (vertices[corners[one[crowded:]]] + vertices[corners[other[crowded:]]]) / 2
        copies = np.append(np.bincount(origin)[origin] > 1, np.ones(len(halfway), bool))
        middles = len(origin) + np.arange(len(halfway))
        vertices = np.concatenate([vertices[origin], halfway])
        sides = np.concatenate([one[crowded:], other[crowded:]]).tolist()
        faces = _divided(faces, dict(zip(sides, np.tile(middles, 2).tolist(), strict=True)))
        vertices = vertices + _APART * copies[:, None] * _inward(vertices, faces)
    # Vertices that no face has any more are left out.
    used, places = np.unique(faces, return_inverse=True)
    faces = _sorted(places.reshape(-1, 3))
    return Mesh(vertices[used], faces) if is_closed(faces) else None


def unfolded(faces: Faces) -> Faces:
    """Return faces without those that have no area, or lie back to back on the same corners."""
    faces = faces[
        (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    ]
    turned = _sorted(faces)
    flipped = turned[:, 1] > turned[:, 2]
    turned[flipped] = turned[flipped][:, [0, 2, 1]]
    _, places, counts = np.unique(turned, axis=0, return_inverse=True, return_counts=True)
    balance = np.bincount(places.reshape(-1), np.where(flipped, -1, 1))
    return _sorted(faces)[(counts == 1)[places.reshape(-1)] | (balance != 0)[places.reshape(-1)]]


def _after(sides: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the next side of the face of each side."""
    return sides - sides % 3 + (sides + 1) % 3


def _divided(faces: Faces, middles: dict[int, int]) -> Faces:
    """Return faces with vertices in the middle of some of their sides."""
    parts = []
    touched = sorted({side // 3 for side in middles})
    for face in touched:
        around: list[int] = []
        for k in range(3):
            around.append(int(faces[face, k]))
            if 3 * face + k in middles:
                around.append(middles[3 * face + k])
        first = next(k for k in range(3) if 3 * face + k in middles) + 1
        turned = around[first:] + around[:first]
        parts += [(turned[0], a, b) for a, b in pairwise(turned[1:])]
    return np.concatenate([np.delete(faces, touched, axis=0), np.array(parts, np.int64)])


def _inward(vertices: Floats, faces: Faces) -> Floats:
    """Return unit vectors from each vertex to the middle of the faces around it."""
    middle = np.zeros_like(vertices)
    for k in range(3):
        np.add.at(middle, faces[:, k], vertices[faces].mean(axis=1))
    counts = np.bincount(faces.ravel(), minlength=len(vertices))
    away = middle / np.maximum(counts, 1)[:, None] - vertices
    return away / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-12)


def _joined_sides(
    vertices: Floats, faces: Faces
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int] | None:
    """Pair sides of faces that pass along an edge in opposite directions.

    Returns
    -------
    one, other
        Sides.
    crowded
        Place of the first pair at an edge that has more than one pair.
    """
    tail, head = _half_edges(faces)
    low, high = np.minimum(tail, head), np.maximum(tail, head)
    order = np.lexsort((tail > head, high, low))
    keys = low[order] * len(vertices) + high[order]
    starts = np.flatnonzero(np.append(True, np.diff(keys) != 0))
    counts = np.diff(np.append(starts, len(keys)))
    plain = starts[counts == 2]
    one, other = [order[plain]], [order[plain + 1]]
    for start, count in zip(starts[counts != 2], counts[counts != 2], strict=True):
        sides = order[start : start + count]
        forward = tail[sides] < head[sides]
        if 2 * int(forward.sum()) != count:
            return None
        pairs = _wedges(vertices, faces, sides, forward)
        one.append(pairs[:, 0])
        other.append(pairs[:, 1])
    a, b = np.concatenate(one), np.concatenate(other)
    fits = (tail[a] == head[b]).all() and (head[a] == tail[b]).all()
    return (a, b, len(plain)) if fits else None


def _wedges(
    vertices: Floats, faces: Faces, sides: npt.NDArray[np.int64], forward: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Pair the sides at one edge that enclose wedges of the inside, as brackets do."""
    corners = faces.ravel()
    first = int(sides[np.flatnonzero(forward)[0]])
    tail = vertices[corners[first]]
    axis = vertices[corners[first - first % 3 + (first + 1) % 3]] - tail
    axis = axis / max(float(np.linalg.norm(axis)), 1e-12)
    apex = vertices[corners[sides - sides % 3 + (sides + 2) % 3]] - tail
    flat = apex - (apex @ axis)[:, None] * axis
    x = np.cross(axis, [1.0, 0, 0] if abs(axis[0]) < 0.9 else [0, 1.0, 0])
    y = np.cross(axis, x)
    order = np.argsort(np.arctan2(flat @ y, flat @ x), kind="stable")
    # Going round, inside lies between a backward side and the next forward one.
    order = np.roll(
        order, -int(np.flatnonzero(forward[order] & ~np.roll(forward[order], 1))[0]) - 1
    )
    waiting: list[int] = []
    pairs = []
    for k in order.tolist() * 2:
        if not forward[k]:
            waiting.append(k)
        elif waiting:
            pairs.append((k, waiting.pop()))
    return sides[np.array(pairs[: len(sides) // 2])]
