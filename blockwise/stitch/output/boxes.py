"""Boxes of the segmentation: all that one task writes, read once.

A box (`pyramid.plan_passes`) holds the chunks of a shard of the finest level that a pass writes,
and of one shard of each coarser level over it. Its chunks are made depth first: a coarse chunk asks
for the fine ones below it one after the other, and each is encoded as soon as it is made. So memory
holds one chunk a level and the encoded chunks, whatever the box.

A box is done when its shards and then their journal lines are durable; cut off anywhere, it is made
again with the same bytes. The lines of the coarse levels come first: a block counts as relabelled
only when all that was made of it is there.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockRecord
from agq.blockwise.journal.writer import process_journal
from agq.blockwise.stitch.output.pyramid import (
    Pass,
    Pyramid,
    downsample,
    shard_problem,
    shard_sums,
)
from agq.blockwise.stitch.output.relabel import BlockLut, relabel_block
from agq.blockwise.stitch.settings import Downsampling
from agq.blockwise.stitch.superblocks import Families, StitchFiles, Superblock
from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.files import FATAL_ERRNOS, Unsynced
from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.volumes.create import open_array
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import DamagedError, repairable

Read = Callable[[Triple], NDArray[Any] | None]
"""Returns the labels of a chunk of the base level, clipped to the volume; None: background."""


class _Maker:
    """Makes the shards of a box.

    Parameters
    ----------
    pyramid, made, how
        Levels, the pass, and which label is taken of a window.
    levels
        Which of its levels are written.
    """

    def __init__(self, pyramid: Pyramid, made: Pass, how: Downsampling, levels: range) -> None:
        self.pyramid, self.made, self.how, self.levels = pyramid, made, how, levels
        self.files = {
            level: ChunkFiles(open_array(pyramid.container, pyramid.array(level)))
            for level in levels
        }
        self._encoded: dict[int, dict[tuple[int, ...], bytes]] = {}
        self._read: Read = lambda index: None

    def write(self, place: Sequence[int], read: Read, unsynced: Unsynced) -> dict[int, str | None]:
        """Make and write all shards of a box; return the checksum of each by level."""
        self._encoded, self._read = {level: {} for level in self.levels}, read
        top = self.levels[-1]
        for chunk in self.pyramid.chunks_of(top, place):
            self._make(top, chunk)
        sums = {}
        for level in self.levels:
            sums[level] = self.files[level].write_shard(place, self._encoded.pop(level), unsynced)
        return sums

    def _make(self, level: int, index: Triple) -> NDArray[Any] | None:
        """Return a chunk, encoded if its level is written; None: nothing but background."""
        base = level == self.made.base
        labels = self._read(index) if base else self._coarse(level, index)
        if labels is not None and level in self._encoded:
            self._encoded[level][index] = self.files[level].encode(labels)
        return labels

    def _coarse(self, level: int, index: Triple) -> NDArray[Any] | None:
        pyramid, out = self.pyramid, None
        step, chunks = pyramid.levels[level].step, pyramid.chunks
        starts = [i * f for i, f in zip(index, step, strict=True)]
        # Windows do not cross from a fine chunk into the next where its side is a multiple of them.
        groups = [
            [(k,) for k in range(a, min(a + f, n))] if c % f == 0 else [(*range(a, min(a + f, n)),)]
            for a, f, n, c in zip(starts, step, pyramid.grid(level - 1), chunks, strict=True)
        ]
        for group in itertools.product(*groups):
            fine = self._fine(level - 1, group)
            if fine is None:
                continue
            if out is None:
                shape = pyramid.levels[level].shape
                sides = zip(index, chunks, shape, strict=True)
                out = np.zeros([min(c, n - i * c) for i, c, n in sides], fine.dtype)
            coarse = downsample(fine, step, self.how)
            corner = [
                (ks[0] - a) * c // f
                for ks, a, c, f in zip(group, starts, chunks, step, strict=True)
            ]
            out[tuple(slice(a, a + n) for a, n in zip(corner, coarse.shape, strict=True))] = coarse
        return out if out is not None and out.any() else None

    def _fine(self, level: int, group: tuple[tuple[int, ...], ...]) -> NDArray[Any] | None:
        """Return the labels of a box of chunks of a level."""
        places = [triple(place) for place in itertools.product(*group)]
        if len(places) == 1:
            return self._make(level, places[0])
        chunks, shape, out = self.pyramid.chunks, self.pyramid.levels[level].shape, None
        corner = [ks[0] * c for ks, c in zip(group, chunks, strict=True)]
        for place in places:
            labels = self._make(level, place)
            if labels is None:
                continue
            if out is None:
                ends = zip(group, chunks, shape, corner, strict=True)
                sides = [min((ks[-1] + 1) * c, n) - a for ks, c, n, a in ends]
                out = np.zeros(sides, labels.dtype)
            starts = [p * c - a for p, c, a in zip(place, chunks, corner, strict=True)]
            box = zip(starts, labels.shape, strict=True)
            out[tuple(slice(a, a + n) for a, n in box)] = labels
        return out


@dataclass(frozen=True)
class _Boxes(Task):
    """Work on some boxes of a pass, given by their place.

    Attributes
    ----------
    pyramid, how
        Levels, and the label that is taken of a window.
    journals
        Folder of the journals of the stages.
    revisions
        Of the journals of ``relabel`` and ``pyramid`` (`JournalWriter.revision`).
    """

    pyramid: Pyramid
    how: Downsampling
    journals: Path
    revisions: tuple[int, int]

    def _coarse(
        self, place: Sequence[int], sums: Mapping[int, str | None], began: float
    ) -> list[BlockRecord]:
        """Return the records of the shards of a box above the finest level."""
        levels = [level for level in sums if level]
        numbers = [int(self.pyramid.numbers(n, np.array([place]))[0]) for n in levels]
        voxels = [self._voxels(level, place) for level in levels]
        return [
            BlockRecord(
                number,
                "done",
                started=began,
                finished=time.time(),
                voxels=size,
                sums=shard_sums(sums[level]),
            )
            for number, level, size in zip(numbers, levels, voxels, strict=True)
        ]

    def _voxels(self, level: int, place: Sequence[int]) -> int:
        pyramid = self.pyramid
        sides = [s * c for s, c in zip(pyramid.shard(level), pyramid.chunks, strict=True)]
        shape = pyramid.levels[level].shape
        return int(
            np.prod([min(s, n - p * s) for p, s, n in zip(place, sides, shape, strict=True)])
        )

    def _record(self, stage: str, records: Sequence[BlockRecord]) -> None:
        revision = self.revisions[stage == "pyramid"]
        process_journal(self.journals / stage, revision).finish_many(records)


def _failed(number: int, began: float, error: Exception) -> BlockRecord:
    """Return the record of what failed; an error that all would have alike is raised."""
    if isinstance(error, OSError) and error.errno in FATAL_ERRNOS:
        raise error
    return BlockRecord(
        number,
        "failed",
        started=began,
        finished=time.time(),
        reason=str(error),
        error="".join(traceback.format_exception(error)),
    )


@dataclass(frozen=True)
class Relabel(_Boxes):
    """Write boxes of the full resolution and of the levels over them that fit.

    A block that fails is recorded with its traceback; its box is not written, others are.

    Attributes
    ----------
    items
        Boxes as leaves, with their blocks.
    run_dir, source
        Run folder, and the array of fragments in its container; chunk = block.
    leaf_shape
        Blocks of a leaf superblock: each has its part of the id map.
    grid
        Blocks of the whole volume.
    """

    items: Families
    run_dir: Path
    source: str
    leaf_shape: Triple
    grid: BlockGrid

    @property
    def size(self) -> int:
        """Number of blocks."""
        return int(self.items.sizes.sum())

    def run(self) -> int:
        """Return how many blocks failed."""
        made = self.pyramid.passes[0]
        maker = _Maker(self.pyramid, made, self.how, range(made.last + 1))
        source = ChunkFiles(open_array(self.pyramid.container, self.source, "r"))
        files = StitchFiles(self.run_dir)
        lut = lru_cache(maxsize=1)(BlockLut.open)
        raw = np.empty(source.chunks, source.dtype)
        out = np.empty(maker.files[0].chunks, maker.files[0].dtype)
        failed = 0
        for box, numbers in self.items:
            place = box.index
            process_journal(self.journals / "relabel", self.revisions[0]).require_place()
            began, unsynced, current = time.time(), Unsynced(), int(numbers[0])
            blocks = {self.grid.index(number): int(number) for number in numbers}

            def read(index: Triple, blocks: Mapping[Triple, int] = blocks) -> NDArray[Any] | None:
                nonlocal current
                number = blocks.get(index)
                if number is None:
                    return None
                current = number
                leaf = triple(i // n for i, n in zip(index, self.leaf_shape, strict=True))
                table = lut(files.map(Superblock(0, leaf)))
                labels = source.read(index, raw)
                if labels is None:
                    raise DamagedError(f"{source.file(index)}: file is missing")
                into = out.reshape(-1)[: labels.size].reshape(labels.shape)
                segments, voxels = table.block(number), table.block_voxels(number)
                return relabel_block(labels, number, segments, voxels, out=into)

            try:
                sums = maker.write(place, read, unsynced)
                unsynced.sync()
            except DamagedError as error:
                broken: Exception = repairable(error, self.run_dir)
                self._record("relabel", [_failed(current, began, broken)])
                failed += 1
                continue
            except Exception as error:
                self._record("relabel", [_failed(current, began, error)])
                failed += 1
                continue
            self._record("pyramid", self._coarse(place, sums, began))
            ended, share = time.time(), shard_sums(sums[0])
            done = [
                BlockRecord(
                    number,
                    "done",
                    started=began,
                    finished=ended,
                    voxels=self._block_voxels(number),
                    sums=share,
                )
                for number in blocks.values()
            ]
            self._record("relabel", done)
        return failed

    def _block_voxels(self, number: int) -> int:
        start, stop = self.grid.write_box(number)
        return int(np.prod(np.subtract(stop, start)))


@dataclass(frozen=True)
class Coarsen(_Boxes):
    """Write boxes of the levels of a pass over its base, which is there.

    Attributes
    ----------
    items
        Place of a box.
    made
        The pass.
    sources
        By box: places of the shards of the base level that it is made of, each with the digest of
        its checksum in the journal (0: not recorded).
    """

    items: Sequence[Triple]
    made: Pass
    sources: Mapping[Triple, Sequence[tuple[Triple, int]]] = field(default_factory=dict)

    def run(self) -> int:
        """Return how many boxes failed."""
        pyramid, made = self.pyramid, self.made
        maker = _Maker(pyramid, made, self.how, range(made.base + 1, made.last + 1))
        base = ChunkFiles(open_array(pyramid.container, pyramid.array(made.base), "r"))
        raw, failed = np.empty(base.chunks, base.dtype), 0
        for place in self.items:
            process_journal(self.journals / "pyramid", self.revisions[1]).require_place()
            began, unsynced = time.time(), Unsynced()
            try:
                for source, digest in self.sources.get(place, ()):
                    corner = [p * s for p, s in zip(source, base.shard, strict=True)]
                    file = base.file(corner)
                    if problem := shard_problem(file, digest):
                        raise repairable(f"{file}: {problem}", pyramid.container.parent)
                sums = maker.write(place, lambda index: base.read(index, raw), unsynced)
                unsynced.sync()
            except Exception as error:
                number = int(pyramid.numbers(made.base + 1, np.array([place]))[0])
                self._record("pyramid", [_failed(number, began, error)])
                failed += 1
                continue
            self._record("pyramid", self._coarse(place, sums, began))
        return failed
