"""Give every connected piece of a label array an id of its own, block by block.

In a volume cut out of tissue, parts of one neurite may touch nowhere inside: no segmentation can
know that they belong together, and a truth that says so makes a perfect one look wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from agq.blockwise.volumes.boxes import boxes, unordered
from agq.blockwise.volumes.create import write_chunk
from agq.blockwise.volumes.triples import Box, triple

Pieces = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]
"""Sorted ids of the pieces of a block, and the label that each had."""


def split_labels(
    array: Any, *, workers: int | None = None, on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Replace labels by their 6-connected pieces, in place.

    The id of a piece is 1 + the C-order place of its first voxel in the volume, so it depends on
    neither chunks nor workers. Background (0) stays. Stopped half-way, the array is to be made
    again. Memory: a few numbers per piece of a chunk, and a few chunks.

    Parameters
    ----------
    array
        Uint64 (z, y, x), of `create_array`.
    workers
        Threads; by default one per processor this process may use.
    on_progress
        Called with (chunks done, chunks in all); each chunk counts three times (once where there
        is nothing but background).

    Returns
    -------
    int
        Pieces.
    """
    blocks = boxes((0, 0, 0), array.shape, array.chunks)
    done = 0

    def run(task: Callable[[Box], Any]) -> list[Any]:
        nonlocal done
        results = []
        for result in unordered(task, blocks, workers=workers):
            results.append(result)
            done += 1
            if on_progress is not None:
                on_progress(done, 3 * len(blocks))
        return results

    parts = run(partial(_split_block, array))
    ids = np.concatenate([part[0] for part in parts])
    if not len(ids):
        return 0
    order = np.argsort(ids)
    ids, labels = ids[order], np.concatenate([part[1] for part in parts])[order]
    touching = np.concatenate(run(partial(_touching, array, ids, labels)), axis=1)
    graph = coo_array((np.ones(touching.shape[1], bool), tuple(touching)), (len(ids), len(ids)))
    count, member = connected_components(graph, directed=False)
    # Sorted ids: the first member of a piece is its smallest.
    smallest = ids[np.unique(member, return_index=True)[1]]
    run(partial(_rename_block, array, ids, smallest[member]))
    return int(count)


def _read(array: Any, box: Box) -> npt.NDArray[np.uint64]:
    return np.asarray(array[tuple(slice(a, b) for a, b in zip(*box, strict=True))])


def _write(array: Any, box: Box, values: npt.NDArray[np.uint64]) -> None:
    write_chunk(array, [a // n for a, n in zip(box[0], array.chunks, strict=True)], values)


def _split_block(array: Any, box: Box) -> Pieces:
    labels = _read(array, box)
    pieces = cc3d.connected_components(labels, connectivity=6, out_dtype=np.uint32)
    numbers, first = np.unique(pieces, return_index=True)
    local = np.stack(np.unravel_index(first, labels.shape))
    place = local + np.array(box[0])[:, None]
    ids = np.ravel_multi_index(tuple(place), array.shape).astype(np.uint64) + np.uint64(1)
    ids[numbers == 0] = 0
    _write(array, box, ids[np.searchsorted(numbers, pieces)])
    kept = np.flatnonzero(numbers)
    kept = kept[np.argsort(ids[kept])]
    return ids[kept], labels.reshape(-1)[first[kept]]


def _touching(
    array: Any, ids: npt.NDArray[np.uint64], labels: npt.NDArray[np.uint64], box: Box
) -> npt.NDArray[np.int64]:
    """Return places in `ids` of the pieces of one label that meet at the box's upper faces."""
    pairs = [np.empty((2, 0), np.int64)]
    for axis in range(3):
        edge = box[1][axis]
        if edge == array.shape[axis]:
            continue
        start, stop = list(box[0]), list(box[1])
        start[axis], stop[axis] = edge - 1, edge + 1
        both = np.moveaxis(_read(array, (triple(start), triple(stop))), axis, 0).reshape(2, -1)
        both = np.unique(both[:, (both > 0).all(axis=0)], axis=1)
        place = np.searchsorted(ids, both)
        pairs.append(place[:, labels[place[0]] == labels[place[1]]])
    return np.concatenate(pairs, axis=1)


def _rename_block(
    array: Any, ids: npt.NDArray[np.uint64], new: npt.NDArray[np.uint64], box: Box
) -> None:
    old = _read(array, box)
    renamed = np.where(old > 0, new[np.searchsorted(ids, old).clip(max=len(new) - 1)], 0)
    _write(array, box, renamed.astype(np.uint64))
