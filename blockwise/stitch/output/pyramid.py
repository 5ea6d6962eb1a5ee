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

**Files.** A chunk of a coarse level has the shape of a chunk of the fine one. The chunks of a box
lie in one file, a shard. The levels are made in passes (:func:`plan_passes`): a pass takes boxes of
chunks of a level, small enough for one task, and makes the shards of some levels that lie over
each, one shard a level. So a shard has one writer. Passes depend on the volume alone, never on the
workers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
import zarr
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import sums_digest
from agq.blockwise.stitch.settings import Downsampling
from agq.blockwise.storage.files import file_checksum
from agq.blockwise.volumes.create import create_array, ome_attributes
from agq.blockwise.volumes.triples import Triple, triple

SEGMENTATION = "segmentation"
"""What the journal's checksum of a shard of the segmentation is named."""

_DESCRIPTIONS: dict[Downsampling, str] = {
    "majority": "most frequent label of the window; ties to foreground, then to the smallest id",
    "stride": "first voxel of the window",
}

_BOXES = 16
"""Boxes that a pass has at least, so that workers of small volumes have something to do."""

_FEWEST, _MOST = 8, 64
"""Chunks of a box: at least one coarse chunk's, and not more than are quickly made again."""

_MOST_VOXELS = 2**28
"""Of a box of more chunks than the fewest."""


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


@dataclass(frozen=True)
class Pass:
    """Levels that are made together, box by box.

    Attributes
    ----------
    base, last
        Levels ``base + 1`` to ``last`` are made of level ``base``; the first pass makes that too.
    box
        Chunks of level ``base`` on each axis that a box has; a multiple of what one chunk of level
        ``last`` covers.
    """

    base: int
    last: int
    box: Triple


