"""Shortest and cheapest paths within the parts of a window.

Voxels are flat places. `parts` has the part of each voxel, with a frame of background; each part
has at most one source. `offsets` lead to the neighbours of a voxel and `steps` are their distances.
Most of the time of tracing is spent here, so voxels wait in buckets and not in one large heap; the
result is the same.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]

_BITS = 47
"""Lower bits of a cost in which those of a bucket may differ: buckets are 3 to 6 % wide."""


@numba.njit(cache=True, nogil=True)
def shortest(
    parts: npt.NDArray[np.int32],
    offsets: Index,
    steps: npt.NDArray[np.float64],
    sources: Index,
) -> npt.NDArray[np.float64]:  # pragma: no cover (compiled)
    """Return the length of the shortest path from a source to each voxel.

    Voxels wait in buckets, a little narrower than the shortest step: those of the lowest one cannot
    reach each other sooner, so their order does not matter.
    """
    total = np.full(parts.size, np.inf)
    scale = 1 / (0.999 * steps.min())
    count = int(steps.max() * scale) + 2
    # A ring of buckets, each a chain of places in `waiting`.
    heads = np.full(count, -1, np.int64)
    waiting, following = np.empty(1024, np.int64), np.empty(1024, np.int64)
    following[0] = -1
    free, used, left, bucket, number = 0, 1, 0, 0, 0
    # One source after the other: its part fits into the caches of the processor.
    while left or number < len(sources):
        if not left:
            source = sources[number]
            number += 1
            total[source] = 0.0
            slot = free
            free = following[slot]
            waiting[slot], following[slot] = source, -1
            heads[0], bucket, left = slot, 0, 1
        slot = heads[bucket % count]
        if slot < 0:
            bucket += 1
            continue
        here = waiting[slot]
        heads[bucket % count] = following[slot]
        following[slot] = free
        free = slot
        left -= 1
        spent = total[here]
        if int(spent * scale) != bucket:
            continue  # it was reached sooner
        part = parts[here]
        for k in range(len(offsets)):
            there = np.uint64(here + offsets[k])  # never below 0: no place from the end
            before, then = total[there], spent + steps[k]
            if then >= before or parts[there] != part:
                continue
            total[there] = then
            after = int(then * scale)
            if before < np.inf and int(before * scale) == after:
                continue  # it waits there already
            if free >= 0:
                slot = free
                free = following[slot]
            else:
                if used == len(waiting):
                    waiting = np.concatenate((waiting, np.empty(used, np.int64)))
                    following = np.concatenate((following, np.empty(used, np.int64)))
                slot = used
                used += 1
            waiting[slot] = there
            following[slot] = heads[after % count]
            heads[after % count] = slot
            left += 1
    return total


@numba.njit(cache=True, nogil=True)
def cheapest(
    parts: npt.NDArray[np.int32],
    offsets: Index,
    steps: npt.NDArray[np.float64],
    cost: npt.NDArray[np.float64],
    sources: Index,
) -> Index:  # pragma: no cover (compiled)
    """Return the voxel before each on the cheapest path from a source (Dijkstra); -1 without one.

    A step costs its length times the `cost` of the voxel that it leads to. Of equal ways the one
    from the cheaper voxel, then from the first one is taken.

    Voxels wait in buckets of costs that have the highest bits in common, each a chain of slots.
    Only those of the lowest bucket are in a heap. Most get cheaper before theirs is the lowest.
    """
    total = np.full(parts.size, np.inf)
    previous = np.full(parts.size, -1, np.int64)
    number = np.zeros(1)
    bits = number.view(np.int64)
    number[0] = np.inf
    heads = np.full((bits[0] >> _BITS) + 1, -1, np.int64)
    waiting, following = np.empty(1024, np.int64), np.empty(1024, np.int64)
    free, used, chained = -1, 0, 0
    # A heap with four children a node: fewer levels than with two, and these lie side by side.
    keys, voxels = np.empty(1024), np.empty(1024, np.int64)
    number[0] = steps.min() * cost.min()
    lowest = bits[0] >> _BITS
    size, bucket, begun = 0, 0, 0
    # One source after the other: its part fits into the caches of the processor.
    while size or chained or begun < len(sources):
        if size == 0 and chained == 0:
            source = sources[begun]
            begun += 1
            total[source] = 0.0
            keys[0], voxels[0] = 0.0, source
            size, bucket = 1, 0
        elif size == 0:
            bucket = max(bucket, lowest)
            while heads[bucket] < 0:
                bucket += 1
        while heads[bucket] >= 0:
            slot = heads[bucket]
            heads[bucket] = following[slot]
            following[slot] = free
            free = slot
            chained -= 1
            voxel = waiting[slot]
            key = total[voxel]
            number[0] = key
            if bits[0] >> _BITS == bucket:
                if size == len(keys):
                    keys = np.concatenate((keys, np.empty(size)))
                    voxels = np.concatenate((voxels, np.empty(size, np.int64)))
                _rise(keys, voxels, size, key, voxel)
                size += 1
        if size == 0:
            continue
        spent, here = keys[0], voxels[0]
        size -= 1
        _sink(keys, voxels, size, keys[size], voxels[size])
        if spent > total[here]:
            continue
        part = parts[here]
        for k in range(len(offsets)):
            there = np.uint64(here + offsets[k])  # never below 0: no place from the end
            before = total[there]
            if before <= spent:
                continue
            then = spent + steps[k] * cost[there]
            if then > before or parts[there] != part:
                continue
            if then == before:
                # Voxels of the same cost leave the heap in any order.
                if here < previous[there] and spent == total[previous[there]]:
                    previous[there] = here
                continue
            total[there] = then
            previous[there] = here
            number[0] = then
            after = bits[0] >> _BITS
            if after == bucket:
                if size == len(keys):
                    keys = np.concatenate((keys, np.empty(size)))
                    voxels = np.concatenate((voxels, np.empty(size, np.int64)))
                _rise(keys, voxels, size, then, int(there))
                size += 1
                continue
            number[0] = before
            if bits[0] >> _BITS == after:
                continue  # it waits there already
            if free < 0:
                if used == len(waiting):
                    waiting = np.concatenate((waiting, np.empty(used, np.int64)))
                    following = np.concatenate((following, np.empty(used, np.int64)))
                following[used] = -1
                free = used
                used += 1
            slot = free
            free = following[slot]
            waiting[slot], following[slot] = there, heads[after]
            heads[after] = slot
            chained += 1
    return previous


@numba.njit(cache=True, nogil=True)
def _rise(
    keys: npt.NDArray[np.float64], voxels: Index, at: int, key: float, voxel: int
) -> None:  # pragma: no cover (compiled)
    """Put a voxel into a heap of `at` voxels."""
    while at > 0:
        parent = (at - 1) // 4
        if keys[parent] <= key:
            break
        keys[at], voxels[at] = keys[parent], voxels[parent]
        at = parent
    keys[at], voxels[at] = key, voxel


@numba.njit(cache=True, nogil=True)
def _sink(
    keys: npt.NDArray[np.float64], voxels: Index, size: int, key: float, voxel: int
) -> None:  # pragma: no cover (compiled)
    """Put a voxel in the place of the first one of a heap of `size` voxels."""
    at = 0
    while True:
        child = 4 * at + 1
        if child >= size:
            break
        best = child
        for other in range(child + 1, min(child + 4, size)):
            if keys[other] < keys[best]:
                best = other
        if keys[best] >= key:
            break
        keys[at], voxels[at] = keys[best], voxels[best]
        at = best
    keys[at], voxels[at] = key, voxel
