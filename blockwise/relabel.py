"""Id map stored by block, and the blockwise pass that applies it to the fragments.

The map is dense by local label: block ``b`` owns ``segments[offsets[b]:offsets[b + 1]]``, whose
entry ``label - 1`` is the segment id of its local label ``label`` (0 where the label does not
exist). Both files are plain npy, so relabelling a block maps one small slice of them.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from blockwise.agglomerate import Agglomeration
from blockwise.array_files import save_array
from blockwise.arrays import open_array, write_chunk
from blockwise.errors import InputError
from blockwise.grid import LOCAL_BITS, BlockGrid
from blockwise.journal import BlockRecord, JournalWriter, WorkerInfo

SegmentIds = Literal["consecutive", "fragment"]
"""Segment ids: 1, 2, ... in the order of the smallest fragment id, or that fragment id itself."""

_FLUSH_SECONDS = 0.5
_BITS = np.uint64(LOCAL_BITS)
_MASK = np.uint64(2**LOCAL_BITS - 1)
_NONE = np.uint64(0)
_ONE = np.uint64(1)


@dataclass(frozen=True)
class SegmentTable:
    """Segments kept, by ascending id.

    Attributes
    ----------
    ids
        Segment ids, uint64.
    sizes, fragments
        Voxels and fragments of each, int64.
    small_segments, small_voxels
        What fell below the minimum size and became background.
    """

    ids: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    fragments: NDArray[np.int64]
    small_segments: int
    small_voxels: int


class BlockLut:
    """Map from fragment ids to segment ids, by block.

    Parameters
    ----------
    offsets
        int64, (n_blocks + 1,).
    segments
        uint64.
    """

    def __init__(self, offsets: NDArray[np.int64], segments: NDArray[np.uint64]) -> None:
        self.offsets = offsets
        self.segments = segments

    def block(self, number: int) -> NDArray[np.uint64]:
        """Return the segment ids of local labels 1, 2, ... of a block."""
        return np.asarray(self.segments[self.offsets[number] : self.offsets[number + 1]])

    def save(self, folder: Path) -> None:
        """Write ``offsets.npy`` and ``segments.npy``, each atomically."""
        for name in ("offsets", "segments"):
            save_array(Path(folder) / f"{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, folder: Path) -> BlockLut:
        """Map the files of :meth:`save` into memory."""
        offsets, segments = (
            np.load(Path(folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("offsets", "segments")
        )
        return cls(offsets, segments)


def build_lut(
    agglomeration: Agglomeration,
    sizes: NDArray[np.int64],
    n_blocks: int,
    *,
    segment_ids: SegmentIds = "consecutive",
    min_size: int = 0,
) -> tuple[BlockLut, SegmentTable]:
    """Return segment ids laid out by block, and the table of segments.

    Parameters
    ----------
    agglomeration
        Segment of every fragment.
    sizes
        Voxels of every fragment, in the order of ``agglomeration.ids``.
    n_blocks
        Blocks of the whole volume.
    segment_ids
        How segments are numbered.
    min_size
        Segments of fewer voxels become background; 0 keeps all.

    Raises
    ------
    InputError
        If a fragment id lies outside the grid.
    """
    ids = agglomeration.ids
    numbers, local = BlockGrid.split_ids(ids)
    if len(numbers) and int(numbers[-1]) >= n_blocks:
        raise InputError(f"fragment {ids[-1]} lies in block {numbers[-1]} of a grid of {n_blocks}")
    smallest, of = np.unique(agglomeration.representatives, return_inverse=True)
    voxels = np.zeros(len(smallest), np.int64)
    np.add.at(voxels, of, sizes)
    fragments = np.bincount(of, minlength=len(smallest)).astype(np.int64)
    keep = voxels >= min_size
    names = np.where(keep, np.cumsum(keep).astype(np.uint64), _NONE)
    if segment_ids == "fragment":
        names = np.where(keep, smallest, _NONE)

    # Ids are sorted, so the last fragment of a block has its largest local label.
    labels = np.zeros(n_blocks, np.int64)
    labels[numbers] = local
    offsets = np.concatenate(([0], np.cumsum(labels)))
    segments = np.zeros(offsets[-1], np.uint64)
    segments[offsets[numbers] + local - 1] = names[of]
    table = SegmentTable(
        names[keep],
        voxels[keep],
        fragments[keep],
        int((~keep).sum()),
        int(voxels[~keep].sum()),
    )
    return BlockLut(offsets, segments), table


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
    fragments: NDArray[np.uint64], number: int, lut: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Return the segment ids of a block's fragments.

    Parameters
    ----------
    fragments
        Global fragment ids of the block, uint64, (z, y, x).
    lut
        Segment ids of its local labels 1, 2, ...

    Raises
    ------
    InputError
        If an id belongs to another block or is not in the map.
    """
    out = np.empty(fragments.shape, np.uint64)
    flat = np.ascontiguousarray(fragments).reshape(-1)
    unknown = int(_apply(flat, np.uint64(number), np.ascontiguousarray(lut), out.reshape(-1)))
    if unknown:
        raise InputError(
            f"block {number}: fragment id {unknown} is not in the id map: the fragments are not"
            " those that were stitched; predict and stitch the block again"
        )
    return out


def relabel_batch(
    container: str,
    source: str,
    target: str,
    lut_folder: str,
    journal_folder: str,
    grid: dict[str, Any],
    numbers: Iterable[int],
) -> int:
    """Relabel a batch of blocks; one task of the stitch.

    A block that fails is recorded with its traceback and does not stop the others.

    Parameters
    ----------
    container, source, target
        Zarr container, and the arrays of fragments and segments in it; chunk = block.
    lut_folder, journal_folder
        Of :class:`BlockLut` and of the stage's journal.
    grid
        :meth:`BlockGrid.to_dict`.
    numbers
        Blocks to relabel.

    Returns
    -------
    int
        Blocks that failed.
    """
    blocks = BlockGrid.from_dict(grid)
    lut = BlockLut.open(Path(lut_folder))
    fragments, segments = open_array(container, source, "r"), open_array(container, target)

    def work(number: int) -> int:
        start, stop = blocks.write_box(number)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        labels = relabel_block(np.asarray(fragments[box]), number, lut.block(number))
        write_chunk(segments, blocks.index(number), labels)
        return labels.size

    return run_journalled(Path(journal_folder), numbers, work)


def run_journalled(folder: Path, numbers: Iterable[int], work: Any) -> int:
    """Call ``work(number) -> voxels`` for each number and record how it ended.

    Lines are synced together about twice a second: after a crash a little work is done again,
    with the same result.

    Returns
    -------
    int
        Numbers that failed.
    """
    pid, failed = os.getpid(), 0
    worker = WorkerInfo(
        name=f"stitch-{pid}", host=socket.gethostname(), pid=pid, started=time.time()
    )
    with JournalWriter(folder, worker) as journal:
        waiting: list[BlockRecord] = []
        flushed = time.monotonic()
        for number in numbers:
            number = int(number)
            started = time.time()
            try:
                voxels = work(number)
                record = BlockRecord(
                    number, "done", started=started, finished=time.time(), voxels=voxels
                )
            except Exception as error:
                failed += 1
                record = BlockRecord(
                    number,
                    "failed",
                    started=started,
                    finished=time.time(),
                    reason=str(error),
                    error=traceback.format_exc(),
                )
            waiting.append(record)
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                journal.finish_many(waiting)
                waiting, flushed = [], time.monotonic()
        journal.finish_many(waiting)
    return failed
