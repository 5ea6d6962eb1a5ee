"""The surfaces of a block's segments in one file, from which one segment can be read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agq.blockwise.storage.arrays import map_array, save_array

_COLUMNS = 4


class Fragment(NamedTuple):
    """What a block holds of a segment.

    Attributes
    ----------
    voxels
        Of the segment, in the block.
    vertices
        Numbers of vertices, ascending.
    faces
        Places in `vertices`, (n, 3).
    """

    voxels: int
    vertices: npt.NDArray[np.int64]
    faces: npt.NDArray[np.uint32]


def write_fragments(
    path: Path,
    owners: npt.NDArray[np.uint64],
    triangles: npt.NDArray[np.int64],
    voxels: dict[int, int],
) -> None:
    """Write the triangles of a block.

    Parameters
    ----------
    path
        File.
    owners, triangles
        Label of each triangle, and the numbers of its vertices (n, 3).
    voxels
        Voxels of each label in the block; one that only borders on it need not be there.
    """
    order = np.argsort(owners, kind="stable")
    labels, starts = np.unique(owners[order], return_index=True)
    table = np.zeros((len(labels), _COLUMNS), np.int64)
    table[:, 0] = labels.view(np.int64)
    vertices, faces = [], []
    for row, mine in zip(table, np.split(order, starts[1:]) if len(labels) else [], strict=True):
        numbers, places = np.unique(triangles[mine], return_inverse=True)
        row[1:] = voxels.get(int(row[0].view(np.uint64)), 0), len(numbers), len(mine)
        vertices.append(numbers)
        faces.append(places.astype(np.uint32).ravel())
    flat = np.concatenate([np.empty(0, np.uint32), *faces])
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint32)).view(np.int64)
    head = np.array([len(table)], np.int64)
    save_array(path, np.concatenate([head, table.ravel(), *vertices, flat]))


class BlockFragments:
    """The file of a block, mapped into memory.

    Attributes
    ----------
    segments
        Labels that it holds, ascending.
    voxels, faces
        Voxels and triangles of each.
    """

    def __init__(self, path: Path) -> None:
        self._data = map_array(path)
        n = int(self._data[0])
        self._table = np.array(self._data[1 : 1 + n * _COLUMNS]).reshape(n, _COLUMNS)
        self.segments = np.ascontiguousarray(self._table[:, 0]).view(np.uint64)
        self.voxels, self.faces = self._table[:, 1], self._table[:, 3]
        self._vertices = 1 + n * _COLUMNS + np.append(0, np.cumsum(self._table[:, 2]))
        self._places = np.append(0, np.cumsum(3 * self.faces))

    def read(self, row: int) -> Fragment:
        """Return the segment in this row of `segments`."""
        low, high = self._vertices[row : row + 2]
        faces = self._data[self._vertices[-1] :].view(np.uint32)
        a, b = self._places[row : row + 2]
        return Fragment(
            int(self.voxels[row]),
            np.array(self._data[low:high]),
            np.array(faces[a:b]).reshape(-1, 3),
        )