def plan_passes(
    shape: Sequence[int], chunks: Sequence[int], voxel_size: Sequence[int]
) -> list[Pass]:
    """Return the passes that make all levels of a volume; parameters as of `plan_levels`."""
    levels = plan_levels(shape, chunks, voxel_size)
    passes: list[Pass] = []
    while not passes or passes[-1].last < len(levels) - 1:
        base = last = passes[-1].last if passes else 0
        grid = [-(-n // c) for n, c in zip(levels[base].shape, chunks, strict=True)]
        most = min(_MOST, math.prod(grid) // _BOXES, _MOST_VOXELS // math.prod(chunks))
        most = max(_FEWEST, most)

        def held(box: Sequence[int], grid: Sequence[int] = grid) -> int:
            return math.prod(min(n, side) for n, side in zip(grid, box, strict=True))

        box = (1, 1, 1)
        for level in levels[base + 1 :]:
            wider = triple(b * f for b, f in zip(box, level.step, strict=True))
            if held(wider) > most:
                break
            box, last = wider, last + 1
        while growing := [d for d in range(3) if box[d] < grid[d]]:
            axis = min(growing, key=box.__getitem__)
            wider = triple(n << (d == axis) for d, n in enumerate(box))
            if held(wider) > most:
                break
            box = wider
        passes.append(Pass(base, last, box))
    return passes


@numba.njit(cache=True, nogil=True)
def _mode(fine, step, out):  # type: ignore[no-untyped-def]
    window = np.empty(8, fine.dtype)
    depth, height, width = fine.shape
    # Most windows are whole and of one label: these are told by few comparisons, without a loop.
    squares = step[1] == 2 and step[2] == 2
    for z in range(out.shape[0]):
        first, last = z * step[0], min((z + 1) * step[0], depth) - 1
        for y in range(out.shape[1]):
            j = y * step[1]
            whole = width // 2 if squares and j + 1 < height else 0
            for x in range(out.shape[2]):
                k = x * step[2]
                label = fine[first, j, k]
                if x < whole and (
                    label == fine[first, j, k + 1]
                    and label == fine[first, j + 1, k]
                    and label == fine[first, j + 1, k + 1]
                    and label == fine[last, j, k]
                    and label == fine[last, j, k + 1]
                    and label == fine[last, j + 1, k]
                    and label == fine[last, j + 1, k + 1]
                ):
                    out[z, y, x] = label
                    continue
                n = 0
                for a in range(first, last + 1):
                    for b in range(j, min(j + step[1], height)):
                        for c in range(k, min(k + step[2], width)):
                            window[n] = fine[a, b, c]
                            n += 1
                best, votes = window[0], 0
                for a in range(n):
                    count = 0
                    for b in range(n):
                        count += window[a] == window[b]
                    label = window[a]
                    if count > votes or (
                        count == votes and label != 0 and (best == 0 or label < best)
                    ):
                        best, votes = label, count
                out[z, y, x] = best


def downsample(
    labels: NDArray[Any], step: Sequence[int], how: Downsampling = "majority"
) -> NDArray[Any]:
    """Return one label of each window (see the module).

    Parameters
    ----------
    labels
        uint64 or uint32, (z, y, x); so is the result.
    step
        Window in voxels, each 1 or 2; windows at the end are clipped.
    how
        Which label.
    """
    if how == "stride":
        return np.ascontiguousarray(labels[tuple(slice(None, None, n) for n in step)])
    out = np.empty([-(-n // f) for n, f in zip(labels.shape, step, strict=True)], labels.dtype)
    _mode(np.ascontiguousarray(labels), triple(step), out)
    return out


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
    passes
        As planned by :func:`plan_passes`; empty: a chunk is a file, as in former releases.
    dtype
        Of the labels.
    """

    container: Path
    group: str
    levels: Sequence[Level]
    chunks: Sequence[int]
    offset: Sequence[int]
    unit: str = "nm"
    passes: Sequence[Pass] = ()
    dtype: Literal["uint32", "uint64"] = "uint64"

    @classmethod
    def planned(
        cls,
        container: Path,
        group: str,
        grid: BlockGrid,
        unit: str = "nm",
        max_levels: int | None = None,
    ) -> Pyramid:
        """Plan the pyramid of a volume whose blocks are its chunks; see `plan_levels`."""
        volume = grid.volume_shape, grid.write_shape, grid.voxel_size
        levels = plan_levels(*volume, max_levels)
        top = len(levels) - 1
        passes = [
            Pass(made.base, min(made.last, top), made.box)
            for made in plan_passes(*volume)
            if made.base < max(top, 1)
        ]
        return cls(container, group, levels, grid.write_shape, grid.offset, unit, passes)

    def array(self, level: int) -> str:
        """Return the name of a level's array in the container."""
        return f"{self.group}/{self.levels[level].name}"

    def create(self, levels: slice) -> None:
        """Create the arrays of some levels, or check those that exist."""
        for number in range(len(self.levels))[levels]:
            level = self.levels[number]
            shard = [n * c for n, c in zip(self.shard(number), self.chunks, strict=True)]
            create_array(
                self.container,
                f"{self.group}/{level.name}",
                shape=level.shape,
                chunks=self.chunks,
                shards=shard if self.passes else None,
                dtype=self.dtype,
                voxel_size=level.voxel_size,
                offset=self.offset,
                unit=self.unit,
            )

    def grid(self, level: int) -> Triple:
        """Return the chunks of a level on each axis."""
        shape = self.levels[level].shape
        return triple(-(-n // c) for n, c in zip(shape, self.chunks, strict=True))

    def maker(self, level: int) -> Pass:
        """Return the pass that makes a level."""
        return next(p for p in self.passes if level <= p.last)

    def covered(self, level: int, base: int) -> Triple:
        """Return the chunks of a finer level that a chunk of a level covers on each axis."""
        factors = zip(self.levels[level].factor, self.levels[base].factor, strict=True)
        return triple(a // b for a, b in factors)

    def shard(self, level: int) -> Triple:
        """Return the chunks in a file of a level on each axis."""
        if not self.passes:
            return 1, 1, 1
        made = self.maker(level)
        return triple(n // c for n, c in zip(made.box, self.covered(level, made.base), strict=True))

    def shards(self, level: int) -> Triple:
        """Return the files of a level on each axis."""
        return triple(-(-n // s) for n, s in zip(self.grid(level), self.shard(level), strict=True))

    def first(self, level: int) -> int:
        """Return the number in the journal of a level's first file: all count, from ``s1`` on."""
        return sum(math.prod(self.shards(i)) for i in range(1, level))

    def numbers(self, level: int, places: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the numbers in the journal of files of a level, given by their places (n, 3)."""
        flat = np.ravel_multi_index(tuple(places.T), self.shards(level))
        return self.first(level) + flat.astype(np.int64)

    def places(self, numbers: NDArray[np.int64]) -> list[tuple[int, Triple]]:
        """Return level and place of files, given by their numbers in the journal."""
        firsts = np.array([self.first(level) for level in range(1, len(self.levels) + 1)])
        levels = np.searchsorted(firsts, numbers, side="right")
        return [
            (level, triple(np.unravel_index(number - firsts[level - 1], self.shards(level))))
            for level, number in zip(levels.tolist(), numbers.tolist(), strict=True)
        ]

    def shards_of(self, level: int, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places, (n, 3), of the files that hold some chunks of a level, once each."""
        return np.unique(chunks // np.array(self.shard(level)), axis=0)

    def chunks_of(self, level: int, place: Sequence[int]) -> Iterator[Triple]:
        """Yield the chunks that a file of a level may hold."""
        for chunk in itertools.product(
            *(
                range(p * s, min((p + 1) * s, n))
                for p, s, n in zip(place, self.shard(level), self.grid(level), strict=True)
            )
        ):
            yield triple(chunk)

    def above(self, level: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of the files of the next level that some files of a level go into."""
        step = np.array(self.levels[level + 1].step)
        fine = [chunk for place in places.tolist() for chunk in self.chunks_of(level, place)]
        return self.shards_of(level + 1, np.array(fine, np.int64).reshape(-1, 3) // step)

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


def shard_sums(checksum: str | None) -> dict[str, str]:
    """Return what the journal records of a file of the segmentation.

    Without a file (and a checksum) its voxels read as background, and that is recorded too.
    """
    return {SEGMENTATION: checksum or "background"}


def shard_problem(file: Path, digest: int) -> str | None:
    """Say what is wrong with a file of the segmentation.

    Parameters
    ----------
    file
        The file.
    digest
        Of its checksums in the journal, as `sums_digest`; 0: none were recorded.
    """
    try:
        found = file_checksum(file)
    except FileNotFoundError:
        found = None
    if digest in (0, sums_digest(shard_sums(found))):
        return None
    return "file is missing" if found is None else "file is not the one that was written"
