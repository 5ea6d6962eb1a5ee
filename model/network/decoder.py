"""The mask decoder: kernel update, self-attention among queries, mask prediction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agq.model.config import ModelConfig
from agq.model.network.blocks import ConvUnit
from agq.model.network.queries import QueryHead


class KernelUpdate(nn.Module):
    """Gated update of queries by what their masks cover (Zhang et al., K-Net, NeurIPS 2021)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dynamic_layer = nn.Linear(channels, 2 * channels)
        self.input_layer = nn.Linear(channels, 2 * channels)
        self.input_gate = nn.Linear(channels, channels)
        self.update_gate = nn.Linear(channels, channels)
        self.norm_in = nn.LayerNorm(channels)
        self.norm_out = nn.LayerNorm(channels)
        self.input_norm_in = nn.LayerNorm(channels)
        self.input_norm_out = nn.LayerNorm(channels)
        self.fc_layer = nn.Linear(channels, channels)
        self.fc_norm = nn.LayerNorm(channels)

    def forward(self, pooled: Tensor, queries: Tensor) -> Tensor:
        """Update queries (Q, C) by the features pooled under their masks (Q, C)."""
        param_in, param_out = self.dynamic_layer(pooled).chunk(2, dim=-1)
        input_in, input_out = self.input_layer(queries).chunk(2, dim=-1)
        gate = input_in * param_in
        input_gate = torch.sigmoid(self.input_norm_in(self.input_gate(gate)))
        update_gate = torch.sigmoid(self.norm_in(self.update_gate(gate)))
        out = update_gate * self.norm_out(param_out) + input_gate * self.input_norm_out(input_out)
        return F.relu(self.fc_norm(self.fc_layer(out)))


class SelfAttention(nn.Module):
    """Multi-head self-attention over queries (Q, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(channels, 3 * channels)
        self.c_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (Q, C) to (Q, C)."""
        n, c = x.shape
        qkv = self.c_attn(x).view(1, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.c_proj(out.transpose(1, 2).reshape(n, c))
        return projected


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(channels, ratio * channels)
        self.c_proj = nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (Q, C) to (Q, C)."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class QueryInteraction(nn.Module):
    """Post-norm transformer block over queries."""

    def __init__(self, channels: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels)
        self.attn = SelfAttention(channels, heads)
        self.ln_2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map (Q, C) to (Q, C)."""
        x = self.ln_1(x + self.attn(x))
        out: Tensor = self.ln_2(x + self.mlp(x))
        return out


class MaskPredictor(nn.Module):
    """From queries to mask kernels, and the scalar norm of the logits."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc_kernel = nn.Linear(channels, channels)
        self.norm_logits = nn.BatchNorm2d(1, eps=1e-3, momentum=0.01)
        self.norm_kernel = nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)

    def kernels(self, queries: Tensor) -> Tensor:
        """Return the mask kernels (Q, C) of queries (Q, C)."""
        kernels: Tensor = self.norm_kernel(self.fc_kernel(queries))
        return kernels


class MaskDecoder(nn.Module):
    """Queries to masks, refined over a few iterations (key ``inst_decoder``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, n = config.embed_dim, config.iterations
        self.rpn = QueryHead(config)
        self.predictors = nn.ModuleList(MaskPredictor(c) for _ in range(n))
        self.kernel_interactors = nn.ModuleList(
            QueryInteraction(c, config.attention_heads, config.mlp_ratio) for _ in range(n)
        )
        self.kernel_updators = nn.ModuleList(KernelUpdate(c) for _ in range(n))
        # The last one belongs to the first prediction, as in the published state dict.
        self.bg_convs = nn.ModuleList(ConvUnit(c, 1) for _ in range(n + 1))
        self._folded: list[tuple[Tensor, Tensor]] | None = None

    def freeze(self) -> None:
        """Keep the folded norms of the logits, whose parameters stay as they are from here on."""
        self._folded = self.folded_norms()

    def folded_norms(self) -> list[tuple[Tensor, Tensor]]:
        """Return (scale, shift), (1, 1) each, of the norm of the logits of each prediction."""
        if self._folded is not None:
            return self._folded
        norms = [self.rpn.norm_logits]
        for predictor in self.predictors:
            assert isinstance(predictor, MaskPredictor)
            norms.append(predictor.norm_logits)
        return [folded_norm(norm) for norm in norms]

    def forward(self, queries: Tensor, features: Tensor, mask_features: Tensor) -> list[Tensor]:
        """Predict the mask logits of one item, before and after each iteration.

        Of queries (Q, C), instance features and mask features (C, z1, y1, x1), the latter of unit
        length along C, it makes 1 + iterations maps (1 + Q, z1, y1, x1); channel 0 is the
        background.
        """
        pixels, pooled_from = mask_features.flatten(1), features.flatten(1).T
        logits = normalised_logits(self.rpn.norm_logits, self.rpn.kernels(queries) @ pixels)
        predictions = [self._with_background(-1, logits, mask_features)]
        for i, predictor in enumerate(self.predictors):
            assert isinstance(predictor, MaskPredictor)
            pooled = torch.softmax(logits, dim=0) @ pooled_from
            queries = self.refine(i, pooled, queries)
            logits = normalised_logits(predictor.norm_logits, predictor.kernels(queries) @ pixels)
            predictions.append(self._with_background(i, logits, mask_features))
        return predictions

    def refine(self, iteration: int, pooled: Tensor, queries: Tensor) -> Tensor:
        """Return the queries (Q, C) of the next prediction."""
        queries = self.kernel_updators[iteration](pooled, queries)
        refined: Tensor = self.kernel_interactors[iteration](queries)
        return refined

    def _with_background(self, index: int, logits: Tensor, mask_features: Tensor) -> Tensor:
        background = self.bg_convs[index](mask_features[None])[0]
        return torch.cat([background, logits.view(-1, *mask_features.shape[1:])])


def folded_norm(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), (1, 1) each, of the norm of the logits in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale[:, None], (norm.bias - norm.running_mean * scale)[:, None]


def normalised_logits(norm: nn.BatchNorm2d, logits: Tensor) -> Tensor:
    """Apply the scalar batch norm of the logits to (Q, voxels)."""
    out: Tensor = norm(logits[None, None])[0, 0]
    return out
