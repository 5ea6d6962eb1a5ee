"""Masks cut at low affinities."""

import numpy as np

from model.split import split_at_membranes

SIZE = (30.0, 6.0, 6.0)


def test_a_mask_over_two_cells_is_cut_at_the_membrane_between_them() -> None:
    channels = np.ones((2, 6, 11), np.int16)
    channels[:, 0] = 0
    affinities = np.full((3, 2, 6, 11), 255, np.uint8)
    affinities[..., 4:6] = 20
    parts = split_at_membranes(channels, affinities, 0.5, SIZE)
    assert ((parts > 0) == (channels > 0)).all()
    left, right = parts[0, 1, 0], parts[0, 1, 10]
    assert left != right
    assert (parts[:, 1:, :5] == left).all()  # the membrane goes to the nearer side
    assert (parts[:, 1:, 5:] == right).all()


def test_masks_stay_apart_and_nothing_is_lost_without_cores() -> None:
    channels = np.ones((1, 4, 8), np.int16)
    channels[..., 4:] = 2
    affinities = np.full((3, 1, 4, 8), 255, np.uint8)
    affinities[..., 4:] = 0  # the second mask has no core: it keeps its own piece
    parts = split_at_membranes(channels, affinities, 0.5, SIZE)
    assert len(np.unique(parts[..., :4])) == 1
    assert len(np.unique(parts[..., 4:])) == 1
    assert parts[0, 0, 0] != parts[0, 0, 7]
    nowhere = split_at_membranes(channels, np.zeros_like(affinities), 0.5, SIZE)
    assert (nowhere == channels).all()
    everywhere = split_at_membranes(channels, np.full_like(affinities, 255), 0.5, SIZE)
    assert len(np.unique(everywhere)) == 2
