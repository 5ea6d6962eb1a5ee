"""The AGQ network written layer by layer, as a baseline for `benchmarks/forward.py`.

Nothing here is clever: 3-D convolutions with replicate padding, one loop over components,
logits resized to the block, one softmax over all of it. Weights have the names of `network.agq`.
"""

import time
from collections.abc import Callable
from typing import Any

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agq.model.config import ModelConfig
from agq.model.network.decoder import KernelUpdate, MaskPredictor, QueryInteraction


def unit(
    c_in: int, c_out: int, kernel: tuple, stride: tuple = (1, 1, 1), norm: str = "bn", act: str = ""
) -> nn.Sequential:
    """Convolution, norm, activation."""
    padding = tuple(k // 2 for k in kernel)
    conv = nn.Conv3d(c_in, c_out, kernel, stride, padding, bias=False, padding_mode="replicate")
    norms = {
        "gn": lambda: nn.GroupNorm(8, c_out), "bn": lambda: nn.BatchNorm3d(c_out),
        "none": nn.Identity,
    }  # fmt: skip
    acts = {"elu": nn.ELU, "relu": nn.ReLU, "": nn.Identity}
    return nn.Sequential(conv, norms[norm](), acts[act]())


def settle(device: torch.device) -> None:
    """Wait until a card has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Residual(nn.Module):
    """Two units and a sum."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            unit(c, c, (1, 3, 3), norm="gn", act="elu"), unit(c, c, (1, 3, 3), norm="gn")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        return F.elu(self.conv(x) + x)


class Branch(nn.Module):
    """Four units and a projection."""

    def __init__(self, c: int, c_out: int, kernel: tuple) -> None:
        super().__init__()
        self.mask_convs = nn.Sequential(
            *(unit(c if i else c + 3, c, kernel, norm="none", act="elu") for i in range(4))
        )
        self.projection = nn.Conv3d(c, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        return self.projection(self.mask_convs(x))


class Fusion(nn.Module):
    """All levels to the size of P1."""

    def __init__(self, filters: tuple, c: int) -> None:
        super().__init__()
        self.pre_convs = nn.ModuleList(unit(f, c, (1, 3, 3), norm="gn", act="elu") for f in filters)
        self.post_convs = nn.Sequential(unit(c, c, (1, 3, 3), norm="gn", act="elu"))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Run the layers."""
        size = levels[1].shape[2:]
        return self.post_convs(
            sum(
                F.interpolate(conv(x), size=size, mode="trilinear", align_corners=True)
                for conv, x in zip(self.pre_convs, levels, strict=True)
            )
        )


class Heads(nn.Module):
    """Instance features, learned queries, first prediction."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.embed_dim
        self.inst_convs = nn.Sequential(
            *(unit(c if i else c + 3, c, (1, 3, 3), act="relu") for i in range(4))
        )
        self.learned_masks_embed = nn.Embedding(config.learned_queries, c)
        self.mask_kernel = nn.Linear(c, c)
        self.norm_logits = nn.BatchNorm2d(1, eps=1e-3)
        self.norm_kernel = nn.BatchNorm1d(c, eps=1e-3)


class Decoder(nn.Module):
    """The parameters of the decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, n = config.embed_dim, config.iterations
        self.rpn = Heads(config)
        self.predictors = nn.ModuleList(MaskPredictor(c) for _ in range(n))
        self.kernel_interactors = nn.ModuleList(QueryInteraction(c, 8, 4) for _ in range(n))
        self.kernel_updators = nn.ModuleList(KernelUpdate(c) for _ in range(n))
        self.bg_convs = nn.ModuleList(unit(c, 1, (1, 3, 3), act="relu") for _ in range(n + 1))


class PlainAGQ(nn.Module):
    """The network, with inference as one straight function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        f, c = config.filters, config.embed_dim
        self.conv_in = unit(1, f[0], (1, 5, 5), norm="gn", act="elu")
        self.down_layers = nn.ModuleList(
            nn.Sequential(
                nn.Identity(),
                unit(f[max(0, i - 1)], f[i], config.kernel(i), config.stride(i), "gn", "elu"),
                Residual(f[i]),
            )
            for i in range(len(f))
        )
        self.up_layers = nn.ModuleList(
            nn.Sequential(
                unit(f[j], f[j - 1], config.kernel(j), norm="gn", act="elu"), Residual(f[j - 1])
            )
            for j in range(1, len(f))
        )
        self.fusion_block = Fusion(f, c)
        self.inst_decoder = Decoder(config)
        self.mask_branch = Branch(c, c, (1, 3, 3))
        self.affinity_branch = Branch(c, 3, (3, 3, 3))

    def backbone(self, x: Tensor) -> list[Tensor]:
        """Return the decoder levels."""
        x = self.conv_in(x)
        levels = []
        for layer in self.down_layers:
            x = layer(x)
            levels.append(x)
        for j in range(len(levels) - 1, 0, -1):
            conv, residual = self.up_layers[j - 1]
            size = levels[j - 1].shape[2:]
            up = F.interpolate(conv(levels[j]), size=size, mode="trilinear", align_corners=True)
            levels[j - 1] = residual(up + levels[j - 1])
        return levels

    def features(self, fused: Tensor) -> Tensor:
        """Prepend the coordinate channels."""
        axes = [torch.linspace(-1, 1, n, device=fused.device) for n in fused.shape[2:]]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.cat([torch.stack([z, x, y])[None], fused], dim=1)

    def queries(self, affinity: Tensor, instances: Tensor) -> tuple[Tensor, int]:
        """Mean features of the seed regions, and the learned queries."""
        mean = torch.sigmoid(affinity).mean(1)[0]
        regions = cc3d.connected_components((mean > mean.mean()).cpu().numpy(), connectivity=26)
        means: list[Tensor] = []
        for region in range(1, int(regions.max()) + 1):
            mask = torch.from_numpy(regions == region).to(mean.device)
            if mask.sum() > self.config.min_seed_voxels and len(means) < self.config.max_seeds:
                means.append(instances[0][:, mask].mean(1))
        learned = self.inst_decoder.rpn.learned_masks_embed.weight
        return torch.cat([torch.stack(means), learned]) if means else learned, len(means)

    def masks(self, queries: Tensor, instances: Tensor, features: Tensor) -> Tensor:
        """Return the logits of the last prediction, the background first."""
        decoder = self.inst_decoder
        features = F.normalize(features, dim=1)
        backgrounds = [conv(features) for conv in decoder.bg_convs]
        kernels = decoder.rpn.norm_kernel(decoder.rpn.mask_kernel(queries))
        logits = torch.einsum("qc,bczyx->bqzyx", kernels, features)
        logits = decoder.rpn.norm_logits(logits.flatten(2)[:, None]).view(logits.shape)
        for i, predictor in enumerate(decoder.predictors):
            share = torch.softmax(logits, dim=1)
            pooled = torch.einsum("bqzyx,bczyx->qc", share, instances)
            queries = decoder.kernel_updators[i](pooled, queries)
            queries = decoder.kernel_interactors[i](queries)
            logits = torch.einsum("qc,bczyx->bqzyx", predictor.kernels(queries), features)
            logits = predictor.norm_logits(logits.flatten(2)[:, None]).view(logits.shape)
        logits = torch.cat([backgrounds[-2], logits], dim=1)
        logits[:, 0] = 0
        return logits

    def labels(self, logits: Tensor, size: tuple) -> np.ndarray:
        """Resize, softmax, drop small channels, argmax; pieces are found too."""
        logits = F.interpolate(logits, size=size, mode="trilinear", align_corners=False)
        share = torch.softmax(logits, dim=1)[0]
        share[share.sum((1, 2, 3)) < self.config.min_mass] = 0
        channels = share.argmax(0).cpu().numpy().astype(np.int16)
        cc3d.connected_components(channels, connectivity=6)
        return channels

    def affinities(self, logits: Tensor, size: tuple) -> np.ndarray:
        """Sigmoid, resize, quantise."""
        resized = F.interpolate(
            torch.sigmoid(logits), size=size, mode="trilinear", align_corners=False
        )
        return (resized[0] * 255).round().to(torch.uint8).cpu().numpy()

    def run(self, image: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Segment one uint8 block; return results and seconds per stage."""
        seconds: dict[str, float] = {}

        def stage(name: str, function: Callable, *args: Any) -> Any:
            start = time.perf_counter()
            out = function(*args)
            settle(x.device)
            seconds[name] = time.perf_counter() - start
            return out

        x = torch.from_numpy(image)[None, None].to(self.conv_in[0].weight.device)
        x = (x.float() / 255 - 0.5) / 0.5
        levels = stage("backbone", self.backbone, x)
        fused = stage("fusion", self.fusion_block, levels)
        del levels
        features = self.features(fused)
        del fused
        masks, instances = stage(
            "mask and instance branches",
            lambda f: (self.mask_branch(f), self.inst_decoder.rpn.inst_convs(f)), features,
        )  # fmt: skip
        affinity = stage("affinity branch", self.affinity_branch, features)
        del features
        queries, _ = stage("seeds", self.queries, affinity, instances)
        logits = stage("decoder", self.masks, queries, instances, masks)
        channels = stage("masks to labels", self.labels, logits, image.shape)
        out = stage("affinities", self.affinities, affinity, image.shape)
        return {"channels": channels, "affinities": out}, seconds
