"""Trace the centre lines of all segments in a window (TEASAR, Sato et al. 2000).

1. Every connected part of a segment has a root: a voxel as far as possible from some other one.
2. The tree of cheapest paths from the roots keeps to the middle: a step costs its length over the
   fourth power of the distance to the surface.
3. The voxel farthest from its root that no path has covered yet gets a path, until all are covered.
   A path covers balls of `SCALE` times the distance to the surface and `CONSTANT_NM` around it.

A window is the box that it is for, its core, and a margin around it. Of two windows that share a
border, each sees what surrounds it, so both find the same line there, voxel for voxel where the
margin is wide enough. A window answers for the edges that touch its core.
"""

from __future__ import annotations

from typing import Any

import cc3d
import numba
import numpy as np
import numpy.typing as npt

from agq.blockwise.export.properties import compacted
from agq.blockwise.export.skeletons.distance import radii_of
from agq.blockwise.export.skeletons.search import cheapest, shortest
from agq.blockwise.volumes.triples import Triple

SCALE = 1.5
"""A path covers so many times the distance to the surface around it."""

CONSTANT_NM = 250.0
"""And so much more."""

_POWER = 4
_SPACING = 0.2
"""Part of the radius of a ball after which the next one follows along a path."""

Index = npt.NDArray[np.int64]


def trace(
    labels: npt.NDArray[Any],
    low: Triple,
    high: Triple,
    size: tuple[float, float, float],
) -> tuple[npt.NDArray[np.uint64], Index, Index, npt.NDArray[np.float32]]:
    """Trace the segments of a window.

    Parameters
    ----------
    labels
        (z, y, x) integers; 0 is background.
    low, high
        First voxel of the core in the window, and one past its last.
    size
        Nanometres of a voxel, (z, y, x).

    Returns
    -------
    tuple
        Segment of each edge that touches the core (n,), its two voxels (n, 3) in the window, and
        the nanometres from these to the surface (n, 2).
    """
    ids, compact = compacted(labels)
    distance = np.pad(radii_of(compact, size), 1).reshape(-1)
    compact = compact + np.int32(ids[0] != 0)  # 0 is background
    parts = cc3d.connected_components(compact, connectivity=26, out_dtype=np.uint32).view(np.int32)
    core = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    wanted = np.zeros(int(parts.max()) + 1, bool)
    wanted[parts[core]] = True
    wanted[0] = False
    del compact  # a window is large
    # A frame of background: no step leaves the array.
    parts = np.pad(np.where(wanted[parts], parts, 0), 1)
    flat = parts.reshape(-1)
    inside = np.flatnonzero(flat)
    nothing = np.zeros((0, 3), np.int64)
    if not len(inside):
        return np.zeros(0, np.uint64), nothing, nothing, np.zeros((0, 2), np.float32)
    offsets, steps = _neighbours(parts.shape, size)
    first = np.full(len(wanted), -1, np.int64)
    first[flat[inside[::-1]]] = inside[::-1]  # the first one is written last
    first = first[first >= 0]
    roots = _farthest(flat, inside, shortest(flat, offsets, steps, first))
    far = shortest(flat, offsets, steps, roots)
    cost = (np.maximum(distance, min(size) / 2) / min(size)) ** -_POWER
    previous = cheapest(flat, offsets, steps, cost, roots)
    used = _paths(flat, np.array(parts.shape), inside, far, previous, distance, np.array(size))
    a = np.flatnonzero(used & (previous >= 0))
    b = previous[a]
    ends = [np.stack(np.unravel_index(n, parts.shape), 1) - 1 for n in (a, b)]
    touching = np.zeros(len(a), bool)
    for end in ends:
        touching |= ((end >= low) & (end < high)).all(1)
    a, b, ends = a[touching], b[touching], [end[touching] for end in ends]
    segments = labels[tuple(ends[0].T)].astype(np.uint64)
    radii = np.stack([distance[a], distance[b]], 1).astype(np.float32)
    return segments, ends[0], ends[1], radii


