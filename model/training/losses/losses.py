"""The losses of AGQ training, over all predictions of the decoder.

`LossWeights` chooses between the published form and what short trainings on a CPU do better with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from agq.model.training.config import LossWeights
from agq.model.training.data.targets import Targets
from agq.model.training.losses.matching import match


def dice_loss(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the sum over pairs of 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)).

    `probabilities` (M, ...) are the softmaxed masks of the matched queries, `masks` their targets.
    """
    if probabilities.shape[0] == 0:
        return probabilities.sum()
    p, t = probabilities.flatten(1), masks.flatten(1)
    overlap = 2.0 * (p * t).sum(1)
    total = (p.square().sum(1) + t.square().sum(1)).clamp_min(1e-6)
    return (1.0 - overlap / total).sum()


def channel_targets(
    channels: int, masks: torch.Tensor, queries: torch.Tensor, instances: torch.Tensor
) -> torch.Tensor:
    """Spread the matched masks over the channels; what no matched mask claims is background.

    Of target masks (N, z1, y1, x1) and a matching (M,), return (channels, z1, y1, x1) float32 that
    sums to 1 over the 1 + Q channels.
    """
    out = masks.new_zeros((channels, *masks.shape[1:]))
    out[queries + 1] = masks[instances]
    out[0] = (1.0 - out[1:].sum(0)).clamp_min(0.0)
    return out


def mean_over(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of values where `valid` (same shape, bool); of all for None; 0 for none."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.sum().clamp_min(1)


def cross_entropy(
    log_probabilities: torch.Tensor,
    targets: torch.Tensor,
    background_weight: float = 1.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean over voxels of - sum over channels of target * log probability.

    Both are (channels, z1, y1, x1); channel 0 counts `background_weight` times. Only voxels where
    `valid` (z1, y1, x1), bool, count; None: all.
    """
    total = (targets * log_probabilities).sum(0)
    if background_weight != 1.0:
        total = total + (background_weight - 1.0) * targets[0] * log_probabilities[0]
    return -mean_over(total, valid)


def discrimination_loss(
    features: torch.Tensor, instances: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Pull features of the same instance together and push others apart.

    For voxel a with all sampled voxels b, itself among them: the mean over b of the same instance
    of -log softmax over b of (f_a . f_b / temperature), averaged over a (Wang et al.,
    Max-DeepLab, CVPR 2021, pixel-wise instance discrimination).

    Parameters
    ----------
    features : torch.Tensor
        (K, C) features.
    instances : torch.Tensor
        (K,) int64.

    Returns
    -------
    torch.Tensor
        Scalar; 0 without voxels.
    """
    if features.shape[0] == 0:
        return features.sum()
    log_probability = (features @ features.T / temperature).log_softmax(1)
    same = instances[:, None] == instances[None, :]
    return -((log_probability * same).sum(1) / same.sum(1)).mean()


def affinity_loss(
    logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean binary cross-entropy of affinity logits (3, z1, y1, x1), where valid."""
    return mean_over(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), valid)


def item_losses(
    affinity_logits: torch.Tensor,
    predictions: Sequence[torch.Tensor],
    mask_features: torch.Tensor,
    targets: Targets,
    weights: LossWeights,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute the weighted loss of one item of a batch.

    The matching is made once, on the first prediction, and used for all of them; dice and
    cross-entropy are summed over the predictions. A second cross-entropy, off by default, looks at
    the last prediction with the background logit at 0, which is what inference does.

    Parameters
    ----------
    affinity_logits : torch.Tensor
        (3, z1, y1, x1).
    predictions : sequence of torch.Tensor
        Mask logits (1 + Q, z1, y1, x1) of every iteration, first to last, channel 0 background.
    mask_features : torch.Tensor
        (C, z1, y1, x1), as the mask branch gives them.

    Returns
    -------
    total : torch.Tensor
        Scalar with gradient.
    terms : dict of str to float
        Each unweighted term (sum over predictions) and the dice of the last prediction.
    """
    valid = targets.valid
    queries, instances = match(predictions[0], targets.masks, valid)
    wanted = channel_targets(len(predictions[0]), targets.masks, queries, instances)
    counted = valid if weights.dice_on_borders else targets.masks.sum(0) >= 1.0
    shares = len(queries) if weights.dice_mean == "pairs" else len(predictions[0])
    dices, entropies = [], []
    for logits in predictions:
        log_probabilities = logits.float().log_softmax(0)
        matched = log_probabilities[queries + 1].exp()
        if counted is not None:
            matched = matched * counted
        dices.append(dice_loss(matched, targets.masks[instances]) / max(1, shares))
        entropies.append(cross_entropy(log_probabilities, wanted, valid=valid))
    flat = torch.cat([torch.zeros_like(predictions[-1][:1]), predictions[-1][1:]])
    zero_background = cross_entropy(
        flat.float().log_softmax(0), wanted, weights.background_weight, valid
    )
    sampled = mask_features.flatten(1)[:, targets.samples].T.float()
    if weights.features == "unit":
        sampled = F.normalize(sampled, dim=1)
    terms = {
        "dice": _total(dices),
        "cross_entropy": _total(entropies),
        "discrimination": discrimination_loss(
            sampled, targets.sample_instances, weights.temperature
        ),
        "affinity": affinity_loss(
            affinity_logits.float(), targets.affinities, targets.affinities_valid
        ),
        "zero_background": zero_background,
    }
    total = _total([getattr(weights, name) * term for name, term in terms.items()])
    shown = {"loss": total, "dice_last": dices[-1], **terms}
    return total, {name: float(term.detach()) for name, term in shown.items()}


def _total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add up, first to last: another order would round otherwise."""
    total = torch.zeros((), device=terms[0].device)
    for term in terms:
        total = total + term
    return total
