"""From an image to labels: the decoder and the masks, without any full-size softmax tensor.

Every mask logit is a scaled product of a query's kernel with a voxel's mask features, so
logits are made for a few thousand voxels at a time and used while they are in the cache.
Upsampling is linear as well: it is the features (C channels) that are resized, not the logits
(up to 201).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agq.model.devices import CARD_VOXELS, on_card
from agq.model.network.agq import AGQ
from agq.model.network.blocks import coordinates
from agq.model.network.decoder import MaskPredictor
from agq.model.network.queries import Seeds, find_seeds

# In a chunk of voxels, channels whose logit nowhere comes within this much of the least winning
# logit are left out of the softmax: all 10^6 voxels of a block together give such a channel less
# than 0.003 voxels of mass.
NEGLIGIBLE = 20.0


@dataclass(frozen=True)
class DenseMaps:
    """What the convolutional part makes of one block, at the resolution of P1.

    Attributes
    ----------
    affinity_logits : Tensor
        float32 (3, z1, y1, x1).
    mask_features : Tensor
        float32 (z1, y1, x1, C), of unit length along C.
    instance_features : Tensor
        float32 (z1, y1, x1, C).
    """

    affinity_logits: Tensor
    mask_features: Tensor
    instance_features: Tensor

    def total(self) -> Tensor:
        """Return a number that is finite if every value is; float16 convolutions may overflow."""
        return self.affinity_logits.sum() + self.mask_features.sum() + self.instance_features.sum()


@dataclass(frozen=True)
class MaskHead:
    """Linear map from mask features to the logits of one prediction.

    Attributes
    ----------
    weight : Tensor
        float32 (Q, C), or (1 + Q, C) with the background: row 0 and its bias are then zero; the
        published inference sets the background logit of the last prediction to zero.
    bias : Tensor
        float32 (1 + Q, 1); (1, 1) without the background.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return (rows of the weight, voxels) for mask features (voxels, C)."""
        return torch.addmm(self.bias, self.weight, features.T)

    def select(self, channels: Tensor) -> MaskHead:
        """Return the map to some of the channels."""
        return MaskHead(self.weight[channels], self.bias[channels])

    def with_background(self) -> MaskHead:
        """Add the background, to a map without it."""
        bias = self.bias.expand(len(self.weight), 1)
        return MaskHead(F.pad(self.weight, (0, 0, 1, 0)), F.pad(bias, (0, 0, 1, 0)))


def dense_maps(model: AGQ, image: Tensor) -> DenseMaps:
    """Run backbone, fusion and branches on one normalised block (z, y, x).

    The plain form, for any device and under autocast; results are float32.
    """
    features = _branch_features(model, image)
    affinity = model.affinity_branch(features)[0].float()
    masks = model.mask_branch.flat(features)[0].float()
    instances = model.inst_decoder.rpn.inst_convs(features)[0].float()
    return DenseMaps(
        affinity,
        F.normalize(masks, dim=0).permute(1, 2, 3, 0).contiguous(),
        instances.permute(1, 2, 3, 0).contiguous(),
    )


def _branch_features(model: AGQ, image: Tensor) -> Tensor:
    """Return what the branches read of one normalised block: (1, 3 + C, z1, y1, x1)."""
    fused = model.fusion_block(model.pyramid(image[None, None]))
    return torch.cat([coordinates(fused.shape[2:], fused), fused], dim=1)


def decode(model: AGQ, maps: DenseMaps, seeds: Seeds) -> MaskHead:
    """Run the queries of one block through the decoder and return its last prediction."""
    decoder = model.inst_decoder
    queries = decoder.rpn.queries(maps.instance_features.permute(3, 0, 1, 2), seeds)
    folded = decoder.folded_norms()
    head = _query_head(decoder.rpn.kernels(queries), *folded[0])
    pixels, pooled_from = (
        in_parts(volume.flatten(0, 2), 0) for volume in (maps.mask_features, maps.instance_features)
    )
    for i, predictor in enumerate(decoder.predictors):
        assert isinstance(predictor, MaskPredictor)
        pooled = torch.zeros_like(queries)
        for part, instances in zip(pixels, pooled_from, strict=True):
            logits = head.logits(part)
            share = logits.sub_(logits.amax(0)).exp_()
            pooled.addmm_(share, instances / share.sum(0)[:, None])
        queries = decoder.refine(i, pooled, queries)
        head = _query_head(predictor.kernels(queries), *folded[i + 1])
    return head.with_background()


def _query_head(kernels: Tensor, scale: Tensor, shift: Tensor) -> MaskHead:
    """Fold the scalar norm of the logits into kernels (Q, C)."""
    return MaskHead(kernels * scale, shift)


def voxel_chunks(n: int, like: Tensor) -> Iterator[slice]:
    """Cut n voxels into chunks whose logits stay in the cache of a CPU, or fit a card.

    The chunks depend on nothing but n and the kind of device of `like`, and so do the sums over
    them.
    """
    step = _step(like)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def in_parts(voxels: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Cut the voxels, on one axis of a tensor, as `voxel_chunks` does."""
    return voxels.split(_step(voxels), dim)


