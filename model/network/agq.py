"""The AGQ network: wires backbone, branches, queries and decoder.

Chen, Tang, Li & Hu, "Efficient Neuron Segmentation in Electron Microscopy by
Affinity-Guided Queries", ICLR 2025. The names of parameters are those of the published
state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agq.model.config import ModelConfig
from agq.model.network.backbone import Backbone, FusionBlock
from agq.model.network.blocks import ConvBranch, ReplicateConv3d, coordinates
from agq.model.network.decoder import MaskDecoder
from agq.model.network.queries import find_seeds


@dataclass(frozen=True)
class AGQOutput:
    """Everything the losses need.

    Attributes
    ----------
    affinity_logits : Tensor
        (B, 3, z1, y1, x1) at the resolution of P1; channel c at a voxel is the affinity to its
        previous voxel on axis c of (z, y, x).
    predictions : list of list of Tensor
        ``predictions[k][b]``: mask logits (1 + Q_b, z1, y1, x1) of prediction k (0 is the first,
        before any iteration) of item b; channel 0 is the background logit, then the
        affinity-guided queries, then the learned ones.
    mask_features : Tensor
        (B, C, z1, y1, x1), as the mask branch gives them; the decoder scales them to unit length
        along C.
    n_seeds, components, dropped : list of int
        Per item: affinity-guided queries, components large enough, components dropped by the
        limit on queries.
    """

    affinity_logits: Tensor
    predictions: list[list[Tensor]]
    mask_features: Tensor
    n_seeds: list[int]
    components: list[int]
    dropped: list[int]


class AGQ(Backbone):
    """The network; ``AGQ(config)`` has the published state-dict keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        c = config.embed_dim
        self.fusion_block = FusionBlock(config)
        self.inst_decoder = MaskDecoder(config)
        self.mask_branch = ConvBranch(c + 3, c, c, config.branch_layers, (1, 3, 3))
        self.affinity_branch = ConvBranch(c + 3, c, 3, config.branch_layers, (3, 3, 3))

    def freeze(self, dtype: torch.dtype = torch.float32) -> AGQ:
        """Make once what is the same for every block; parameters must not change after it.

        With a `dtype` other than float32 the network must be used under autocast to it.
        """
        self.inst_decoder.freeze()
        for module in self.modules():
            if isinstance(module, ReplicateConv3d):
                module.freeze(dtype)
        return self

    def forward(self, x: Tensor, *, only_last: bool = False) -> AGQOutput:
        """Run the network on normalised images.

        Parameters
        ----------
        x : Tensor
            float32 (B, 1, z, y, x), (raw / max - 0.5) / 0.5.
        only_last : bool
            Return the last prediction alone (``predictions`` has one entry).

        Returns
        -------
        AGQOutput
            Seeds are taken from the detached predicted affinities, in training as at inference.
        """
        fused = self.fusion_block(self.pyramid(x))
        grid = coordinates(fused.shape[2:], fused).expand(len(fused), -1, -1, -1, -1)
        features = torch.cat([grid, fused], dim=1)
        affinity_logits = self.affinity_branch(features)
        mask_features = self.mask_branch(features)
        unit_features = F.normalize(mask_features, dim=1)
        instance_features = self.inst_decoder.rpn.inst_convs(features)
        affinities = torch.sigmoid(affinity_logits.detach().float())
        seeds = [find_seeds(a, self.config) for a in affinities]
        items = []
        for b, item_seeds in enumerate(seeds):
            queries = self.inst_decoder.rpn.queries(instance_features[b], item_seeds)
            predictions = self.inst_decoder(queries, instance_features[b], unit_features[b])
            items.append(predictions[-1:] if only_last else predictions)
        return AGQOutput(
            affinity_logits=affinity_logits,
            predictions=[list(p) for p in zip(*items, strict=True)],
            mask_features=mask_features,
            n_seeds=[s.kept for s in seeds],
            components=[s.components for s in seeds],
            dropped=[s.dropped for s in seeds],
        )
