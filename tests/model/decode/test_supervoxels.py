"""Supervoxels, and how much of each mask is in every one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.errors import InputError
from agq.model.decode.inference import MaskHead
from agq.model.decode.supervoxels import UNITS, memberships, supervoxels
from agq.model.predictor import AGQPredictor
from tests.helpers.networks import SMALL, block, write_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "random.safetensors")


def plain_memberships(
    head: MaskHead, features: np.ndarray, labels: np.ndarray, n: int
) -> np.ndarray:
    """The definition, voxel by voxel of P1, in float64."""
    weight, bias = head.weight.double().numpy(), head.bias.double().numpy()[:, 0]
    out = np.zeros((1 + n, len(bias) - 1))
    for place in np.ndindex(features.shape[:3]):
        at = tuple(
            int((i + 0.5) * many / few)
            for i, few, many in zip(place, features.shape, labels.shape, strict=False)
        )
        logits = weight @ features[place] + bias
        share = np.exp(logits - logits.max())
        if labels[at]:
            out[labels[at]] += (share / share.sum())[1:]
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 7), n=st.integers(1, 6))
def test_memberships_against_the_definition(seed: int, queries: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    few = tuple(int(v) for v in rng.integers(1, 5, 3))
    size = (few[0], 2 * few[1] - int(rng.integers(0, 2)), 2 * few[2] - int(rng.integers(0, 2)))
    head = MaskHead(
        torch.from_numpy(rng.normal(0, 2, (1 + queries, 3)).astype(np.float32)),
        torch.from_numpy(rng.normal(0, 1, (1 + queries, 1)).astype(np.float32)),
    )
    features = rng.normal(0, 1, (*few, 3)).astype(np.float32)
    labels = rng.integers(0, n + 1, size)
    found = memberships(head, torch.from_numpy(features), labels, n)
    assert found.dtype == np.int64
    assert found.shape == (1 + n, queries)
    # Every voxel is rounded to half a unit; float32 softmax is within a unit of 65536.
    expected = plain_memberships(head, features.astype(np.float64), labels, n)
    assert np.abs(found / UNITS - expected).max() <= 2 / UNITS * np.prod(few)


def test_the_order_of_voxels_is_no_matter() -> None:
    """Integers: chunks of one voxel or of all give the same sums."""
    rng = np.random.default_rng(3)
    head = MaskHead(torch.randn(6, 4), torch.randn(6, 1))
    features = torch.from_numpy(rng.normal(0, 1, (3, 40, 40, 4)).astype(np.float32))
    labels = rng.integers(0, 9, (3, 80, 80))
    whole = memberships(head, features, labels, 8)
    parts = sum(
        memberships(head, features[z : z + 1], labels[z : z + 1], 8) for z in range(len(features))
    )
    assert np.array_equal(whole, parts)


def test_a_supervoxel_between_the_voxels_of_p1_knows_nothing() -> None:
    labels = np.ones((1, 8, 8), np.uint16)
    labels[0, 4, 4] = 2  # P1 has the odd voxels of 8: floor((i + 0.5) * 2)
    head = MaskHead(torch.randn(4, 2), torch.zeros(4, 1))
    found = memberships(head, torch.randn(1, 4, 4, 2), labels, 2)
    assert found[1].any()
    assert not found[2].any()
    assert not found[0].any()


def test_supervoxels_lie_in_one_section_and_do_not_cross_membranes() -> None:
    affinities = np.full((3, 4, 40, 60), 250, np.uint8)
    affinities[:, :, 19:21] = 5  # a membrane over the whole width
    labels, n = supervoxels(affinities)
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) == set(range(1, n + 1))
    for z in range(4):
        upper, lower = np.unique(labels[z, :19]), np.unique(labels[z, 21:])
        assert not np.intersect1d(upper, lower).size
        others = np.concatenate([labels[:z].ravel(), labels[z + 1 :].ravel()])
        assert not np.intersect1d(labels[z], others).size


def test_a_section_without_inside_is_background() -> None:
    affinities = np.full((3, 2, 12, 12), 250, np.uint8)
    affinities[:, 1] = 0
    labels, n = supervoxels(affinities)
    assert n == 1
    assert (labels[0] == 1).all()
    assert not labels[1].any()


def test_predictor_returns_supervoxels_and_what_masks_say(weights: Path) -> None:
    image = block((5, 33, 33))
    predictor = AGQPredictor(weights, device="cpu", pieces="supervoxels", mask_weight=0.4)
    first, again = predictor.predict([image, image])
    assert np.array_equal(first.labels, supervoxels(first.affinities)[0])
    assert first.n_labels == first.labels.max()
    assert first.mask_weight == 0.4
    assert first.memberships is not None
    assert again.memberships is not None
    assert np.array_equal(first.memberships, again.memberships)
    queries = first.components - first.dropped + SMALL.learned_queries
    assert first.memberships.shape == (1 + first.n_labels, queries)
    # Background takes the rest of every voxel: 5 sections of 17 x 17 at most.
    assert 0 < first.memberships.sum() <= UNITS * 5 * 17 * 17 + queries * 5 * 17 * 17
    plain = AGQPredictor(weights, device="cpu").predict([image])[0]
    assert plain.memberships is None
    assert np.array_equal(plain.affinities, first.affinities)


def test_checkpoint_may_ask_for_supervoxels(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"pieces": "supervoxels", "mask_weight": 0.5})
    path = write_checkpoint(tmp_path / "pieces.safetensors", config)
    assert AGQPredictor(path, device="cpu").config.pieces == "supervoxels"
    assert AGQPredictor(path, device="cpu", pieces="masks").config.pieces == "masks"
    with pytest.raises(InputError, match=r"pieces: .*'masks' or 'supervoxels'"):
        AGQPredictor(path, device="cpu", pieces="blocks")  # type: ignore[arg-type]
