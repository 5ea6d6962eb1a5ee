"""A mesh cut at the borders of the cells of an octree, in whole steps.

Places are whole steps of a grid that all cells share, so a vertex on a border has the same place in
both cells, and the pieces of a closed mesh fit together to a closed mesh. Neuroglancer draws the
eight parts of a coarser cell one by one, so these are cut at their middles too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agq.blockwise.export.meshes.surface import is_closed, unfolded

BITS = 16
"""Of a coordinate within a cell."""

STEPS = 2**BITS - 1
"""Along the side of a cell."""

_MIDDLE = 2 ** (BITS - 1)
"""Where neuroglancer parts a cell."""

Ints = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """What lies in a cell.

    Attributes
    ----------
    cell
        Place of the cell, (x, y, z).
    vertices
        Steps (x, y, z) from its corner.
    faces
        Places in `vertices`, (n, 3).
    """

    cell: tuple[int, int, int]
    vertices: Ints
    faces: Ints


def pieces(
    vertices: Ints, faces: Ints, cells: int, *, halves: bool, near: int
) -> list[Piece] | None:
    """Cut a closed mesh.

    Parameters
    ----------
    vertices
        In steps (x, y, z), each from 0 to ``cells * STEPS``.
    faces
        Places in `vertices`, (n, 3).
    cells
        Cells along each axis.
    halves
        Whether to cut at the middles of cells too.
    near
        Vertices so near to a cut, in steps, are moved onto it: no slivers arise there.

    Returns
    -------
    list
        In the Z-order of cells; None if rounding has opened the mesh.
    """
    borders = np.arange(1, cells) * STEPS
    middles = np.arange(cells if halves else 0) * STEPS + _MIDDLE
    planes = np.sort(np.append(borders, middles))
    if len(planes):
        vertices = _snapped(vertices, planes, near)
        for axis in range(3):
            vertices, faces = _cut(vertices, faces, axis, planes)
        vertices, places = np.unique(vertices, axis=0, return_inverse=True)
        faces = unfolded(places.reshape(-1)[faces])
        if not is_closed(faces):
            return None
    # A face in a border belongs to the cell above it.
    cell = (vertices[faces].sum(axis=1) // (3 * STEPS)).clip(0, cells - 1)
    return list(_grouped(vertices, faces, cell))


def z_order(cells: Ints) -> Ints:
    """Return the numbers of cells (n, 3) on the Z-curve: bits of x, y, z in turn, x lowest."""
    codes = np.zeros(len(cells), np.int64)
    for bit in range(21):
        for axis in range(3):
            codes |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return codes


def _grouped(vertices: Ints, faces: Ints, cell: Ints) -> Iterator[Piece]:
    codes = z_order(cell)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    for rows in np.split(order, starts[1:]):
        used, places = np.unique(faces[rows], return_inverse=True)
        x, y, z = cell[rows[0]].tolist()
        yield Piece((x, y, z), vertices[used] - cell[rows[0]] * STEPS, places.reshape(-1, 3))


def _snapped(vertices: Ints, planes: Ints, near: int) -> Ints:
    above = np.searchsorted(planes, vertices).clip(0, len(planes) - 1)
    for place in (planes[above], planes[np.maximum(above - 1, 0)]):
        vertices = np.where(np.abs(vertices - place) <= near, place, vertices)
    return vertices


def _cut(vertices: Ints, faces: Ints, axis: int, planes: Ints) -> tuple[Ints, Ints]:
    """Cut faces along an axis, at the lowest plane first."""
    done = []
    while len(faces):
        along = vertices[faces, axis]
        above = np.searchsorted(planes, along.min(axis=1), side="right")
        plane = np.append(planes, along.max())[above]
        crossing = plane < along.max(axis=1)
        done.append(faces[~crossing])
        if not crossing.any():
            break
        vertices, faces = _split(vertices, faces[crossing], axis, plane[crossing])
    return vertices, np.concatenate(done)


def _split(vertices: Ints, faces: Ints, axis: int, plane: Ints) -> tuple[Ints, Ints]:
    """Cut each face at its plane; it has corners on either side."""
    sides = np.sign(vertices[faces, axis] - plane[:, None])
    touching = (sides == 0).any(axis=1)
    # The corner that is alone comes first: the one on the plane, or on its side of it.
    lone = np.where(touching, 0, -sides.sum(axis=1))
    first = (sides == lone[:, None]).argmax(axis=1)[:, None]
    a, b, c = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1).T
    n, two, three = len(vertices), touching, ~touching
    middle = _between(vertices, b[two], c[two], axis, plane[two])
    left = _between(vertices, a[three], b[three], axis, plane[three])
    right = _between(vertices, a[three], c[three], axis, plane[three])
    m = n + np.arange(len(middle))
    p = n + len(middle) + np.arange(len(left))
    q = p + len(left)
    parts = [
        (a[two], b[two], m),
        (a[two], m, c[two]),
        (a[three], p, q),
        (p, b[three], c[three]),
        (p, c[three], q),
    ]
    found = np.concatenate([np.stack(part, axis=1) for part in parts])
    return np.concatenate([vertices, middle, left, right]), found


def _between(vertices: Ints, a: Ints, b: Ints, axis: int, plane: Ints) -> Ints:
    """Return where edges meet planes; the same for both faces at an edge."""
    swap = vertices[a, axis] > vertices[b, axis]
    low, high = vertices[np.where(swap, b, a)], vertices[np.where(swap, a, b)]
    share: npt.NDArray[Any] = (plane - low[:, axis]) / (high[:, axis] - low[:, axis])
    places = low + np.rint((high - low) * share[:, None]).astype(np.int64)
    places[:, axis] = plane
    return places
