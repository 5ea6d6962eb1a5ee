"""Id map stored by block, and how it is applied to the fragments of one.

The map is dense by local label: entry ``label - 1`` of a block's slice is the segment id of its
local label ``label`` (0 where the label does not exist). Each leaf superblock has a file of its
own, so no process ever holds the map of the volume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.storage.arrays import load_arrays
from agq.errors import DamagedError, InputError

_BITS = np.uint64(LOCAL_BITS)
_MASK = np.uint64(2**LOCAL_BITS - 1)
_NONE = np.uint64(0)
_ONE = np.uint64(1)
_BACKGROUND = np.uint64(2**64 - 1)


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
    voxels
        int64, like `segments`: how many voxels each label must have; None: not known.
    """

    def __init__(
        self,
        blocks: NDArray[np.int64],
        offsets: NDArray[np.int64],
        segments: NDArray[np.uint64],
        voxels: NDArray[np.int64] | None = None,
    ) -> None:
        self.blocks = blocks
        self.offsets = offsets
        self.segments = segments
        self.voxels = voxels

    @classmethod
    def build(
        cls,
        blocks: NDArray[np.int64],
        ids: NDArray[np.uint64],
        segment_ids: NDArray[np.uint64],
        sizes: NDArray[np.int64] | None = None,
    ) -> BlockLut:
        """Lay segment ids out by block.

        Parameters
        ----------
        blocks
            Block numbers, any order.
        ids, segment_ids
            Fragment ids, ascending, and the segment id of each.
        sizes
            Voxels of each fragment.

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
        voxels = None
        if sizes is not None:
            voxels = np.zeros(offsets[-1], np.int64)
            voxels[offsets[row] + local - 1] = sizes
        return cls(blocks, offsets, segments, voxels)

    def block(self, number: int) -> NDArray[np.uint64]:
        """Return the segment ids of local labels 1, 2, ... of a block.

        Raises
        ------
        InputError
            As `_slice`.
        """
        return np.asarray(self.segments[self._slice(number)])

    def block_voxels(self, number: int) -> NDArray[np.int64] | None:
        """Return how many voxels these labels must have, if that is known; errors as `block`."""
        return None if self.voxels is None else np.asarray(self.voxels[self._slice(number)])

    def segments_of(self, ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the segments of fragments that the map holds; 0 for none."""
        numbers, local = BlockGrid.split_ids(ids)
        row = self.offsets[np.searchsorted(self.blocks, numbers)] + local - 1
        return np.asarray(self.segments[row])

    def _slice(self, number: int) -> slice:
        """Return the entries of a block.

        Raises
        ------
        InputError
            If the map is not for this block.
        """
        row = int(np.searchsorted(self.blocks, number))
        if row == len(self.blocks) or self.blocks[row] != number:
            raise InputError(f"block {number} is not in the id map: stitch again")
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    def arrays(self) -> dict[str, NDArray]:
        """Return what a file of the map holds."""
        columns = ("blocks", "offsets", "segments", "voxels")
        arrays = {name: getattr(self, name) for name in columns}
        return {name: array for name, array in arrays.items() if array is not None}

    @classmethod
    def open(cls, path: Path) -> BlockLut:
        """Read a file of what :meth:`arrays` returns.

        Raises
        ------
        DamagedError
            If it is missing or damaged.
        """
        arrays = load_arrays(path)
        lut = cls(arrays["blocks"], arrays["offsets"], arrays["segments"], arrays.get("voxels"))
        for name, column in lut.arrays().items():
            dtype = np.uint64 if name == "segments" else np.int64
            if column.dtype != dtype or column.ndim != 1:
                raise DamagedError(f"{path}: file is damaged ({name} is {column.dtype})")
        if len(lut.offsets) != len(lut.blocks) + 1:
            raise DamagedError(f"{path}: file is damaged ({len(lut.offsets)} offsets)")
        return lut


@numba.njit(cache=True, nogil=True)
def _apply(fragments, number, lut, out, counts):  # type: ignore[no-untyped-def]
    """Map ids run by run and count them; return the first id that is not in the map, or 0."""
    last, value = _NONE, _NONE
    label, begin = _BACKGROUND, 0
    for i in range(fragments.size):
        fragment = fragments[i]
        if fragment != last:
            if label != _BACKGROUND:
                counts[label] += i - begin
            last, begin = fragment, i
            if fragment == _NONE:
                value, label = _NONE, _BACKGROUND
            else:
                place = (fragment & _MASK) - _ONE
                if fragment >> _BITS != number or place >= np.uint64(lut.size):
                    return fragment
                value, label = lut[place], place
        out[i] = value
    if label != _BACKGROUND:
        counts[label] += fragments.size - begin
    return _NONE


def relabel_block(
    fragments: NDArray[np.uint64],
    number: int,
    lut: NDArray[np.uint64],
    voxels: NDArray[np.int64] | None = None,
    *,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return the segment ids of a block's fragments.

    Parameters
    ----------
    fragments
        Global fragment ids of the block, uint64, (z, y, x).
    lut
        Segment ids of its local labels 1, 2, ...
    voxels
        Voxels that each of these labels must have; None: not checked.
    out
        Contiguous memory for the result, which may be the fragments': new memory takes longer to
        get than to fill. uint64 or uint32.

    Raises
    ------
    DamagedError
        If an id belongs to another block or is not in the map, a label has other voxels, or a
        segment id does not fit the result.
    """
    fragments = np.ascontiguousarray(fragments)
    counts = np.zeros(len(lut), np.int64)
    if out is None:
        out = np.empty_like(fragments)
    flat = fragments.reshape(-1)
    lut = np.ascontiguousarray(lut)
    if len(lut) and (largest := int(lut.max())) > np.iinfo(out.dtype).max:
        raise DamagedError(f"block {number}: segment id {largest} does not fit {out.dtype}")
    unknown = int(_apply(flat, np.uint64(number), lut, out.reshape(-1), counts))
    if unknown:
        raise DamagedError(
            f"block {number}: fragment id {unknown} is not in the id map: the fragments are not"
            " those that were stitched"
        )
    if voxels is not None and not np.array_equal(counts, voxels):
        label = int((counts != voxels).argmax())
        raise DamagedError(
            f"block {number}: label {label + 1} has {counts[label]} voxels, and its sidecar says"
            f" {voxels[label]}: the fragments are not those that were stitched"
        )
    return out
