"""Coarser levels of a label volume, as an OME-NGFF 0.5 multiscale image.

**Downsampling.** A coarse voxel covers 2 x 2 x 2 or 1 x 2 x 2 voxels, fewer at the end of the
volume. ``majority``: it takes the most frequent label of them. Background counts as a label. Ties
go to foreground before background, then to the smallest id. (The kept libraries' mode filters do
not state their tie rule, and results that depend on one cannot be reproduced.) ``stride``: it takes
the first of them, so a level is the full resolution at every n-th voxel.

**Factors.** An axis is halved once it is not much coarser than the finest one (within a factor of
the square root of 2), so 30 x 6 x 6 nm goes by (1, 2, 2) to 30 x 24 x 24 and then by (2, 2, 2).

**Place.** OME-NGFF places the *centre* of the first voxel, so the translation of a level is the
world offset plus half the growth of the voxel, ``(f - 1) / 2 * voxel_size``: the labels stay where
they are when a viewer changes level. The arrays' own ``offset`` attribute (funlib.persistence)
means the *corner* of the first voxel and is the same at every level.

A chunk of a coarse level has the shape of a chunk of the fine one and one writer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
import zarr
from numpy.typing import NDArray

from agq.blockwise.journal.records import sums_digest
from agq.blockwise.journal.writer import run_journalled
from agq.blockwise.stitch.output.relabel import SEGMENTATION
from agq.blockwise.stitch.settings import Downsampling
from agq.blockwise.stitch.steps import Task
from agq.blockwise.storage.files import Unsynced, file_checksum
from agq.blockwise.volumes.create import (
    chunk_box,
    chunk_file,
    create_array,
    ome_attributes,
    open_array,
    write_chunk,
)
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import repairable

_DESCRIPTIONS: dict[Downsampling, str] = {
    "majority": "most frequent label of the window; ties to foreground, then to the smallest id",
    "stride": "first voxel of the window",
}

_NONE = np.uint64(0)


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    Attributes
    ----------
    name
        Array inside the multiscale group: ``s0``, ``s1``, ...
    shape
        Triple, (z, y, x).
    voxel_size
        World units per voxel.
    step
        Downsampling from the level before, per axis (all 1 for ``s0``).
    factor
        Downsampling from ``s0``, per axis.
    """

    name: str
    shape: Triple
    voxel_size: Triple
    step: Triple
    factor: Triple


