"""The configuration of an AGQ network: everything that decides shapes and results."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from agq.errors import InputError
from agq.reading import parse_json
from agq.settings import Settings

SeedOrder = Literal["label", "largest"]
Flips = Literal["none", "inplane", "all"]
Pieces = Literal["masks", "supervoxels"]

PUBLISHED_VOXEL_SIZE = (30.0, 6.0, 6.0)
"""Voxel size (z, y, x) in nanometres of the data that the published network was trained on."""


MOST_VOXELS = 2**30
"""Voxels of a block that a network can be for."""

# A checkpoint says of itself what it is: these are far above any network that has been useful, and
# far below what takes minutes or gigabytes to make.
Width = Annotated[int, Field(ge=1, le=2048)]
Depth = Annotated[int, Field(ge=1, le=32)]


class ModelConfig(Settings):
    """Architecture and inference constants of one AGQ network.

    The defaults are the published network. The configuration is stored inside our checkpoints,
    so that a checkpoint alone is enough to run it.
    """

    filters: tuple[Width, ...] = Field(default=(32, 64, 96, 128, 160), min_length=2, max_length=12)
    """Channels of the backbone levels, full resolution first."""

    isotropy: tuple[bool, ...] = (False, False, False, True, True)
    """Per level: kernel and stride also act along z (level 0 is never strided)."""

    embed_dim: Width = 64
    """Channels of the fused features, the mask features and the queries."""

    norm_groups: Width = 8
    """Groups of the group norms of backbone and fusion."""

    iterations: Depth = 2
    """Decoder iterations after the first prediction."""

    attention_heads: Width = 8
    """Heads of the self-attention among queries."""

    mlp_ratio: Depth = 4
    """Width of the MLP behind the attention, in units of ``embed_dim``."""

    branch_layers: Depth = 4
    """Convolution units of the affinity branch, the mask branch and the instance convolutions."""

    learned_queries: int = Field(default=100, ge=1, le=10_000)
    """Learned queries, always appended after the affinity-guided ones."""

    max_seeds: int = Field(default=100, ge=0, le=100_000)
    """Most affinity-guided queries per block; further components are dropped and counted."""

    min_seed_voxels: int = Field(default=100, ge=0)
    """A component becomes a query if it has strictly more voxels, at the resolution of P1."""

    min_mass: float = Field(default=40.0, ge=0)
    """A channel whose softmax mass over the block is below this many voxels is dropped."""

    min_affinity: float = Field(default=0.0, ge=0, le=1)
    """Masks are cut where the mean affinity of a voxel is below this (`decode.split`); 0, as
    published, never cuts."""

    pieces: Pieces = "masks"
    """What a block is cut into: its masks, as published, or supervoxels by affinities alone, of
    which the masks say what belongs together (`agq.model.decode.supervoxels`)."""

    mask_weight: float = Field(default=0.3, ge=0, le=1)
    """For supervoxels: weight of what the masks say, against the affinities, where two of them
    touch inside a block."""

    seed_order: SeedOrder = "label"
    """Which components are kept above ``max_seeds``: first in raster order, or the largest."""

    flips: Flips = "none"
    """Mirror images whose affinities are averaged at inference (`model.flips`): none, as published,
    the 4 of y and x, or all 8."""

    input_shape: tuple[int, int, int] = (17, 257, 257)
    """Block size (z, y, x) in voxels that the network was trained at."""

    voxel_size: tuple[float, float, float] | None = None
    """Voxel size (z, y, x) in nanometres that the network was trained at; None if nothing says.
    A training needs it where its volumes differ by more than 1.5 times on an axis."""

    @field_validator("input_shape", "voxel_size")
    @classmethod
    def _positive_sizes(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and min(value) <= 0:
            raise ValueError("must be positive on every axis")
        return value

    @field_validator("input_shape")
    @classmethod
    def _possible_shape(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        if prod(shape) > MOST_VOXELS:
            raise ValueError(f"has {prod(shape)} voxels, and {MOST_VOXELS} are the most")
        return shape

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.isotropy) != len(self.filters):
            raise ValueError(
                f"isotropy has {len(self.isotropy)} levels but filters has {len(self.filters)}"
            )
        for name, channels in [
            *(("filters", f) for f in self.filters),
            ("embed_dim", self.embed_dim),
        ]:
            if channels % self.norm_groups:
                raise ValueError(
                    f"{name} {channels} is not a multiple of norm_groups {self.norm_groups}"
                )
        if self.embed_dim % self.attention_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        return self

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distances (z, y, x) of voxels: `voxel_size`, or that of the published network."""
        return self.voxel_size or PUBLISHED_VOXEL_SIZE

    @property
    def levels(self) -> int:
        """Number of backbone levels."""
        return len(self.filters)

    def kernel(self, level: int) -> tuple[int, int, int]:
        """Return the kernel (z, y, x) of the convolutions that change level."""
        return (3, 3, 3) if self.isotropy[level] else (1, 3, 3)

    def stride(self, level: int) -> tuple[int, int, int]:
        """Return the stride (z, y, x) from the level above to this one."""
        if level == 0:
            return (1, 1, 1)
        return (2, 2, 2) if self.isotropy[level] else (1, 2, 2)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "model configuration") -> ModelConfig:
        """Read a configuration from a JSON object; see `from_values`."""
        try:
            return cls.from_values(parse_json(text), source)
        except ValueError as error:
            raise InputError(f"{source} is not JSON: {error}") from None
