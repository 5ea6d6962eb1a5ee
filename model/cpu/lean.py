"""The convolutional part of the network for float32 on the CPU: same sums, less time and memory.

`LeanNetwork.dense_maps` computes what `decode.inference.dense_maps` does with the network's own
layers; the tests hold the two to each other. What is different: see `cpu.convolutions`; batch
norms are folded into the convolutions in front of them; the coordinate channels, linear along
one axis each, enter as three short vectors instead of as channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agq.model.cpu.convolutions import (
    NormUnit,
    Resizing,
    Sections,
    Taps,
    elu,
    empty_padded,
    fill_rim,
    inside,
    residual,
)
from agq.model.decode.inference import DenseMaps
from agq.model.network.agq import AGQ
from agq.model.network.blocks import ConvBranch, ConvUnit, ReplicateConv3d, ResidualBlock


class LeanNetwork:
    """The weights of an `AGQ` network, arranged for the CPU.

    Parameters
    ----------
    network : AGQ
        In evaluation mode, on the CPU, float32. Later changes of it are not seen.
    """

    def __init__(self, network: AGQ) -> None:
        self.conv_in = NormUnit(network.conv_in)
        self.down = [
            (NormUnit(as_unit(layer[1])), *_residual_units(layer[2]))
            for layer in network.down_layers
            if isinstance(layer, nn.Sequential)
        ]
        self.up = [
            (NormUnit(as_unit(layer[0])), *_residual_units(layer[1]))
            for layer in network.up_layers
            if isinstance(layer, nn.Sequential)
        ]
        fusion = network.fusion_block
        self.pre = [NormUnit(as_unit(unit)) for unit in fusion.pre_convs]
        self.post = NormUnit(as_unit(fusion.post_convs[0]))
        self.affinity = Branch.of(network.affinity_branch)
        self.mask = Branch.of(network.mask_branch)
        self.instance = Branch.folded(network.inst_decoder.rpn.inst_convs)

    def dense_maps(self, image: Tensor) -> DenseMaps:
        """Run backbone, fusion and branches on one normalised block (z, y, x)."""
        fused = self.fuse(self.pyramid(image))
        masks, instances = self.features(fused)
        return DenseMaps(self.affinities(fused), masks, instances)

    def affinity_logits(self, image: Tensor) -> Tensor:
        """Return the affinity logits (3, z1, y1, x1) of one normalised block, and no more."""
        return self.affinities(self.fuse(self.pyramid(image)))

    def features(self, fused: Sections) -> tuple[Tensor, Tensor]:
        """Return mask features, of unit length, and instance features (z1, y1, x1, C)."""
        masks, instances = [], []
        for z in range(len(fused)):
            masks.append(F.normalize(self.mask.section(fused, z), dim=2))
            instances.append(self.instance.section(fused, z))
        return _stacked(masks), _stacked(instances)

    def affinities(self, fused: Sections) -> Tensor:
        """Return affinity logits (3, z1, y1, x1); the fused features are used up."""
        return _stacked(self.affinity.volume(fused)).permute(3, 0, 1, 2).contiguous()

    def pyramid(self, image: Tensor) -> list[Sections]:
        """Return the decoder levels as padded sections."""
        rim = F.pad(image[:, None], (2, 2, 2, 2), mode="replicate")
        x = self.conv_in([section.permute(1, 2, 0) for section in rim], consume=True).padded()
        levels: list[Sections] = []
        for unit, first, second in self.down:
            x = residual(first, second, unit(x, consume=not levels).padded())
            levels.append(x)
        for j in range(len(levels) - 1, 0, -1):
            unit, first, second = self.up[j - 1]
            skip = levels[j - 1]
            sections = list(unit(levels[j], consume=False).activated())
            resized = Resizing(_size(levels[j]), _size(skip))(sections)
            for buffer, section in zip(skip, resized, strict=True):
                inside(buffer).add_(section)
                fill_rim(buffer)
            residual(first, second, skip)
        return levels

    def fuse(self, levels: list[Sections]) -> Sections:
        """Fuse the levels, which are used up, into padded sections at the size of P1."""
        size = _size(levels[1])
        total: Sections = []
        for unit, level in zip(self.pre, levels, strict=True):
            resizing = Resizing(_size(level), size)
            raw = unit(level, consume=True, every=resizing.every())
            resized = resizing(list(raw.activated()))
            if not total:
                for section in resized:
                    buffer = empty_padded(section)
                    inside(buffer).copy_(section)
                    total.append(buffer)
                continue
            for buffer, section in zip(total, resized, strict=True):
                inside(buffer).add_(section)
        for buffer in total:
            fill_rim(buffer)
        return self.post(total, consume=True).padded()


class Branch:
    """Units without norm of their own, and a projection; the first also reads coordinates."""

    def __init__(
        self,
        taps: list[Taps],
        biases: list[Tensor | None],
        coordinate_weight: Tensor,
        projection: nn.Conv3d | None,
    ) -> None:
        self.taps = taps
        self.biases = biases
        self.coordinate_weight = coordinate_weight
        self.projection = projection
        self._last: tuple[tuple[int, int, int], Tensor, Tensor] | None = None

    @classmethod
    def of(cls, branch: ConvBranch) -> Branch:
        """Take the units (no norm, ELU) and the projection of a branch."""
        weights = [_conv(unit).weight for unit in branch.mask_convs]
        taps = [Taps.of(weights[0][:, 3:]), *(Taps.of(w) for w in weights[1:])]
        return cls(taps, [None] * len(taps), weights[0][:, :3], branch.projection)

    @classmethod
    def folded(cls, units: nn.Sequential) -> Branch:
        """Take units (batch norm, ReLU), the norms folded into the convolutions."""
        taps: list[Taps] = []
        biases: list[Tensor | None] = []
        coordinate_weight = None
        for unit in units:
            weight, bias = _folded(as_unit(unit))
            if coordinate_weight is None:
                coordinate_weight, weight = weight[:, :3], weight[:, 3:]
            taps.append(Taps.of(weight))
            biases.append(bias)
        assert coordinate_weight is not None
        return cls(taps, biases, coordinate_weight, None)

    def section(self, fused: Sections, z: int) -> Tensor:
        """Run all units on one section of the padded features; kernels must be flat."""
        padded = fused
        for i in range(len(self.taps)):
            section = self._convolve(i, padded, z if i == 0 else 0, _size(fused), z)
            if i == len(self.taps) - 1:
                return self._project(self._activate(section, section))
            buffer = empty_padded(section)
            self._activate(section, inside(buffer))
            padded = [fill_rim(buffer)]
        raise AssertionError("a branch has at least one unit")

    def volume(self, fused: Sections) -> Sections:
        """Run all units on the padded features, which are used up."""
        padded, size = fused, _size(fused)
        for i in range(len(self.taps)):
            last = i == len(self.taps) - 1
            out = []
            for z in range(size[0]):
                section = self._convolve(i, padded, z, size, z)
                if z > 0:
                    padded[z - 1] = section.new_empty(0)
                if last:
                    out.append(self._project(self._activate(section, section)))
                    continue
                buffer = empty_padded(section)
                self._activate(section, inside(buffer))
                out.append(fill_rim(buffer))
            padded.clear()
            padded = out
        return padded

    def _convolve(
        self, unit: int, padded: Sections, source: int, size: tuple[int, int, int], z: int
    ) -> Tensor:
        if unit:
            return self.taps[unit].section(padded, source, self.biases[unit])
        along_z, plane = self._coordinates(size)
        bias = self.biases[0]
        section = self.taps[0].section(
            padded, source, along_z[z] if bias is None else along_z[z] + bias
        )
        return section.add_(plane)

    def _coordinates(self, size: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return what the coordinate channels add: per section (z, C), and anywhere (y, x, C)."""
        last = self._last
        if last is None or last[0] != size:
            w = self.coordinate_weight  # (out, [z, x, y], kz, ky, kx)
            along_z = _line(w[:, 0].sum((2, 3)), size[0])
            along_x = _line(w[:, 1].sum((1, 2)), size[2])
            along_y = _line(w[:, 2].sum((1, 3)), size[1])
            # One assignment: other threads may be at work with another size.
            self._last = last = (size, along_z, along_y[:, None] + along_x[None])
        return last[1], last[2]

    def _activate(self, section: Tensor, out: Tensor) -> Tensor:
        # Branches with batch norms have ReLU, those without have ELU.
        if self.biases[0] is None:
            return elu(section, out)
        return torch.clamp(section, min=0, out=out)

    def _project(self, section: Tensor) -> Tensor:
        if self.projection is None:
            return section
        return F.linear(section, self.projection.weight.flatten(1), self.projection.bias)