def _neighbours(
    shape: tuple[int, ...], size: tuple[float, float, float]
) -> tuple[Index, npt.NDArray[np.float64]]:
    """Return the 26 neighbours as differences of flat places, and how far they are."""
    steps = np.array([s for s in np.ndindex(3, 3, 3) if s != (1, 1, 1)]) - 1
    strides = np.array([shape[1] * shape[2], shape[2], 1])
    return steps @ strides, np.linalg.norm(steps * size, axis=1)


@numba.njit(cache=True, nogil=True)
def _farthest(
    parts: npt.NDArray[np.int32], inside: Index, total: npt.NDArray[np.float64]
) -> Index:  # pragma: no cover (compiled)
    """Return the first of the farthest voxels of each part."""
    best = np.full(parts.max() + 1, -1, np.int64)
    for voxel in inside:
        part = parts[voxel]
        if best[part] < 0 or total[voxel] > total[best[part]]:
            best[part] = voxel
    return best[best >= 0]


@numba.njit(cache=True, nogil=True)
def _paths(
    parts: npt.NDArray[np.int32],
    shape: Index,
    inside: Index,
    far: npt.NDArray[np.float64],
    previous: Index,
    distance: npt.NDArray[np.float64],
    size: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:  # pragma: no cover (compiled)
    """Return the voxels of the paths that cover all parts.

    Voxels are sorted by buckets of `far`, the farthest first; of a bucket only those that are still
    uncovered when its turn comes are sorted further.
    """
    used = np.zeros(parts.size, np.bool_)
    covered = np.zeros(parts.size, np.bool_)
    width = size.min()
    last = 0
    for voxel in inside:
        last = max(last, int(far[voxel] / width))
    ends = np.zeros(last + 2, np.int64)
    for voxel in inside:
        ends[last - int(far[voxel] / width) + 1] += 1
    ends = np.cumsum(ends)
    order, place = np.empty(len(inside), np.int64), ends.copy()
    for voxel in inside:
        bucket = last - int(far[voxel] / width)
        order[place[bucket]] = voxel
        place[bucket] += 1
    for bucket in range(last + 1):
        some = order[ends[bucket] : ends[bucket + 1]]
        some = some[~covered[some]]
        for tip in some[np.argsort(-far[some], kind="mergesort")]:
            if not covered[tip]:
                _path(tip, parts, shape, previous, distance, size, used, covered)
    return used


@numba.njit(cache=True, nogil=True)
def _path(
    tip: int,
    parts: npt.NDArray[np.int32],
    shape: Index,
    previous: Index,
    distance: npt.NDArray[np.float64],
    size: npt.NDArray[np.float64],
    used: npt.NDArray[np.bool_],
    covered: npt.NDArray[np.bool_],
) -> None:  # pragma: no cover (compiled)
    """Mark the voxels of the path from a tip to the next one, and those that it covers."""
    row, plane = shape[2], shape[1] * shape[2]
    here, walked, ball = tip, 0.0, 0.0
    while not used[here]:
        used[here] = True
        z, y, x = here // plane, here // row % shape[1], here % row
        reach = SCALE * distance[here] + CONSTANT_NM
        if walked >= _SPACING * min(reach, ball):
            walked, ball = 0.0, reach
            dz, dy, dx = int(reach / size[0]), int(reach / size[1]), int(reach / size[2])
            for k in range(max(z - dz, 0), min(z + dz + 1, shape[0])):
                for j in range(max(y - dy, 0), min(y + dy + 1, shape[1])):
                    rest = reach**2 - ((k - z) * size[0]) ** 2 - ((j - y) * size[1]) ** 2
                    if rest < 0:
                        continue
                    wide = min(dx, int(np.sqrt(rest) / size[2]))
                    at = k * plane + j * row
                    for i in range(at + max(x - wide, 0), at + min(x + wide + 1, row)):
                        if parts[i] == parts[here]:
                            covered[i] = True
        above = previous[here]
        if above < 0:
            break
        walked += np.sqrt(
            ((above // plane - z) * size[0]) ** 2
            + ((above // row % shape[1] - y) * size[1]) ** 2
            + ((above % row - x) * size[2]) ** 2
        )
        here = above
