"""The settings that a checkpoint recommends for runs with it: names as in a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, model_validator

from agq.model.config import MOST_VOXELS, ModelConfig, Pieces
from agq.settings import Settings, Size

Fraction = Annotated[float, Field(ge=0, le=1)]


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has line ends or other characters that cannot be printed")
    return text


Line = Annotated[str, Field(max_length=300), AfterValidator(_one_line)]
"""What a checkpoint says in words."""


class _Model(Settings):
    pieces: Pieces | None = None
    """What a block is cut into."""

    mask_weight: Fraction | None = None
    """For supervoxels: weight of the masks against the affinities."""

    normalise: Literal["none", "volume", "section"] | None = None
    """How grey values are stretched."""


class _Blocks(Settings):
    read_shape: Size | None = None
    """What the network sees of a volume (z, y, x), in voxels; may be larger than at training."""


class _Stitch(Settings):
    across: Fraction | None = None
    """Threshold across block borders."""

    within: Fraction | None = None
    """Threshold inside blocks."""

    contact_weight: Literal["voxels", "sqrt"] | None = None
    """What a contact counts where contacts are pooled."""

    min_size: NonNegativeInt | None = None
    """Voxels of the smallest segment that is kept."""


class Recommended(Settings):
    """What a run with a checkpoint takes where its configuration says nothing.

    The sections and fields `model`, `blocks` and `stitch` have the names and the meaning of those
    in the configuration of a run; None says nothing. The others are for people.
    """

    model: _Model = _Model()
    """Of the network."""

    blocks: _Blocks = _Blocks()
    """Of the block grid."""

    stitch: _Stitch = _Stitch()
    """Of the stitch; chosen for these pieces and blocks."""

    tissue: Line | None = None
    """What the network was made for."""

    licence: Line | None = None
    """Of the weights."""

    notes: Line | None = None
    """How the settings were chosen."""

    @model_validator(mode="after")
    def _can_be_run(self) -> Self:
        within = self.stitch.within
        if self.model.pieces == "supervoxels" and (within is None or within >= 1):
            raise ValueError(
                "supervoxels must be joined inside blocks: stitch.within below 1 goes with them"
            )
        if prod(self.blocks.read_shape or ()) > MOST_VOXELS:
            raise ValueError(f"blocks.read_shape has more than {MOST_VOXELS} voxels")
        return self

    @classmethod
    def of(cls, settings: Mapping[str, Any], **facts: str | None) -> Recommended:
        """Return recommendations from settings by names such as ``stitch.across``, and facts.

        Raises
        ------
        InputError
            As `from_values`.
        """
        values: dict[str, Any] = dict(facts)
        for name, value in settings.items():
            section, _, field = name.partition(".")
            values.setdefault(section, {})[field] = value
        return cls.from_values(values, "recommended settings")

    @classmethod
    def published(cls, config: ModelConfig) -> Recommended:
        """Return the published rule, for a network of this configuration."""
        return cls(
            model=_Model(pieces="masks"),
            blocks=_Blocks(read_shape=config.input_shape),
            stitch=_Stitch(across=0.7, within=1.0, min_size=0),
            notes="the published rule",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What is recommended, by names such as ``stitch.across``."""
        found = leaves(self.model_dump())
        return {name: value for name, value in found.items() if value is not None}

    @property
    def facts(self) -> dict[str, str]:
        """What is said for people."""
        values = {"tissue": self.tissue, "licence": self.licence, "notes": self.notes}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return what is said as plain data, for files."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)

    def trained_on(self, own: Recommended, config: ModelConfig) -> Recommended:
        """Return what a network recommends that was trained from weights that recommend this.

        Parameters
        ----------
        own
            What its training says; of other pieces, nothing else is taken over.
        config
            Configuration of the network.

        Raises
        ------
        InputError
            If the settings do not go together.
        """
        chosen = own.model.pieces
        kept = self.settings if chosen in (None, self.model.pieces) else {}
        shape = {"blocks.read_shape": config.input_shape}
        return Recommended.of({**shape, **kept, **own.settings}, **own.facts)


def leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the sections of settings hold, by names such as ``stitch.across``."""
    return {
        f"{section}.{field}": value
        for section, fields in values.items()
        if isinstance(fields, Mapping)
        for field, value in fields.items()
    }
