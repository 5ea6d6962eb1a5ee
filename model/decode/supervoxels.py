"""Supervoxels of a block, and how much of each mask is in every one.

Not part of the published method, and off unless asked for (`pieces` of the configuration). In the
published method a voxel belongs to its strongest mask. Masks of a small or briefly trained network
are vague, and the strongest of several vague ones changes from voxel to voxel; summed over a
supervoxel, what the masks say is far more certain. So here a block is cut by its affinities alone,
and masks speak for or against joining two supervoxels: the memberships of each go to the stitch.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from agq.model.decode.inference import MaskHead, connected_labels, voxel_chunks

UNITS = 2**16
"""Units of a membership in one voxel of a mask of certainty 1."""


def section_fragments(
    inplane: np.ndarray, *, boundary: float = 0.5, seed_distance: int = 10, grow: bool = False
) -> np.ndarray:
    """Cut one section into pieces inside its membranes: int32 (y, x), 0 outside.

    The usual first step after a network for affinities (Funke et al., TPAMI 2019): the distance to
    the border of the places with high affinity, its maxima as seeds, a watershed.

    Parameters
    ----------
    inplane : np.ndarray
        uint16 (y, x): sum of the two in-plane affinities as uint8 values, 0 to 510.
    boundary : float
        Mean in-plane affinity above which a voxel is inside a neurite.
    seed_distance : int
        Seeds are the maxima of the distance within windows of this many voxels.
    grow : bool
        Whether pieces also grow over the boundary, so that no voxel is left 0.
    """
    from skimage.segmentation import watershed

    inside = inplane > boundary * 510
    distance = ndimage.distance_transform_edt(inside)
    peaks = ndimage.maximum_filter(distance, seed_distance) == distance
    seeds, n = ndimage.label(peaks & inside)
    if n == 0:
        return np.zeros(inplane.shape, np.int32)
    if grow:
        # Outside, the way to the nearest inside goes downhill.
        distance = distance - ndimage.distance_transform_edt(~inside)
    return np.asarray(watershed(-distance, seeds, mask=None if grow else inside), np.int32)


def block_fragments(
    affinities: np.ndarray, *, boundary: float = 0.5, seed_distance: int = 10, grow: bool = False
) -> np.ndarray:
    """Cut every section of (3, z, y, x) uint8 affinities; see `section_fragments`.

    Labels, int64 (z, y, x), are unique in the block.
    """
    out = np.zeros(affinities.shape[1:], np.int64)
    last = 0
    for z in range(len(out)):
        inplane = affinities[1, z].astype(np.uint16) + affinities[2, z]
        labels = section_fragments(
            inplane, boundary=boundary, seed_distance=seed_distance, grow=grow
        )
        out[z] = np.where(labels > 0, labels.astype(np.int64) + last, 0)
        last += int(labels.max())
    return out


def supervoxels(affinities: np.ndarray) -> tuple[np.ndarray, int]:
    """Cut a block into supervoxels, section by section, by affinities (3, z, y, x) uint8.

    Returns
    -------
    labels : np.ndarray
        uint16 (z, y, x), or uint32 if there are more than 65535: 1, 2, ..., each one 6-connected
        piece of one section. 0 only in sections without any place of high affinity.
    n : int
        Number of supervoxels.
    """
    return connected_labels(block_fragments(affinities, grow=True))


def memberships(
    head: MaskHead, mask_features: Tensor, labels: np.ndarray, n_labels: int
) -> np.ndarray:
    """Add up the softmax of the masks over every supervoxel.

    Taken at the resolution of P1, a quarter of the voxels. A supervoxel without a voxel there has
    only zeros. Sums are of integers, so that their order, which a GPU does not keep, is no matter.

    Parameters
    ----------
    head : MaskHead
        The last prediction.
    mask_features : Tensor
        float32 (z1, y1, x1, C).
    labels : np.ndarray
        (z, y, x) supervoxels, 0 background.

    Returns
    -------
    np.ndarray
        int64 (1 + n_labels, queries), in 1/65536 of a voxel; row 0, of no supervoxel, is zero. The
        background has no column: that two pieces are not background joins nothing.
    """
    device = mask_features.device
    grid = np.ix_(
        *(
            np.minimum((np.arange(few) + 0.5) * (many / few), many - 1).astype(np.int64)
            for few, many in zip(mask_features.shape[:3], labels.shape, strict=True)
        )
    )
    rows = torch.from_numpy(labels[grid].reshape(-1).astype(np.int64)).to(device)
    features = mask_features.flatten(0, 2)
    total = torch.zeros((1 + n_labels, len(head.bias) - 1), dtype=torch.int64, device=device)
    for part in voxel_chunks(len(features), features):
        share = torch.softmax(head.logits(features[part]), 0)[1:]
        total.index_add_(0, rows[part], share.mul_(UNITS).round_().to(torch.int64).T)
    total[0] = 0
    return total.cpu().numpy()
