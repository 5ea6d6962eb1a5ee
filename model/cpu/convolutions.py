"""Convolution units of the network on the CPU, section by section.

A volume is a list of sections (y, x, C), channels last: the layout for which the CPU's
convolutions are fastest, and one section is small enough that what follows a convolution
(norm, activation, padding) finds it in the cache. Flat kernels need nothing but their own
section; a kernel that is deep in z is the sum of flat ones on neighbouring sections, so nothing
is ever padded along z. Between units, sections carry their replicate padding: the activation
writes into the inside of a padded section and only the rim is copied.

The group norm needs the statistics of the whole block before it can be applied: a unit keeps
the bare sums of the convolution, and the affine map of its norm, until all sections are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agq.model.network.blocks import ConvUnit, ReplicateConv3d

Sections = list[Tensor]
STRIP = 1 << 18


@dataclass(frozen=True)
class Taps:
    """The weights of a convolution: one flat kernel per section it reads.

    Attributes
    ----------
    kernels : list of Tensor
        float32 (out, in, ky, kx), channels last, one per tap along z.
    stride : tuple of int
        (z, y, x).
    """

    kernels: list[Tensor]
    stride: tuple[int, int, int]

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int] = (1, 1, 1)) -> Taps:
        """Split a 3-D kernel (out, in, kz, ky, kx)."""
        kernels = [k.contiguous(memory_format=torch.channels_last) for k in weight.unbind(2)]
        return cls(kernels, (stride[0], stride[1], stride[2]))

    def depth(self, sections: int) -> int:
        """Return how many sections come out of this many."""
        return -(-sections // self.stride[0])

    def section(self, padded: Sections, z: int, bias: Tensor | None = None) -> Tensor:
        """Return output section z (y, x, out) of padded input sections, replicating along z."""
        middle = z * self.stride[0] - len(self.kernels) // 2
        total: Tensor | None = None
        for tap, kernel in enumerate(self.kernels):
            source = padded[min(max(middle + tap, 0), len(padded) - 1)]
            image = source[None].permute(0, 3, 1, 2)
            part = F.conv2d(image, kernel, bias, stride=self.stride[1:])
            bias = None
            total = part if total is None else total.add_(part)
        assert total is not None
        # One input channel has no channel order, and torch then answers channels first.
        return total.contiguous(memory_format=torch.channels_last)[0].permute(1, 2, 0)


def inside(padded: Tensor) -> Tensor:
    """Return the section without its rim."""
    return padded[1:-1, 1:-1]


def empty_padded(like: Tensor) -> Tensor:
    """Return an unfilled padded section for a section (y, x, C)."""
    y, x, channels = like.shape
    return like.new_empty(y + 2, x + 2, channels)


def fill_rim(padded: Tensor) -> Tensor:
    """Replicate the inside of a padded section into its rim."""
    padded[0, 1:-1] = padded[1, 1:-1]
    padded[-1, 1:-1] = padded[-2, 1:-1]
    padded[:, 0] = padded[:, 1]
    padded[:, -1] = padded[:, -2]
    return padded


def strips(section: Tensor) -> Iterator[slice]:
    """Cut a section (y, x, C) into runs of rows of about 1 MiB, which stay in the cache.

    The cut depends on the shape alone, and so do the sums over strips.
    """
    rows = max(1, STRIP // (section.shape[1] * section.shape[2]))
    return (slice(y, y + rows) for y in range(0, section.shape[0], rows))


def elu(
    section: Tensor,
    out: Tensor,
    affine: tuple[Tensor, Tensor] | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """Write ELU(section * scale + shift + skip) to ``out``, which may be the section itself.

    ELU is max(x, exp(min(x, 0)) - 1): several times as fast on the CPU as the ``expm1`` of the
    built-in form, and equal to it within 6e-8. The section's memory is used up.
    """
    for rows in strips(section):
        x = section[rows]
        if affine is not None:
            x = torch.addcmul(affine[1], x, affine[0], out=x)
        if skip is not None:
            x = x.add_(skip[rows])
        negative = torch.clamp(x, max=0).exp_().sub_(1)
        torch.maximum(x, negative, out=out[rows])
    return out


class GroupStatistics:
    """Mean and variance of each group of channels, gathered section by section.

    Sums are of differences from the first strip's mean, so that a mean far from zero does not
    cost the variance its digits.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.count = 0
        self.center = torch.zeros(norm.num_channels)
        self.sums = torch.zeros(2, norm.num_channels, dtype=torch.float64)

    def add(self, section: Tensor) -> None:
        """Take in a section (y, x, C), contiguous."""
        for rows in strips(section):
            voxels = section[rows].flatten(0, 1)
            if not self.count:
                self.center = voxels.mean(0)
            self.count += len(voxels)
            difference = voxels - self.center
            self.sums[0] += difference.sum(0)
            self.sums[1] += difference.square_().sum(0)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return (scale, shift) per channel of the norm over all sections."""
        first, second = self.sums / self.count
        mean = (self.center + first).view(self.norm.num_groups, -1)
        group = mean.mean(1, keepdim=True)
        variance = (second - first**2).view_as(mean) + (mean - group) ** 2
        rstd = (variance.mean(1, keepdim=True) + self.norm.eps).rsqrt()
        scale = self.norm.weight * rstd.expand_as(mean).flatten()
        shift = self.norm.bias - group.expand_as(mean).flatten() * scale
        return scale.float(), shift.float()


class NormUnit:
    """Convolution with group norm; the norm is applied when the sections are used."""

    def __init__(self, unit: ConvUnit) -> None:
        conv, norm = unit[0], unit[1]
        assert isinstance(conv, ReplicateConv3d)
        assert isinstance(norm, nn.GroupNorm)
        self.taps = Taps.of(conv.weight, conv.stride)
        self.norm = norm

    def __call__(self, padded: Sections, *, consume: bool, every: Sequence[int] = (1, 1)) -> Raw:
        """Convolve padded sections.

        Parameters
        ----------
        padded : list of Tensor
            Input; emptied as it is used if ``consume``.
        consume : bool
            Whether the input may be overwritten.
        every : tuple of int
            Keep each n-th voxel along (y, x) only; the norm still sees all.
        """
        sections = []
        statistics = GroupStatistics(self.norm)
        reach = len(self.taps.kernels) // 2
        step = self.taps.stride[0]
        for z in range(self.taps.depth(len(padded))):
            section = self.taps.section(padded, z)
            if consume:
                for done in range(max(0, (z - 1) * step - reach), (z + 1) * step - reach):
                    if 0 <= done < len(padded) - 1:
                        padded[done] = padded[done].new_empty(0)
            statistics.add(section)
            if tuple(every) != (1, 1):
                section = section[:: every[0], :: every[1]].contiguous()
            sections.append(section)
        if consume:
            padded.clear()
        return Raw(sections, statistics.affine())


@dataclass
class Raw:
    """Sections (y, x, C) that still await their norm: x * scale + shift."""

    sections: Sections
    affine: tuple[Tensor, Tensor]

    def activated(self) -> Iterator[Tensor]:
        """Yield the sections after norm and ELU, in order, giving each up."""
        return (elu(section, section, self.affine) for section in self._taken())

    def padded(self) -> Sections:
        """Return the sections after norm and ELU, padded for the next convolution."""
        out = []
        for section in self._taken():
            buffer = empty_padded(section)
            elu(section, inside(buffer), self.affine)
            out.append(fill_rim(buffer))
        return out

    def added_to(self, padded: Sections) -> None:
        """Replace padded sections by the ELU of the sum of them and the normed sections."""
        for section, buffer in zip(self._taken(), padded, strict=True):
            into = inside(buffer)
            elu(section, into, self.affine, skip=into)
            fill_rim(buffer)

    def _taken(self) -> Iterator[Tensor]:
        for z, section in enumerate(self.sections):
            self.sections[z] = section.new_empty(0)
            yield section


def residual(first: NormUnit, second: NormUnit, padded: Sections) -> Sections:
    """Apply a residual block to padded sections, in their own memory."""
    hidden = first(padded, consume=False).padded()
    second(hidden, consume=True).added_to(padded)
    return padded


@dataclass(frozen=True)
class Resizing:
    """Linear resampling with aligned corners of sections (y, x, C) to a volume's size."""

    source: tuple[int, int, int]
    size: tuple[int, int, int]

    def every(self) -> tuple[int, int]:
        """Return the steps (y, x) if the samples fall on voxels, else (1, 1).

        Halving a size 2n + 1 takes every other voxel, so nothing need be interpolated.
        """
        steps = [
            (n - 1) // (m - 1) if m > 1 and n >= m and (n - 1) % (m - 1) == 0 else 1
            for n, m in zip(self.source[1:], self.size[1:], strict=True)
        ]
        exact = all(
            (m - 1) * s + 1 == n
            for n, m, s in zip(self.source[1:], self.size[1:], steps, strict=True)
        )
        return (steps[0], steps[1]) if exact else (1, 1)

    def __call__(self, sections: Sections) -> Iterator[Tensor]:
        """Yield the resampled sections in order; sources may be thinned by `every` already."""
        scale = (self.source[0] - 1) / (self.size[0] - 1) if self.size[0] > 1 else 0.0
        for z in range(self.size[0]):
            first = min(int(z * scale), self.source[0] - 1)
            weight = z * scale - first
            plane = sections[first]
            if weight > 0:
                plane = torch.lerp(plane, sections[min(first + 1, self.source[0] - 1)], weight)
            if tuple(plane.shape[:2]) != self.size[1:]:
                image = plane[None].permute(0, 3, 1, 2)
                plane = F.interpolate(
                    image, size=self.size[1:], mode="bilinear", align_corners=True
                )[0].permute(1, 2, 0)
            yield plane