def _line(kernel: Tensor, n: int) -> Tensor:
    """Convolve linspace(-1, 1, n), ends replicated, with kernels (out, k): (n, out)."""
    reach = kernel.shape[1] // 2
    line = torch.linspace(-1, 1, n, dtype=torch.float64)[None, None]
    line = F.pad(line, (reach, reach), mode="replicate")
    return F.conv1d(line, kernel.double()[:, None])[0].T.float().contiguous()


def as_unit(module: nn.Module) -> ConvUnit:
    """Narrow the type of a submodule."""
    assert isinstance(module, ConvUnit)
    return module


def _conv(module: nn.Module) -> ReplicateConv3d:
    conv = as_unit(module)[0]
    assert isinstance(conv, ReplicateConv3d)
    return conv


def _residual_units(module: nn.Module) -> tuple[NormUnit, NormUnit]:
    assert isinstance(module, ResidualBlock)
    return NormUnit(as_unit(module.conv[0])), NormUnit(as_unit(module.conv[1]))


def _folded(unit: ConvUnit) -> tuple[Tensor, Tensor]:
    norm = unit[1]
    assert isinstance(norm, nn.BatchNorm3d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight = _conv(unit).weight.double() * scale.view(-1, 1, 1, 1, 1)
    return weight.float(), shift.float()


def _size(padded: Sections) -> tuple[int, int, int]:
    return len(padded), padded[0].shape[0] - 2, padded[0].shape[1] - 2


def _stacked(sections: Sections) -> Tensor:
    """Stack sections, giving each up as it is copied."""
    out = sections[0].new_empty(len(sections), *sections[0].shape)
    for z in range(len(sections)):
        out[z] = sections[z]
        sections[z] = out[z]
    return out
