"""The surface of each label in a block of voxels, by marching cubes on labels.

Vertices lie half-way between the centres of two face neighbours, one of which has the label. Their
places are whole numbers of half voxels, so blocks that share a vertex give it the same number.
Where two voxels of a label touch at an edge only, the surface passes between them: a rule for a
face of the cell, so both cells at the face agree. No diagonal of a triangulation lies in a face of
the cell. Hence every edge belongs to exactly two triangles, whatever the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

# Bits of a corner's number: z, y, x.
_CORNERS = [(c >> 2, c >> 1 & 1, c & 1) for c in range(8)]
_EDGES = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b).bit_count() == 1]
_SQUARE = [(0, 0), (0, 1), (1, 1), (1, 0)]
_MOST = 5
"""Triangles of a label in a cell."""


def triangles(
    labels: npt.NDArray[np.uint64], first: Sequence[int], shape: Sequence[int]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Return the triangles of all labels but 0 in the cells of a box of voxels.

    Parameters
    ----------
    labels
        Voxels, (z, y, x).
    first
        Place of the first voxel in the volume, (z, y, x); -1 for one before the volume.
    shape
        Voxels of the volume, (z, y, x).

    Returns
    -------
    labels
        Label of each triangle.
    vertices
        `vertex_number` of its corners, (n, 3); counter-clockwise seen from outside, in (x, y, z).
    """
    edges, counts = _tables()
    steps = np.array(_steps(shape), np.int64)
    places = np.array([[_CORNERS[a][d] + _CORNERS[b][d] for d in range(3)] for a, b in _EDGES])
    origin = int(sum((2 * f + 1) * int(s) for f, s in zip(first, steps, strict=True)))
    found = _march(labels, (places @ steps)[edges], counts, 2 * steps, origin)
    return found[0], found[1]


def places_of(numbers: npt.NDArray[np.int64], shape: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the places (x, y, z) of vertices in voxels; 0 is where the volume begins."""
    grid = tuple(2 * int(n) + 1 for n in shape)
    return np.stack(np.unravel_index(numbers, grid)[::-1], axis=1) / 2


def _steps(shape: Sequence[int]) -> tuple[int, int, int]:
    _, y, x = (2 * int(n) + 1 for n in shape)
    return y * x, x, 1


@cache
def _tables() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the edges at the corners of triangles (256, 5, 3), and the number of triangles.

    A case is the sum of 2^corner over the corners that have the label.
    """
    edges, counts = np.zeros((256, _MOST, 3), np.int64), np.zeros(256, np.int64)
    for case in range(1, 255):
        found = [t for cycle in _cycles(case) for t in _triangulation(_outward(case, cycle)) or ()]
        counts[case] = len(found)
        edges[case, : len(found)] = found
    return edges, counts


def _faces() -> Iterator[list[int]]:
    """Yield the corners around each face of a cell."""
    for axis in range(3):
        u, v = (d for d in range(3) if d != axis)
        for side in (0, 1):
            corners = [c for c in range(8) if _CORNERS[c][axis] == side]
            at = {(_CORNERS[c][u], _CORNERS[c][v]): c for c in corners}
            yield [at[place] for place in _SQUARE]


_FACES = list(_faces())
_FACES_OF = [{i for i, f in enumerate(_FACES) if a in f and b in f} for a, b in _EDGES]


def _cycles(case: int) -> Iterator[list[int]]:
    """Yield the closed lines in which the surface cuts the faces of a cell, as cut edges."""
    inside = [bool(case >> c & 1) for c in range(8)]
    joined: dict[int, list[int]] = {
        i: [] for i, (a, b) in enumerate(_EDGES) if inside[a] != inside[b]
    }
    for face in _FACES:
        for k in range(4):
            # A line parts each run of corners with the label from the rest of the face.
            if inside[face[k]] and not inside[face[k - 1]]:
                j = k
                while inside[face[(j + 1) % 4]]:
                    j += 1
                a = _EDGES.index((min(face[k - 1], face[k]), max(face[k - 1], face[k])))
                last, after = face[j % 4], face[(j + 1) % 4]
                b = _EDGES.index((min(last, after), max(last, after)))
                joined[a].append(b)
                joined[b].append(a)
    while joined:
        start, (current, _) = next(iter(joined.items()))
        cycle = [start]
        while current != start:
            cycle.append(current)
            current = next(edge for edge in joined[current] if edge != cycle[-2])
        for edge in cycle:
            del joined[edge]
        yield cycle


def _outward(case: int, cycle: list[int]) -> list[int]:
    """Return a cycle in the order that is counter-clockwise seen from outside."""
    places: npt.NDArray[Any] = np.array(
        [
            [_CORNERS[a][d] + _CORNERS[b][d] for d in (2, 1, 0)]
            for a, b in map(_EDGES.__getitem__, cycle)
        ]
    )
    area = np.cross(places, np.roll(places, -1, axis=0)).sum(axis=0)
    out = np.zeros(3, np.int64)
    for a, b in map(_EDGES.__getitem__, cycle):
        step = np.array(_CORNERS[b])[::-1] - np.array(_CORNERS[a])[::-1]
        out += step if case >> a & 1 else -step
    return cycle if area @ out > 0 else cycle[::-1]


def _triangulation(cycle: list[int]) -> list[tuple[int, int, int]] | None:
    """Cut a polygon along diagonals that lie in no face of the cell; None if impossible."""
    n = len(cycle)
    if n < 3:
        return []
    for k in range(1, n - 1):
        sides = [(a, b) for a, b in ((0, k), (k, n - 1)) if b - a > 1]
        if any(_FACES_OF[cycle[a]] & _FACES_OF[cycle[b]] for a, b in sides):
            continue
        parts = _triangulation(cycle[: k + 1]), _triangulation(cycle[k:])
        if parts[0] is not None and parts[1] is not None:
            return [*parts[0], (cycle[0], cycle[k], cycle[-1]), *parts[1]]
    return None


@numba.njit(cache=True, nogil=True)
def _march(labels: Any, edges: Any, counts: Any, steps: Any, origin: int) -> Any:
    """Return label and vertices of each triangle: counted first, then written."""
    corner = np.empty(8, np.uint64)
    total = 0
    owners = np.empty(0, np.uint64)
    found = np.empty((0, 3), np.int64)
    for writing in (False, True):
        if writing:
            owners = np.empty(total, np.uint64)
            found = np.empty((total, 3), np.int64)
        at = 0
        for z in range(labels.shape[0] - 1):
            for y in range(labels.shape[1] - 1):
                for x in range(labels.shape[2] - 1):
                    first = labels[z, y, x]
                    same = True
                    for c in range(8):
                        corner[c] = labels[z + (c >> 2), y + (c >> 1 & 1), x + (c & 1)]
                        same = same and corner[c] == first
                    if same:
                        continue
                    base = origin + z * steps[0] + y * steps[1] + x * steps[2]
                    for c in range(8):
                        label = corner[c]
                        case = 0
                        known = label == 0
                        for k in range(8):
                            if corner[k] == label:
                                known = known or k < c
                                case |= 1 << k
                        if known:
                            continue
                        if not writing:
                            total += counts[case]
                            continue
                        for t in range(counts[case]):
                            owners[at] = label
                            for j in range(3):
                                found[at, j] = base + edges[case, t, j]
                            at += 1
    return owners, found
