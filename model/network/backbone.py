"""The anisotropic residual 3-D U-Net and the fusion of its levels."""

from __future__ import annotations

from torch import Tensor, nn

from agq.model.config import ModelConfig
from agq.model.network.blocks import ConvUnit, ResidualBlock, resize


class Backbone(nn.Module):
    """Residual U-Net with in-plane kernels, and strides that spare z at the upper levels.

    A mixin of three entries of the state dict (``conv_in``, ``down_layers``, ``up_layers``):
    the published network keeps them at its top level, so `network.agq.AGQ` inherits from this.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        f, groups = config.filters, config.norm_groups
        self.conv_in = ConvUnit(1, f[0], (1, 5, 5), norm="group", groups=groups, activation="elu")
        self.down_layers = nn.ModuleList(
            nn.Sequential(
                nn.Identity(),
                ConvUnit(
                    f[max(0, i - 1)], f[i], config.kernel(i), config.stride(i),
                    norm="group", groups=groups, activation="elu",
                ),
                ResidualBlock(f[i], groups),
            )
            for i in range(config.levels)
        )  # fmt: skip
        self.up_layers = nn.ModuleList(
            nn.Sequential(
                ConvUnit(
                    f[j], f[j - 1], config.kernel(j),
                    norm="group", groups=groups, activation="elu",
                ),
                ResidualBlock(f[j - 1], groups),
            )
            for j in range(1, config.levels)
        )  # fmt: skip

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Return the decoder levels [P0, P1, ...] of a normalised image (B, 1, z, y, x).

        A level is (B, filters[i], z_i, y_i, x_i): each size is the one above divided by the stride,
        rounded up.
        """
        x = self.conv_in(x)
        levels = []
        for layer in self.down_layers:
            x = layer(x)
            levels.append(x)
        for j in range(len(levels) - 1, 0, -1):
            layer = self.up_layers[j - 1]
            assert isinstance(layer, nn.Sequential)
            x = resize(layer[0](levels[j]), levels[j - 1].shape[2:], align_corners=True)
            levels[j - 1] = layer[1](x + levels[j - 1])
        return levels


class FusionBlock(nn.Module):
    """Bring all levels to one width and to the size of P1, add them, and smooth."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, groups = config.embed_dim, config.norm_groups
        self.pre_convs = nn.ModuleList(
            ConvUnit(f, c, norm="group", groups=groups, activation="elu") for f in config.filters
        )
        self.post_convs = nn.Sequential(
            ConvUnit(c, c, norm="group", groups=groups, activation="elu")
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Fuse [P0, P1, ...] into (B, embed_dim, z1, y1, x1)."""
        size = levels[1].shape[2:]
        parts = [
            resize(conv(level), size, align_corners=True)
            for conv, level in zip(self.pre_convs, levels, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        fused: Tensor = self.post_convs(total)
        return fused