def plan_levels(
    shape: Sequence[int],
    chunks: Sequence[int],
    voxel_size: Sequence[int],
    max_levels: int | None = None,
) -> list[Level]:
    """Return the levels of a pyramid, ``s0`` first, up to the first that fits in one chunk.

    Parameters
    ----------
    shape, chunks, voxel_size
        Of ``s0``, (z, y, x).
    max_levels
        Most levels, ``s0`` included; None: no limit.
    """
    levels = [Level("s0", triple(shape), triple(voxel_size), (1, 1, 1), (1, 1, 1))]
    while max_levels is None or len(levels) < max_levels:
        last = levels[-1]
        if all(n <= c for n, c in zip(last.shape, chunks, strict=True)):
            break
        limit = min(last.voxel_size) * math.sqrt(2)
        step = [
            2 if size <= limit and n > 1 else 1
            for size, n in zip(last.voxel_size, last.shape, strict=True)
        ]
        if step == [1, 1, 1]:  # the fine axes have one voxel left
            step = [2 if n > 1 else 1 for n in last.shape]
        levels.append(
            Level(
                f"s{len(levels)}",
                triple(-(-n // f) for n, f in zip(last.shape, step, strict=True)),
                triple(v * f for v, f in zip(last.voxel_size, step, strict=True)),
                triple(step),
                triple(a * f for a, f in zip(last.factor, step, strict=True)),
            )
        )
    return levels


@numba.njit(cache=True, nogil=True)
def _mode(fine, step, out):  # type: ignore[no-untyped-def]
    window = np.empty(8, np.uint64)
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                n, same = 0, True
                for i in range(z * step[0], min((z + 1) * step[0], fine.shape[0])):
                    for j in range(y * step[1], min((y + 1) * step[1], fine.shape[1])):
                        for k in range(x * step[2], min((x + 1) * step[2], fine.shape[2])):
                            window[n] = fine[i, j, k]
                            same = same and window[n] == window[0]
                            n += 1
                best, votes = window[0], 0
                if not same:
                    for a in range(n):
                        count = 0
                        for b in range(n):
                            count += window[a] == window[b]
                        label = window[a]
                        if count > votes or (
                            count == votes and label != _NONE and (best == _NONE or label < best)
                        ):
                            best, votes = label, count
                out[z, y, x] = best


def downsample(
    labels: NDArray[np.uint64], step: Sequence[int], how: Downsampling = "majority"
) -> NDArray[np.uint64]:
    """Return one label of each window (see the module).

    Parameters
    ----------
    labels
        uint64, (z, y, x).
    step
        Window in voxels, each 1 or 2; windows at the end are clipped.
    how
        Which label.
    """
    if how == "stride":
        return np.ascontiguousarray(labels[tuple(slice(None, None, n) for n in step)])
    out = np.empty([-(-n // f) for n, f in zip(labels.shape, step, strict=True)], np.uint64)
    _mode(np.ascontiguousarray(labels), triple(step), out)
    return out


def coarse_chunks(
    fine: NDArray[np.int64], step: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the chunks of the next level that cover some chunks of this one.

    Chunks have the same shape in voxels at both levels.

    Returns
    -------
    chunks
        Their indices, (n, 3).
    cover
        Of each of the fine chunks, the place in this list of the one that covers it.
    """
    chunks, cover = np.unique(fine // np.asarray(step), axis=0, return_inverse=True)
    return chunks, cover.reshape(-1)


@dataclass(frozen=True)
class Pyramid:
    """Levels of a volume as the arrays of a multiscale group.

    Attributes
    ----------
    container, group
        Zarr container, and the group in it.
    levels
        As planned by :func:`plan_levels`.
    chunks
        Voxels of a chunk at every level.
    offset
        World position of the corner of the first voxel.
    unit
        World unit.
    """

    container: Path
    group: str
    levels: Sequence[Level]
    chunks: Sequence[int]
    offset: Sequence[int]
    unit: str = "nm"

    def array(self, level: int) -> str:
        """Return the name of a level's array in the container."""
        return f"{self.group}/{self.levels[level].name}"

    def create(self, levels: slice) -> None:
        """Create the arrays of some levels, or check those that exist."""
        for level in self.levels[levels]:
            create_array(
                self.container,
                f"{self.group}/{level.name}",
                shape=level.shape,
                chunks=self.chunks,
                dtype=np.uint64,
                voxel_size=level.voxel_size,
                offset=self.offset,
                unit=self.unit,
            )

    def grid(self, level: int) -> Triple:
        """Return the chunks of a level on each axis."""
        shape = self.levels[level].shape
        return triple(-(-n // c) for n, c in zip(shape, self.chunks, strict=True))

    def first(self, level: int) -> int:
        """Return the number in the journal of a level's first chunk: all count, from ``s1`` on."""
        return sum(math.prod(self.grid(i)) for i in range(1, level))

    def numbers(self, level: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers in the journal of chunks of a level, given by their indices (n, 3)."""
        places = np.ravel_multi_index(tuple(indices.T), self.grid(level))
        return self.first(level) + places.astype(np.int64)

    def places(self, numbers: NDArray[np.int64]) -> list[tuple[int, Triple]]:
        """Return level and index of chunks, given by their numbers in the journal."""
        firsts = np.array([self.first(level) for level in range(1, len(self.levels) + 1)])
        levels = np.searchsorted(firsts, numbers, side="right")
        return [
            (level, triple(np.unravel_index(number - firsts[level - 1], self.grid(level))))
            for level, number in zip(levels.tolist(), numbers.tolist(), strict=True)
        ]

    def write_metadata(self, how: Downsampling = "majority") -> None:
        """Write the OME-NGFF 0.5 ``multiscales`` and ``image-label`` metadata of the group."""
        store = str(self.container)
        group = zarr.open_group(store=store, path=self.group, mode="a", zarr_format=3)
        group.attrs["ome"] = self.ome_metadata(how)

    def ome_metadata(self, how: Downsampling = "majority") -> dict[str, Any]:
        """Return the ``ome`` attribute of a multiscale label group (OME-NGFF 0.5)."""
        base = self.levels[0].voxel_size

        def place(level: Level) -> list[float]:
            axes = zip(self.offset, level.factor, base, strict=True)
            return [o + (f - 1) / 2 * v for o, f, v in axes]

        described = ome_attributes(
            self.group,
            self.unit,
            [(level.name, level.voxel_size, place(level)) for level in self.levels],
            type=how,
            metadata={
                "method": "agq.blockwise.stitch.output.pyramid.downsample",
                "description": _DESCRIPTIONS[how],
            },
        )
        return described | {"image-label": {}}


def chunk_sums(file: Path) -> dict[str, str]:
    """Return what the journal records of a chunk of the segmentation: the checksum of its file.

    A chunk without a file reads as background, and that is recorded too.
    """
    try:
        return {SEGMENTATION: file_checksum(file)}
    except FileNotFoundError:
        return {SEGMENTATION: "background"}


def chunk_problem(file: Path, digest: int) -> str | None:
    """Say what is wrong with a chunk of the segmentation.

    Parameters
    ----------
    file
        Of the chunk.
    digest
        Of its checksums in the journal, as `sums_digest`; 0: none were recorded.
    """
    sums = chunk_sums(file)
    if digest in (0, sums_digest(sums)):
        return None
    lost = sums[SEGMENTATION] == "background"
    return "file is missing" if lost else "file is not the one that was written"


@dataclass(frozen=True)
class Coarsen(Task):
    """Write some chunks of a coarse level, given by number in the journal and index.

    Attributes
    ----------
    pyramid, level
        Levels, and the place of the coarse one among them.
    how
        Label that is taken of a window.
    journal
        Folder of the stage's journal.
    sources
        By number: chunks of the finer level that a chunk is made of, each with the digest of its
        checksum in the journal (0: not recorded).
    revision
        Of the journal (`JournalWriter.revision`).
    """

    items: Sequence[tuple[int, Sequence[int]]]
    pyramid: Pyramid
    level: int
    how: Downsampling
    journal: Path
    sources: Mapping[int, Sequence[tuple[Sequence[int], int]]] = field(default_factory=dict)
    revision: int = 0

    def run(self) -> int:
        """Return how many chunks failed."""
        container, step = self.pyramid.container, self.pyramid.levels[self.level].step
        source = open_array(container, self.pyramid.array(self.level - 1), "r")
        target = open_array(container, self.pyramid.array(self.level))
        indices = dict(self.items)

        def work(number: int, unsynced: Unsynced) -> tuple[int, dict[str, str]]:
            for fine_chunk, digest in self.sources.get(number, ()):
                file = chunk_file(source, fine_chunk)
                if problem := chunk_problem(file, digest):
                    raise repairable(f"{file}: {problem}", container.parent)
            start, stop = chunk_box(target, indices[number])
            labels = np.empty([b - a for a, b in zip(start, stop, strict=True)], np.uint64)
            # One fine chunk at a time: memory holds two chunks, not nine.
            cuts = [
                sorted({a, b, *(-(-k // f) for k in range((a * f // c + 1) * c, b * f, c))})
                for a, b, f, c in zip(start, stop, step, source.chunks, strict=True)
            ]
            for part in itertools.product(*(itertools.pairwise(ends) for ends in cuts)):
                fine = tuple(
                    slice(a * f, min(b * f, n))
                    for (a, b), f, n in zip(part, step, source.shape, strict=True)
                )
                inside = tuple(slice(a - o, b - o) for (a, b), o in zip(part, start, strict=True))
                labels[inside] = downsample(np.asarray(source[fine]), step, self.how)
            # A chunk of background reads as background without a file.
            if labels.any():
                write_chunk(target, indices[number], labels, unsynced)
            else:
                chunk_file(target, indices[number]).unlink(missing_ok=True)
            return labels.size, chunk_sums(chunk_file(target, indices[number]))

        return run_journalled(self.journal, indices, work, self.revision)
