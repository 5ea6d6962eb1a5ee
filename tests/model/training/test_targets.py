"""Targets against plain loops over voxels."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from agq.errors import InputError
from agq.model.training.data.targets import (
    affinities_of,
    erode_borders,
    instance_masks,
    make_targets,
    p1_shape,
    relabel_pieces,
    resize,
    sample_voxels,
)


def random_labels(seed: int, shape: tuple[int, int, int], n: int) -> np.ndarray:
    """Blobs that touch one another and the background."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal((n, *shape)), (0, 1, 2, 2))
    return smooth.argmax(0).astype(np.uint64) * 7


def test_pieces_of_a_label_become_instances() -> None:
    labels = np.zeros((2, 5, 5), np.uint64)
    labels[:, 0] = 10**12  # ids beyond 32 bits are usual in connectomics
    labels[:, 4] = 10**12
    labels[0, 2, 2] = 3
    labels[1, 3, 3] = 3  # touches the one above by a corner: one piece
    pieces = relabel_pieces(labels)
    assert pieces.dtype == np.uint32
    assert len(np.unique(pieces)) == 4
    assert pieces[0, 0, 0] != pieces[0, 4, 0]
    assert pieces[0, 2, 2] == pieces[1, 3, 3]
    assert ((pieces == 0) == (labels == 0)).all()


def test_labels_without_background_keep_all_instances() -> None:
    labels = np.ones((1, 4, 4), np.uint8)
    labels[:, :, 2:] = 2
    assert set(np.unique(relabel_pieces(labels))) == {1, 2}


def test_labels_must_be_three_dimensional() -> None:
    with pytest.raises(InputError, match="3-D"):
        relabel_pieces(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("seed", range(3))
def test_erosion_equals_a_look_at_every_window(seed: int) -> None:
    labels = random_labels(seed, (3, 12, 14), 5)
    expected = labels.copy()
    for z, y, x in np.ndindex(labels.shape):
        window = labels[z, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if len(set(window[window > 0].tolist())) > 1:
            expected[z, y, x] = 0
    assert (erode_borders(labels) == expected).all()
    assert (expected != labels).any()


def test_affinities_equal_a_look_at_every_voxel() -> None:
    labels = random_labels(4, (3, 8, 9), 3)
    found = affinities_of(labels)
    for axis in range(3):
        for v in np.ndindex(labels.shape):
            before = list(v)
            before[axis] -= 1
            same = v[axis] == 0 or labels[tuple(before)] == labels[v]
            assert found[(axis, *v)] == float(labels[v] > 0 and same)
    assert 0 < found.mean() < 1


def test_masks_are_the_resized_one_hot_volumes_in_label_order() -> None:
    labels = relabel_pieces(random_labels(5, (3, 17, 19), 4))
    shape = p1_shape((3, 17, 19), isotropic=False)
    assert shape == (3, 9, 10)
    masks = instance_masks(labels, shape, min_voxels=20)
    kept = [n for n in range(1, labels.max() + 1) if (labels == n).sum() >= 20]
    assert len(masks) == len(kept) < labels.max()
    for mask, n in zip(masks, kept, strict=True):
        one = torch.from_numpy((labels == n).astype(np.float32))[None]
        assert torch.equal(mask, resize(one, shape)[0])
    assert float(masks.sum(0).max()) <= 1 + 1e-6


def test_isotropic_networks_halve_every_axis() -> None:
    assert p1_shape((17, 129, 128), isotropic=True) == (9, 65, 64)


def test_sampling_favours_small_instances_as_stated() -> None:
    masks = torch.zeros(2, 1, 10, 100)
    masks[0, 0, :, :90] = 1
    masks[1, 0, :, 90:] = 1
    rng = np.random.default_rng(0)
    first = [sample_voxels(masks, 1, 0.6, rng) for _ in range(4000)]
    assert all((int(v) % 100 >= 90) == (int(owner) == 1) for v, owner in first)
    share = 100**0.4 / (100**0.4 + 900**0.4)
    assert np.mean([int(owner) for _, owner in first]) == pytest.approx(share, abs=0.025)


def test_sampling_takes_whole_voxels_once_each() -> None:
    masks = torch.full((2, 1, 5, 8), 0.5)
    masks[0, 0, :3], masks[1, 0, :3] = 1, 0
    masks[1, 0, 4] = 0.25
    voxels, owners = sample_voxels(masks, 1000, 0.6, np.random.default_rng(0))
    assert sorted(voxels.tolist()) == list(range(32))  # the last row is claimed to three quarters
    few, _ = sample_voxels(masks, 10, 0.6, np.random.default_rng(0))
    assert few.tolist() == voxels[:10].tolist()
    assert len(owners) == 32


def test_targets_repeat_with_the_generator_and_survive_an_empty_crop() -> None:
    labels = random_labels(6, (3, 17, 17), 4)
    one, two = (make_targets(labels, samples=50, rng=np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(one.samples, two.samples)
    assert torch.equal(one.affinities, two.affinities)
    assert one.affinities.shape == (3, 3, 9, 9)
    owner = one.masks.flatten(1)[:, one.samples].argmax(0)
    assert torch.equal(owner, one.sample_instances)
    nothing = make_targets(np.zeros((3, 17, 17), np.uint8), rng=np.random.default_rng(1))
    assert len(nothing.masks) == len(nothing.samples) == 0
    assert nothing.affinities.sum() == 0
