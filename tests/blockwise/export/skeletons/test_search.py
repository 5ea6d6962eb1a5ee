"""Paths are those of plain searches with one heap, distances those of scipy."""

from heapq import heappop, heappush

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from agq.blockwise.export.skeletons.distance import radii_of
from agq.blockwise.export.skeletons.search import cheapest, shortest

STEPS = [s for s in np.ndindex(3, 3, 3) if s != (1, 1, 1)]


def plain(parts, offsets, steps, cost, sources):
    total, previous = np.full(parts.size, np.inf), np.full(parts.size, -1)
    total[sources] = 0
    heap = [(0.0, int(source)) for source in sorted(sources)]
    while heap:
        spent, here = heappop(heap)
        if spent > total[here]:
            continue
        for offset, step in zip(offsets, steps, strict=True):
            there = here + offset
            then = spent + step * cost[there]
            if parts[there] == parts[here] and then < total[there]:
                total[there], previous[there] = then, here
                heappush(heap, (then, int(there)))
    return total, previous


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_paths_are_those_of_a_plain_search(data):
    shape = data.draw(st.tuples(*[st.integers(1, 7)] * 3))
    size = data.draw(st.sampled_from([(1.0, 1.0, 1.0), (30.0, 6.0, 6.0), (33.3, 24.0, 17.0)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    parts = np.pad(rng.integers(0, 3, shape) // 2 * 5 + 1, 1).astype(np.int32)
    flat = parts.reshape(-1)
    sources = np.array([rng.choice(np.flatnonzero(flat == p)) for p in np.unique(flat[flat > 0])])
    # Few costs, far apart: many ways cost the same.
    cost = 10.0 ** rng.integers(-data.draw(st.integers(0, 5)), 1, flat.size)
    offsets = (np.array(STEPS) - 1) @ [parts.shape[1] * parts.shape[2], parts.shape[2], 1]
    steps = np.linalg.norm((np.array(STEPS) - 1) * size, axis=1)
    lengths, _ = plain(flat, offsets, steps, np.ones(flat.size), sources)
    assert np.array_equal(shortest(flat, offsets, steps, sources), lengths)
    _, previous = plain(flat, offsets, steps, cost, sources)
    assert np.array_equal(cheapest(flat, offsets, steps, cost, sources), previous)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_distances_are_those_of_scipy(data):
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    size = data.draw(st.sampled_from([(1.0, 1.0, 1.0), (30.0, 6.0, 6.0), (6.0, 8.0, 40.0)]))
    labels = np.zeros(shape, np.int32)
    for _ in range(data.draw(st.integers(0, 3))):
        corner = [data.draw(st.integers(0, n - 1)) for n in shape]
        labels[tuple(slice(c, None) for c in corner)] += 1
    surface = np.zeros(shape, bool)
    for axis in range(3):
        differ = np.diff(labels, axis=axis) != 0
        for side in ((1, 0), (0, 1)):
            surface |= np.pad(differ, [side if d == axis else (0, 0) for d in range(3)])
    found = radii_of(labels, size)
    if surface.any():
        expected = ndimage.distance_transform_edt(~surface, sampling=size) + min(size) / 2
        assert np.array_equal(found, expected)
    else:
        assert (found == min(n * s for n, s in zip(shape, size, strict=True))).all()
