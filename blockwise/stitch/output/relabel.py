"""Id map stored by block, and the blockwise pass that applies it to the fragments.

The map is dense by local label: entry ``label - 1`` of a block's slice is the segment id of its
local label ``label`` (0 where the label does not exist). Each leaf superblock has a file of its
own, so no process ever holds the map of the volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.journal.writer import run_journalled
from agq.blockwise.stitch.steps import Task
from agq.blockwise.storage.arrays import load_arrays, save_arrays
from agq.blockwise.storage.files import Unsynced
from agq.blockwise.volumes.create import open_array, write_chunk
from agq.errors import InputError

_BITS = np.uint64(LOCAL_BITS)
_MASK = np.uint64(2**LOCAL_BITS - 1)
_NONE = np.uint64(0)
_ONE = np.uint64(1)


class BlockLut:
    """Map from fragment ids to segment ids, by block.

    Parameters
    ----------
    blocks
        Block numbers, ascending, int64 (n,).
    offsets
        int64, (n + 1,): the entries of block ``blocks[i]`` are
        ``segments[offsets[i]:offsets[i + 1]]``, one for each local label 1, 2, ...
    segments
        uint64; 0 where a label does not exist.
    """

    def __init__(
        self,
        blocks: NDArray[np.int64],
        offsets: NDArray[np.int64],
        segments: NDArray[np.uint64],
    ) -> None:
        self.blocks = blocks
        self.offsets = offsets
        self.segments = segments

    @classmethod
    def build(
        cls,
        blocks: NDArray[np.int64],
        ids: NDArray[np.uint64],
        segment_ids: NDArray[np.uint64],
    ) -> BlockLut:
        """Lay segment ids out by block.

        Parameters
        ----------
        blocks
            Block numbers, any order.
        ids, segment_ids
            Fragment ids, ascending, and the segment id of each.

        Raises
        ------
        InputError
            If a fragment lies in none of the blocks.
        """
        blocks = np.sort(blocks)
        numbers, local = BlockGrid.split_ids(ids)
        row = np.minimum(np.searchsorted(blocks, numbers), max(len(blocks) - 1, 0))
        if len(ids) and (not len(blocks) or bool((blocks[row] != numbers).any())):
            raise InputError("id map: a fragment lies in none of the blocks that it is made for")
        # Ids are sorted, so the last fragment of a block has its largest local label.
        labels = np.zeros(len(blocks), np.int64)
        labels[row] = local
        offsets = np.concatenate(([0], np.cumsum(labels)))
        segments = np.zeros(offsets[-1], np.uint64)
        segments[offsets[row] + local - 1] = segment_ids
        return cls(blocks, offsets, segments)

    def block(self, number: int) -> NDArray[np.uint64]:
        """Return the segment ids of local labels 1, 2, ... of a block.

        Raises
        ------
        InputError
            If the map is not for this block.
        """
        row = int(np.searchsorted(self.blocks, number))
        if row == len(self.blocks) or self.blocks[row] != number:
            raise InputError(f"block {number} is not in the id map: stitch again")
        return np.asarray(self.segments[self.offsets[row] : self.offsets[row + 1]])

    def save(self, path: Path) -> None:
        """Write the map atomically."""
        save_arrays(
            path, {"blocks": self.blocks, "offsets": self.offsets, "segments": self.segments}
        )

    @classmethod
    def open(cls, path: Path) -> BlockLut:
        """Read the file of :meth:`save`."""
        return cls(**load_arrays(path))


@numba.njit(cache=True, nogil=True)
def _apply(fragments, number, lut, out):  # type: ignore[no-untyped-def]
    """Map ids run by run; return the first id that is not in the block's map, or 0."""
    last, value = _NONE, _NONE
    for i in range(fragments.size):
        fragment = fragments[i]
        if fragment != last:
            last = fragment
            if fragment == _NONE:
                value = _NONE
            else:
                place = (fragment & _MASK) - _ONE
                if fragment >> _BITS != number or place >= np.uint64(lut.size):
                    return fragment
                value = lut[place]
        out[i] = value
    return _NONE


def relabel_block(
    fragments: NDArray[np.uint64],
    number: int,
    lut: NDArray[np.uint64],
    *,
    in_place: bool = False,
) -> NDArray[np.uint64]:
    """Return the segment ids of a block's fragments.

    Parameters
    ----------
    fragments
        Global fragment ids of the block, uint64, (z, y, x).
    lut
        Segment ids of its local labels 1, 2, ...
    in_place
        Write them over the fragments, if those lie in C order: new memory takes longer to get than
        to fill.

    Raises
    ------
    InputError
        If an id belongs to another block or is not in the map.
    """
    fragments = np.ascontiguousarray(fragments)
    out = fragments if in_place else np.empty_like(fragments)
    flat = fragments.reshape(-1)
    unknown = int(_apply(flat, np.uint64(number), np.ascontiguousarray(lut), out.reshape(-1)))
    if unknown:
        raise InputError(
            f"block {number}: fragment id {unknown} is not in the id map: the fragments are not"
            " those that were stitched; predict and stitch the block again"
        )
    return out


@dataclass(frozen=True)
class Relabel(Task):
    """Relabel some blocks, by one part of the id map.

    A block that fails is recorded with its traceback and does not stop the others.

    Attributes
    ----------
    container, source, target
        Zarr container, and the arrays of fragments and segments in it; chunk = block.
    lut_file, journal
        File of the :class:`BlockLut`, and folder of the stage's journal.
    grid
        Blocks of the whole volume.
    """

    items: Sequence[int]
    container: Path
    source: str
    target: str
    lut_file: Path
    journal: Path
    grid: BlockGrid

    def run(self) -> int:
        """Return how many blocks failed."""
        lut = BlockLut.open(self.lut_file)
        fragments = open_array(self.container, self.source, "r")
        segments = open_array(self.container, self.target)

        def work(number: int, unsynced: Unsynced) -> int:
            start, stop = self.grid.write_box(number)
            box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
            labels = np.asarray(fragments[box])
            labels = relabel_block(labels, number, lut.block(number), in_place=True)
            write_chunk(segments, self.grid.index(number), labels, unsynced)
            return labels.size

        return run_journalled(self.journal, self.items, work)
