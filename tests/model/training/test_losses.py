"""Matching and losses against their definitions, written as slow loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from agq.model.training.config import LossWeights
from agq.model.training.data.targets import Targets
from agq.model.training.losses.losses import (
    affinity_loss,
    channel_targets,
    cross_entropy,
    dice_loss,
    discrimination_loss,
    item_losses,
)
from agq.model.training.losses.matching import dice_scores, match

SHAPE = (2, 3, 4)


def dice(p: torch.Tensor, t: torch.Tensor) -> float:
    top = bottom = 0.0
    for a, b in zip(p.flatten().tolist(), t.flatten().tolist(), strict=True):
        top += 2 * a * b
        bottom += a * a + b * b
    return top / bottom


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def masks() -> torch.Tensor:
    return torch.rand((4, *SHAPE), generator=torch.Generator().manual_seed(1)).softmax(0)


def test_dice_scores_by_the_definition(logits: torch.Tensor, masks: torch.Tensor) -> None:
    p = logits.softmax(0)[1:]
    scores = dice_scores(p, masks)
    for q, n in itertools.product(range(5), range(4)):
        assert float(scores[q, n]) == pytest.approx(dice(p[q], masks[n]), rel=1e-5)


def test_matching_is_the_best_of_all_assignments(logits: torch.Tensor, masks: torch.Tensor) -> None:
    queries, instances = match(logits, masks)
    scores = dice_scores(logits.softmax(0)[1:], masks)
    best = max(
        sum(float(scores[q, n]) for n, q in enumerate(order))
        for order in itertools.permutations(range(5), 4)
    )
    assert sorted(instances.tolist()) == [0, 1, 2, 3]
    assert float(scores[queries, instances].sum()) == pytest.approx(best)


def test_matching_never_takes_the_background(masks: torch.Tensor) -> None:
    logits = torch.full((3, *SHAPE), -5.0)
    logits[0] = 5.0
    queries, instances = match(logits, masks)
    assert len(queries) == len(instances) == 2
    assert set(queries.tolist()) == {0, 1}


def test_dice_loss_by_the_definition(logits: torch.Tensor, masks: torch.Tensor) -> None:
    p = logits.softmax(0)[1:5]
    expected = np.sum([1 - dice(a, b) for a, b in zip(p, masks, strict=True)])
    assert float(dice_loss(p, masks)) == pytest.approx(float(expected), rel=1e-5)
    assert float(dice_loss(p[:0], masks[:0])) == 0.0


def test_cross_entropy_by_the_definition(logits: torch.Tensor, masks: torch.Tensor) -> None:
    queries, instances = torch.tensor([4, 0, 2]), torch.tensor([1, 0, 3])
    wanted = channel_targets(6, masks, queries, instances)
    total = 0.0
    for v in np.ndindex(SHAPE):
        weights = [math.exp(float(logits[(c, *v)])) for c in range(6)]
        target = [0.0] * 6
        for q, n in zip(queries.tolist(), instances.tolist(), strict=True):
            target[q + 1] = float(masks[(n, *v)])
        target[0] = 1 - sum(target)
        total -= sum(t * math.log(w / sum(weights)) for t, w in zip(target, weights, strict=True))
    found = cross_entropy(logits.log_softmax(0), wanted)
    assert float(found) == pytest.approx(total / math.prod(SHAPE), rel=1e-5)


def test_discrimination_by_the_definition() -> None:
    features = torch.nn.functional.normalize(
        torch.randn((7, 5), generator=torch.Generator().manual_seed(2)), dim=1
    )
    owners = [0, 1, 0, 2, 1, 0, 3]
    per_voxel = []
    for a in range(7):
        positives = [b for b in range(7) if owners[b] == owners[a]]
        scale = sum(math.exp(float(features[a] @ features[b]) / 0.3) for b in range(7))
        terms = [
            -math.log(math.exp(float(features[a] @ features[b]) / 0.3) / scale) for b in positives
        ]
        per_voxel.append(sum(terms) / len(terms))
    found = discrimination_loss(features, torch.tensor(owners), 0.3)
    assert float(found) == pytest.approx(sum(per_voxel) / 7, rel=1e-5)
    none = torch.zeros(0, dtype=torch.long)
    assert discrimination_loss(features[:0], none, 0.3).item() == 0.0


def test_affinity_loss_by_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((3, *SHAPE), generator=generator) * 3
    wanted = torch.rand((3, *SHAPE), generator=generator)
    total = 0.0
    for a, t in zip(logits.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-a))
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    expected = total / logits.numel()
    assert float(affinity_loss(logits, wanted)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", ["published", "ours"])
def test_total_is_the_weighted_sum_over_all_predictions(
    logits: torch.Tensor, masks: torch.Tensor, form: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    whole = torch.rand(SHAPE, generator=generator) < 0.5
    masks = masks * (0.7 + 0.31 * whole)  # some of the other voxels is left to the background
    predictions = [logits, logits.flip(1) * 0.5, logits * 1.5]
    affinity_logits = torch.randn((3, *SHAPE), generator=generator)
    features = torch.randn((5, *SHAPE), generator=generator) * 3
    samples = torch.tensor([0, 3, 7, 11, 23, 3])
    targets = Targets(
        torch.rand((3, *SHAPE), generator=generator),
        masks,
        samples,
        masks.flatten(1)[:, samples].argmax(0),
    )
    weights = LossWeights.model_validate(
        {
            "preset": form,
            "dice": 2,
            "cross_entropy": 0.5,
            "discrimination": 0.25,
            "affinity": 4,
            "zero_background": 3,
            "background_weight": 2,
        }
    )
    total, terms = item_losses(affinity_logits, predictions, features, targets, weights)
    queries, instances = match(logits, masks)  # of the first prediction, for all three
    wanted = channel_targets(6, masks, queries, instances)
    expected = 4 * affinity_loss(affinity_logits, targets.affinities)
    for prediction in predictions:
        matched = prediction.softmax(0)[queries + 1]
        if form == "published":
            expected = expected + 2 * dice_loss(matched * whole, masks[instances]) / 6
        else:
            expected = expected + 2 * dice_loss(matched, masks[instances]) / 4
        expected = expected + 0.5 * cross_entropy(prediction.log_softmax(0), wanted)
    flat = predictions[-1].clone()
    flat[0] = 0
    per_channel = wanted * flat.log_softmax(0)
    expected = expected - 3 * (2 * per_channel[0] + per_channel[1:].sum(0)).mean()
    seen = features.flatten(1)[:, samples].T
    if form == "ours":
        seen = torch.nn.functional.normalize(seen, dim=1)
    expected = expected + 0.25 * discrimination_loss(seen, targets.sample_instances, 0.3)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert terms["loss"] == pytest.approx(float(total))


def test_a_crop_without_instances_still_trains_affinities(logits: torch.Tensor) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    targets = Targets(torch.zeros((3, *SHAPE)), torch.zeros((0, *SHAPE)), none, none)
    logits = logits.requires_grad_()
    affinity_logits = torch.zeros((3, *SHAPE), requires_grad=True)
    total, _ = item_losses(
        affinity_logits, [logits, logits], torch.ones((2, *SHAPE)), targets, LossWeights()
    )
    total.backward()
    assert logits.grad is not None
    assert affinity_logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert float(affinity_logits.grad.abs().sum()) > 0


def test_what_is_not_valid_does_not_count(logits: torch.Tensor, masks: torch.Tensor) -> None:
    """The losses of the valid part alone, and no gradient elsewhere."""
    generator = torch.Generator().manual_seed(5)
    valid = torch.zeros(SHAPE, dtype=torch.bool)
    valid[:, 1:, :3] = True
    affinity_logits = torch.randn((3, *SHAPE), generator=generator).requires_grad_()
    logits = logits.requires_grad_()
    none = torch.zeros(0, dtype=torch.int64)
    wanted = torch.rand((3, *SHAPE), generator=generator)
    features = torch.ones((2, *SHAPE))
    # The crop's part has fewer voxels, so it is compared in the form that has no border.
    weights = LossWeights(zero_background=1, background_weight=3, dice_on_borders=True)
    targets = Targets(wanted, masks * valid, none, none, valid, valid.expand(3, *SHAPE))
    total, terms = item_losses(affinity_logits, [logits, logits], features, targets, weights)
    total.backward()
    part = (slice(None), slice(None), slice(1, None), slice(None, 3))
    alone, expected = item_losses(
        affinity_logits.detach()[part],
        [logits.detach()[part]] * 2,
        features[part],
        Targets(wanted[part], masks[part], none, none),
        weights,
    )
    assert terms == pytest.approx(expected, rel=1e-5)
    assert float(total.detach()) == pytest.approx(float(alone), rel=1e-5)
    for gradient in (logits.grad, affinity_logits.grad):
        assert gradient is not None
        assert float(gradient[:, ~valid].abs().max()) == 0
        assert float(gradient[:, valid].abs().max()) > 0
