"""Convolution units, residual blocks and resizing: the bricks of the AGQ network.

Tensors are (batch, channel, z, y, x) throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["group", "batch", "none"]


class ReplicateConv3d(nn.Conv3d):
    """A bias-free 3-D convolution with replicate ("edge") padding of half the kernel.

    Kernels flat in z run as a 2-D convolution over all sections: the same sums, for which
    backends have far better algorithms than for the 3-D form.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int] = (1, 3, 3),
        stride: Sequence[int] = (1, 1, 1),
    ) -> None:
        z, y, x = kernel
        super().__init__(
            in_channels, out_channels, (z, y, x), (stride[0], stride[1], stride[2]), bias=False
        )
        self.margin = (z // 2, y // 2, x // 2)
        self.flat = z == 1 and stride[0] == 1
        self._frozen: Tensor | None = None

    def freeze(self, dtype: torch.dtype) -> None:
        """Keep the kernel as it is used at a precision; the weight must not change after it."""
        self._frozen = self._kernel().detach().to(dtype)

    def _kernel(self) -> Tensor:
        if self._frozen is not None:
            return self._frozen
        return self.weight.squeeze(2) if self.flat else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, z, y, x); sizes are divided by the stride, rounded up."""
        mz, my, mx = self.margin
        if not self.flat:
            x = F.pad(x, (mx, mx, my, my, mz, mz), mode="replicate")
            return F.conv3d(x, self._kernel(), stride=self.stride)
        # Of one item the sections are a view: padding copies them anyway.
        sections = x.transpose(1, 2).flatten(0, 1) if len(x) > 1 else x[0].transpose(0, 1)
        out = self.sections(sections)
        if len(x) > 1:
            return out.unflatten(0, (len(x), -1)).transpose(1, 2)
        return out.transpose(0, 1)[None]

    def sections(self, sections: Tensor) -> Tensor:
        """Convolve sections (z, C, y, x) with a kernel that is flat in z."""
        _, my, mx = self.margin
        sections = F.pad(sections, (mx, mx, my, my), mode="replicate")
        return F.conv2d(sections, self._kernel(), stride=self.stride[1:])


class ConvUnit(nn.Sequential):
    """Convolution, norm, activation (state-dict keys ``0`` and ``1``)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int] = (1, 3, 3),
        stride: Sequence[int] = (1, 1, 1),
        norm: Norm = "batch",
        groups: int = 1,
        activation: Literal["elu", "relu", "none"] = "relu",
    ) -> None:
        norms: dict[Norm, nn.Module] = {
            "group": nn.GroupNorm(groups, out_channels) if norm == "group" else nn.Identity(),
            "batch": nn.BatchNorm3d(out_channels) if norm == "batch" else nn.Identity(),
            "none": nn.Identity(),
        }
        activations: dict[str, nn.Module] = {
            "elu": nn.ELU(inplace=True),
            "relu": nn.ReLU(inplace=True),
            "none": nn.Identity(),
        }
        super().__init__(
            ReplicateConv3d(in_channels, out_channels, kernel, stride),
            norms[norm],
            activations[activation],
        )

    def sections(self, sections: Tensor) -> Tensor:
        """Run the unit on sections (z, C, y, x).

        The kernel must be flat in z, and the unit without norm. A chain of such units need not turn
        sections into a volume and back.
        """
        conv, norm, activation = self
        assert isinstance(conv, ReplicateConv3d)
        assert isinstance(norm, nn.Identity)
        activated: Tensor = activation(conv.sections(sections))
        return activated


class ResidualBlock(nn.Module):
    """Two in-plane units, the second without activation, plus the input, then ELU."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ConvUnit(channels, channels, norm="group", groups=groups, activation="elu"),
            ConvUnit(channels, channels, norm="group", groups=groups, activation="none"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, z, y, x) to the same shape."""
        return F.elu(self.conv(x) + x, inplace=True)


class ConvBranch(nn.Module):
    """Units without norm followed by a 1x1x1 convolution with bias."""

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, layers: int, kernel: Sequence[int]
    ) -> None:
        super().__init__()
        self.mask_convs = nn.Sequential(
            *(
                ConvUnit(
                    channels if i else in_channels, channels, kernel, norm="none", activation="elu"
                )
                for i in range(layers)
            )
        )
        self.projection = nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, z, y, x) to (B, out_channels, z, y, x)."""
        out: Tensor = self.projection(self.mask_convs(x))
        return out

    def flat(self, x: Tensor) -> Tensor:
        """Run a branch of flat kernels on one item, as `forward` does, with fewer operators."""
        sections = x[0].transpose(0, 1)
        for unit in self.mask_convs:
            assert isinstance(unit, ConvUnit)
            sections = unit.sections(sections)
        out: Tensor = self.projection(sections.transpose(0, 1)[None])
        return out


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Resample (B, C, z, y, x) trilinearly to the spatial ``size`` (z, y, x)."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=align_corners)


def coordinates(size: Sequence[int], like: Tensor) -> Tensor:
    """Return the coordinate channels (1, 3, z, y, x) in [-1, 1], channel order (z, x, y).

    The order of x and y is that of the published network; its weights depend on it.
    """
    z, y, x = size
    return _coordinates((z, y, x), like.device, like.dtype)


@lru_cache(maxsize=4)
def _coordinates(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Tensors made in inference mode would be of no use to a training in the same process.
    with torch.inference_mode(False):
        z, y, x = (torch.linspace(-1, 1, n, device=device, dtype=dtype) for n in shape)
        return torch.stack(
            [
                z.view(-1, 1, 1).expand(shape),
                x.view(1, 1, -1).expand(shape),
                y.view(1, -1, 1).expand(shape),
            ]
        )[None]
