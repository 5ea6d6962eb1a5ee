"""Masks are cut where the affinities see a membrane, and nothing of them is lost."""

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.model.decode.split import split_at_membranes

NM = (30.0, 6.0, 6.0)


def test_one_mask_over_two_neurites_is_cut_at_the_membrane_between_them():
    channels = np.ones((3, 8, 20), np.int16)
    affinities = np.full((3, 3, 8, 20), 250, np.uint8)
    affinities[:, :, :, 9:11] = 10
    pieces = split_at_membranes(channels, affinities, 0.5, NM)
    left, right = np.unique(pieces[:, :, :10]), np.unique(pieces[:, :, 10:])
    assert len(left) == len(right) == 1
    assert left[0] != right[0]
    assert left[0] > 0
    assert right[0] > 0


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([0.0, 0.3, 0.6, 1.0]),
)
def test_cores_are_kept_apart_and_every_voxel_of_a_mask_stays_labelled(seed, shape, cut):
    rng = np.random.default_rng(seed)
    channels = rng.integers(0, 3, shape).astype(np.int16)
    affinities = rng.choice(np.array([0, 90, 200, 255], np.uint8), (3, *shape))
    pieces = split_at_membranes(channels, affinities, cut, NM)
    np.testing.assert_array_equal(pieces > 0, channels > 0)
    # A piece belongs to one mask.
    pairs = np.unique(np.stack([pieces[pieces > 0], channels[pieces > 0]]), axis=1)
    assert pairs.shape[1] == len(np.unique(pairs[0]))
    # Cores keep their own number each.
    sure = affinities.astype(int).sum(0) >= round(cut * 765)
    cores = cc3d.connected_components(np.where(sure, channels, 0), connectivity=6)
    both = np.unique(np.stack([cores[cores > 0], pieces[cores > 0]]), axis=1)
    assert both.shape[1] == len(np.unique(both[0])) == len(np.unique(both[1]))


@pytest.mark.parametrize("value", [0, 255])
def test_all_or_no_membrane_leaves_the_masks_as_they_are(value):
    channels = np.random.default_rng(0).integers(0, 3, (2, 6, 6)).astype(np.int16)
    pieces = split_at_membranes(channels, np.full((3, 2, 6, 6), value, np.uint8), 0.5, NM)
    np.testing.assert_array_equal(
        cc3d.connected_components(pieces, connectivity=6) > 0, channels > 0
    )
