"""Scores of blocks against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import adapted_rand_error as reference

from agq.model.training.validate import adapted_rand_error, fill_background


@pytest.mark.parametrize("seed", range(4))
def test_adapted_rand_error_equals_scikit_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, (3, 20, 20))
    labels = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 9, truth.shape))
    expected, _, _ = reference(truth, labels)
    assert adapted_rand_error(labels, truth) == pytest.approx(expected, abs=1e-12)


def test_perfect_and_empty_blocks() -> None:
    truth = np.arange(24).reshape(2, 3, 4) // 6
    assert adapted_rand_error(truth + 9, truth) == 0.0
    assert adapted_rand_error(truth, np.zeros_like(truth)) == 0.0
    assert adapted_rand_error(np.arange(4), np.arange(1, 5)) == 0.0


def test_background_takes_the_nearest_label_in_nanometres() -> None:
    labels = np.zeros((3, 1, 8), np.uint16)
    labels[0, 0, 2] = 1
    labels[2, 0, 7] = 2
    filled = fill_background(labels, (30.0, 6.0, 6.0))
    assert filled[0].tolist() == [[1] * 8]  # in voxels, the label two sections down is nearer
    assert filled[2].tolist() == [[2] * 8]
    empty = np.zeros_like(labels)
    assert (fill_background(empty, (30.0, 6.0, 6.0)) == 0).all()
