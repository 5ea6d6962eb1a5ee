"""Which query answers for which instance: one Hungarian matching on dice scores."""

import torch
from scipy.optimize import linear_sum_assignment


def dice_scores(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the dice score, in [0, 1], of every query with every instance: (Q, N).

    dice(p, t) = 2 sum(p t) / (sum(p^2) + sum(t^2)), the form of SOLO, CondInst and K-Net, of
    softmaxed masks (Q, ...) without the background and target masks (N, ...).
    """
    p, t = probabilities.flatten(1), masks.flatten(1)
    total = p.square().sum(1)[:, None] + t.square().sum(1)[None, :]
    return 2.0 * (p @ t.T) / total.clamp_min(1e-6)


@torch.no_grad()
def match(
    logits: torch.Tensor, masks: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign queries to instances so that the sum of their dice scores is greatest.

    Parameters
    ----------
    logits : torch.Tensor
        (1 + Q, z1, y1, x1) mask logits, channel 0 the background.
    masks, valid : torch.Tensor
        (N, z1, y1, x1) target masks, and (z1, y1, x1) bool: voxels that count; None: all.

    Returns
    -------
    queries, instances : torch.Tensor
        (M,) int64 each, M = min(Q, N); query q is channel q + 1 of `logits`.
    """
    probabilities = logits.float().softmax(0)[1:]
    scores = dice_scores(probabilities if valid is None else probabilities * valid, masks)
    rows, columns = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
    return torch.as_tensor(rows, device=logits.device), torch.as_tensor(
        columns, device=logits.device
    )
