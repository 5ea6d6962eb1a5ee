"""Affinity-guided queries: seeds from affinities, region pooling, learned queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cc3d
import numpy as np
import torch
from torch import Tensor, nn

from agq.model.config import ModelConfig, SeedOrder
from agq.model.devices import CARD_VOXELS, on_card
from agq.model.network.blocks import ConvUnit


@dataclass(frozen=True)
class Seeds:
    """The regions of one block that become affinity-guided queries.

    Attributes
    ----------
    labels : Tensor
        int64 (z1, y1, x1): 0, or 1 + the rank of the query whose region this is.
    sizes : Tensor
        int64 (kept,): voxels of each region.
    components, dropped : int
        Regions large enough; those of them above the query limit.
    """

    labels: Tensor
    sizes: Tensor
    components: int
    dropped: int

    @property
    def kept(self) -> int:
        """Regions used."""
        return len(self.sizes)


def select_components(
    components: np.ndarray, min_voxels: int, limit: int, order: SeedOrder = "label"
) -> tuple[np.ndarray, int]:
    """Choose the connected components that become queries.

    Those of (z, y, x), 0 is background, with strictly more than `min_voxels`: the first `limit` by
    id, or the largest (equal sizes: by id).

    Returns
    -------
    chosen : np.ndarray
        int64 ids in query order.
    found : int
        How many components were large enough.
    """
    sizes = np.bincount(components.ravel(), minlength=1)
    sizes[0] = 0
    ids = np.flatnonzero(sizes > min_voxels)
    found = len(ids)
    if order == "largest":
        ids = ids[np.argsort(-sizes[ids], kind="stable")]
    return ids[:limit], found


def find_seeds(affinities: Tensor, config: ModelConfig) -> Seeds:
    """Find the seed regions of one block, from affinities (3, z1, y1, x1) in [0, 1].

    Foreground is where the mean affinity of a voxel exceeds the mean of the whole block; seeds are
    its 26-connected components. (The published code takes the mean over the batch; per block, a
    result does not depend on what else is in the batch.)
    """
    return seeds_in(
        foreground(affinities).cpu().numpy(),
        config,
        lambda array: torch.from_numpy(array).to(affinities.device),
    )


def foreground(affinities: Tensor) -> Tensor:
    """Return where seeds are looked for, bool (z1, y1, x1); see `find_seeds`."""
    a = affinities.float()
    return a.mean(0) > a.mean()


def seeds_in(
    foreground: np.ndarray, config: ModelConfig, send: Callable[[np.ndarray], Tensor]
) -> Seeds:
    """Find the seed regions in the foreground (z1, y1, x1) of a block.

    ``send`` copies an array to the device of the block.
    """
    components = cc3d.connected_components(foreground, connectivity=26)
    ids, found = select_components(
        components, config.min_seed_voxels, config.max_seeds, config.seed_order
    )
    return seeds_from_components(components, ids, found, send)


def seeds_from_components(
    components: np.ndarray,
    ids: np.ndarray,
    found: int,
    send: Callable[[np.ndarray], Tensor] = torch.from_numpy,
) -> Seeds:
    """Turn chosen component ids (in query order) into `Seeds`; for ``send`` see `seeds_in`."""
    rank = np.zeros(int(components.max(initial=0)) + 1, np.int64)
    rank[ids] = np.arange(1, len(ids) + 1)
    sizes = np.bincount(components.ravel(), minlength=len(rank))[ids]
    return Seeds(send(rank[components]), send(sizes), found, found - len(ids))


def region_means(features: Tensor, seeds: Seeds) -> Tensor:
    """Mean of the features (C, z1, y1, x1) over each seed region: float32 (kept, C).

    Matrix products with the one-hot regions, of a section on a CPU and of many on a card:
    deterministic on every device (scattered adds on a GPU are not), differentiable, and bounded in
    memory.
    """
    ranks = torch.arange(1, seeds.kept + 1, device=features.device)[:, None]
    total: Tensor | None = None
    plane = features.shape[2] * features.shape[3]
    sections = max(1, CARD_VOXELS // plane) if on_card(features) else 1
    for z in range(0, features.shape[1], sections):
        part = slice(z, z + sections)
        one_hot = (seeds.labels[part].flatten() == ranks).to(features.dtype)
        found = one_hot @ features[:, part].flatten(1).T
        total = found if total is None else total + found
    assert total is not None
    return total / seeds.sizes[:, None]


class QueryHead(nn.Module):
    """Instance features, learned queries and the first prediction's kernel (key ``rpn``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.embed_dim
        self.inst_convs = nn.Sequential(
            *(ConvUnit(c if i else c + 3, c) for i in range(config.branch_layers))
        )
        self.learned_masks_embed = nn.Embedding(config.learned_queries, c)
        self.mask_kernel = nn.Linear(c, c)
        self.norm_logits = nn.BatchNorm2d(1, eps=1e-3, momentum=0.01)
        self.norm_kernel = nn.BatchNorm1d(c, eps=1e-3, momentum=0.01)

    def queries(self, features: Tensor, seeds: Seeds) -> Tensor:
        """Return (kept + learned, C): affinity-guided queries, then the learned ones.

        ``features`` are the instance features (C, z1, y1, x1) of one item.
        """
        learned = self.learned_masks_embed.weight
        if not seeds.kept:
            return learned
        return torch.cat([region_means(features, seeds), learned])

    def kernels(self, queries: Tensor) -> Tensor:
        """Return the mask kernels (Q, C) of queries (Q, C)."""
        kernels: Tensor = self.norm_kernel(self.mask_kernel(queries))
        return kernels
