"""The hash of edges against a dictionary."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.stitch.merge.kernel import EMPTY, delete, empty_slots, find, pool

PAIRS = [(a, b) for a in range(9) for b in range(9) if a != b]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PAIRS), st.booleans()), max_size=120))
def test_find_and_delete(steps):
    """Few slots for the pairs, so that runs of full slots wrap around and are closed again."""
    ends = np.zeros((len(steps), 2), np.int32)
    slots, known = np.full(64, EMPTY, np.int32), {}
    for row, ((a, b), remove) in enumerate(steps):
        pair = (min(a, b), max(a, b))
        slot = find(slots, ends, a, b)
        assert slots[slot] == known.get(pair, EMPTY)
        if remove and pair in known:
            delete(slots, ends, slot)
            del known[pair]
        elif pair not in known:
            ends[row] = a, b
            slots[slot] = known[pair] = row
    for a, b in PAIRS:
        found = slots[find(slots, ends, a, b)]
        assert found == known.get((min(a, b), max(a, b)), EMPTY)
    assert sorted(slots[slots != EMPTY]) == sorted(known.values())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PAIRS),
            st.integers(-5, 5),
            st.integers(1, 3),
            st.tuples(st.integers(0, 3), st.integers(2**63, 2**63 + 3)),
        ),
        max_size=60,
    )
)
def test_pool(rows):
    ends = np.array([pair for pair, *_ in rows], np.int32).reshape(-1, 2)
    numerator = np.array([n for _, n, _, _ in rows], np.int64)
    denominator = np.array([d for _, _, d, _ in rows], np.int64)
    keys = np.array([key for *_, key in rows], np.uint64).reshape(-1, 2)
    expected: dict = {}
    for (a, b), n, d, key in rows:
        pair = (min(a, b), max(a, b))
        old = expected.get(pair, (0, 0, key))
        expected[pair] = (old[0] + n, old[1] + d, min(old[2], key))
    slots = empty_slots(len(rows))
    kept = pool(slots, ends, numerator, denominator, keys)
    found = {
        (min(pair), max(pair)): (n, d, tuple(key))
        for pair, n, d, key in zip(
            ends[:kept].tolist(),
            numerator[:kept].tolist(),
            denominator[:kept].tolist(),
            keys[:kept].tolist(),
            strict=True,
        )
    }
    assert kept == len(expected)
    assert found == expected
    assert list(found) == list(expected)  # in the order in which the pairs came
    for row in range(kept):
        assert slots[find(slots, ends, *ends[row])] == row
