"""What the specifications of a prediction and of a stitch share: the grid they work on."""

from typing import Any

from pydantic import field_validator

from agq.blockwise.blocks.grid import BlockGrid
from agq.errors import InputError
from agq.settings import Settings


class GridSpec(Settings):
    """Work on the blocks of one volume; JSON round trip."""

    grid: dict[str, Any]
    """`BlockGrid.to_dict` of the whole volume."""

    @field_validator("grid")
    @classmethod
    def _grid_is_valid(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            return BlockGrid.from_dict(value).to_dict()
        except InputError as error:
            raise ValueError(str(error)) from None

    def block_grid(self) -> BlockGrid:
        """Return the grid of the whole volume."""
        return BlockGrid.from_dict(self.grid)