def _step(like: Tensor) -> int:
    return CARD_VOXELS if on_card(like) else 2048


class Upsampler:
    """Trilinear resizing (align_corners=False) of a channels-last volume, section by section."""

    def __init__(self, volume: Tensor, size: tuple[int, int, int]) -> None:
        self.volume = volume  # (z1, y1, x1, C)
        self.size = size
        # Source sections and the weight of the second, as in torch's linear resizing.
        scale, last = np.float32(len(volume) / size[0]), len(volume) - 1
        source = (np.arange(size[0], dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
        source = source.clip(min=0)
        first = source.astype(np.int64).clip(max=last)
        self.sections = [
            (i, min(i + 1, last), w)
            for i, w in zip(first.tolist(), (source - first).tolist(), strict=True)
        ]

    def section(self, z: int) -> Tensor:
        """Return section z of the resized volume, (y, x, C)."""
        first, second, weight = self.sections[z]
        plane = self.volume[first]
        if weight:
            plane = torch.lerp(plane, self.volume[second], weight)
        if tuple(plane.shape[:2]) != self.size[1:]:
            plane = F.interpolate(
                plane[None].permute(0, 3, 1, 2), size=self.size[1:], mode="bilinear"
            )[0].permute(1, 2, 0)
        return plane.contiguous()


def assign_voxels(
    head: MaskHead, mask_features: Tensor, size: tuple[int, int, int], min_mass: float
) -> tuple[Tensor, Tensor]:
    """Give every voxel of a block its channel.

    The published rule: softmax over channels of the logits resized to the block; a channel whose
    mass over the block is below ``min_mass`` is zeroed, the others are not renormalised; argmax,
    ties to the lowest channel. Zeroing never changes the order of the channels that are left,
    so the argmax is taken of the logits, and only voxels won by a zeroed channel are looked at
    twice.

    Parameters
    ----------
    head : MaskHead
        The last prediction.
    mask_features : Tensor
        float32 (z1, y1, x1, C).
    size : tuple of int
        Shape (z, y, x) of the block.
    min_mass : float
        In voxels.

    Returns
    -------
    channels : Tensor
        int16 (z, y, x): 0 background, else 1 + query.
    mass : Tensor
        float32 (1 + Q,): softmax mass per channel, in voxels.
    """
    if on_card(mask_features):
        return assign_on_card(head, mask_features, size, min_mass)
    upsampler = Upsampler(mask_features, size)
    winners = torch.empty(size, dtype=torch.int16)
    mass = torch.zeros(len(head.bias), dtype=torch.float32)
    for z in range(size[0]):
        features = upsampler.section(z).flatten(0, 1)
        flat = winners[z].view(-1)
        for part in voxel_chunks(len(features), features):
            logits = head.logits(features[part])
            peak = logits.amax(0)
            strongest, least = logits.amax(1), peak.min()
            able = (strongest >= least).nonzero()[:, 0]
            flat[part] = able[first_equal(logits[able], peak)].to(flat.dtype)
            noticeable = (strongest >= least - NEGLIGIBLE).nonzero()[:, 0]
            share = logits[noticeable].sub_(peak).exp_()
            mass.index_add_(0, noticeable, share @ share.sum(0).reciprocal_())
    kept = mass >= min_mass
    if not bool(kept.all()):
        _replace_winners(winners, upsampler, head, kept)
    return winners, mass


def assign_on_card(
    head: MaskHead, mask_features: Tensor, size: tuple[int, int, int], min_mass: float
) -> tuple[Tensor, Tensor]:
    """Give every voxel of a block its channel, as `assign_voxels` does, for a device of its own.

    A card waits for its host, and not for memory: operators are as few as can be, on all voxels of
    the block or many of them, and the host is asked for nothing.
    """
    features = in_parts(_resized(mask_features.permute(3, 0, 1, 2), size).flatten(1), 1)
    masses = []
    for part in features:
        logits = torch.addmm(head.bias, head.weight, part)
        share = logits.sub_(logits.amax(0)).exp_()
        masses.append(share @ share.sum(0).reciprocal_())
    mass = reduce(torch.add, masses)
    # A channel without the mass loses everywhere; where there is no other, the first one wins.
    bias = head.bias.masked_fill((mass < min_mass)[:, None], -torch.inf)
    winners = [torch.addmm(bias, head.weight, part).argmax(0) for part in features]
    return torch.cat(winners).to(torch.int16).view(size), mass


def _resized(volume: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return (C, z, y, x) of a volume (C, z1, y1, x1): trilinear, align_corners=False."""
    if tuple(volume.shape[1:]) == size:
        return volume.contiguous()
    return F.interpolate(volume[None].contiguous(), size=size, mode="trilinear")[0]


def first_equal(rows: Tensor, values: Tensor) -> Tensor:
    """Return per column of (n, voxels) the first row that equals the column's value (voxels,).

    With the maxima it is argmax, ties to the lowest row, several times as fast on the CPU.
    """
    places = torch.arange(len(rows), 0, -1, dtype=rows.dtype, device=rows.device)[:, None]
    return len(rows) - ((rows == values) * places).amax(0).long()


def _replace_winners(winners: Tensor, upsampler: Upsampler, head: MaskHead, kept: Tensor) -> None:
    """Give the voxels won by a zeroed channel to the best of the others, or to none."""
    channels = kept.nonzero()[:, 0]
    few = head.select(channels)
    for z in range(len(winners)):
        flat = winners[z].view(-1)
        again = (~kept[flat.long()]).nonzero()[:, 0]
        if not len(channels):
            flat[again] = 0
        elif len(again):
            features = upsampler.section(z).flatten(0, 1)
            for part in voxel_chunks(len(again), flat):
                logits = few.logits(features[again[part]])
                flat[again[part]] = channels[first_equal(logits, logits.amax(0))].to(flat.dtype)


def resized_affinities(logits: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return affinities float32 (3, z, y, x) of logits (3, z1, y1, x1): sigmoid, then resizing."""
    if on_card(logits):
        return _resized(torch.sigmoid(logits), size)
    upsampler = Upsampler(torch.sigmoid(logits).permute(1, 2, 3, 0).contiguous(), size)
    sections = [upsampler.section(z) for z in range(size[0])]
    return torch.stack(sections).permute(3, 0, 1, 2).contiguous()


def quantised(affinities: Tensor) -> Tensor:
    """Return affinities in [0, 1] as uint8, rint(a * 255); the tensor given is used up."""
    return affinities.mul_(255).round_().to(torch.uint8)


def affinity_logits(model: AGQ, image: Tensor) -> Tensor:
    """Return the affinity logits float32 (3, z1, y1, x1) of one normalised block, and no more."""
    return model.affinity_branch(_branch_features(model, image))[0].float()


def connected_labels(channels: np.ndarray) -> tuple[np.ndarray, int]:
    """Give each 6-connected piece of each channel (z, y, x) its own label; 0 is background.

    Returns
    -------
    labels : np.ndarray
        uint16 (z, y, x): 1, 2, ... in raster order of the first voxel of each piece. uint32 if
        there are more than 65535 pieces, as noise-like masks can have: nothing is lost.
    n : int
        Number of labels.
    """
    labels, n = cc3d.connected_components(channels, connectivity=6, return_N=True)
    return labels.astype(np.uint16 if n <= np.iinfo(np.uint16).max else np.uint32), int(n)


def seeds_of(model: AGQ, maps: DenseMaps) -> Seeds:
    """Find the seeds of one block from its affinity logits."""
    return find_seeds(torch.sigmoid(maps.affinity_logits), model.config)
