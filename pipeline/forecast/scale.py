"""What single processes, the database and file quotas must bear, from the size of the grid.

Each rate was measured; docs/scale.md names the command. Most grow with the blocks. The last merge
of the stitch grows with the cross-sections of the volume: it holds the contacts of the clusters
that reach from one half of the volume into the other, on all three axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.stitch.merge.agglomeration import MAX_EDGES
from agq.blockwise.stitch.superblocks import leaf_shape
from agq.blockwise.storage.files import format_bytes
from agq.blockwise.volumes.triples import Triple

COORDINATOR_BYTES: Final = 77.0
"""Of the coordinator of a prediction, for each block of the ROI; beside `BASE_BYTES`."""

FIRST_BLOCK_S: Final = 1.4e-6
"""CPU seconds, for each block of the ROI, before the first one is handed out."""

CLIENT_BYTES: Final = 60.0
"""Of the process that runs the stitch, for each block."""

BASE_BYTES: Final = 3.0e8
"""Of either, whatever the size."""

LEDGER_BYTES: Final = 600.0
"""Of the database, for each block, indexes included."""

EDGE_BYTES: Final = 79.0
"""Of the process that does the last merge, for each edge."""

EDGE_S: Final = 1.3e-6
"""CPU seconds of it, for each edge."""

FILES_QUOTA: Final = 1_000_000
"""Many clusters allow so many files."""

NODE_BYTES: Final = 2**38
"""A large node has so much memory: 256 GiB."""


@dataclass(frozen=True)
class Density:
    """How much a volume is cut up.

    Attributes
    ----------
    name
        For people.
    fragments
        In a Mvoxel.
    edges
        That a block's side in a cross-section of the volume leaves to the last merge.
    """

    name: str
    fragments: float
    edges: float


SPARSE: Final = Density("sparse", 95, 610)
DENSE: Final = Density("dense", 930, 1650)
DENSITIES: Final = (SPARSE, DENSE)


class Scale(BaseModel):
    """What single parts of a run must bear."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files_peak: int
    """Files before any are packed: a block has one each of fragments, evidence, affinities."""

    coordinator_bytes: int
    """Memory of the coordinator of the prediction."""

    first_block_s: float
    """CPU seconds before the first block is handed out."""

    client_bytes: int
    """Memory of the process that runs the stitch."""

    leaves: int
    """Leaf superblocks of the stitch: files that a folder of its tables has."""

    leaf_blocks: int
    """Blocks of one."""

    ledger_bytes: int
    """Of the database, if there is one."""

    root_edges: float
    """Edges of the last merge, which one process does."""

    root_bytes: int
    """Memory of that process."""

    root_s: float
    """CPU seconds of it."""

    def limits(self) -> list[str]:
        """Say what a usual cluster or this software does not bear, and what helps."""
        said = []
        memory = format_bytes(self.root_bytes)
        if self.root_edges > MAX_EDGES:
            said.append(
                f"the last merge of the stitch may have {self.root_edges:.1e} edges; one process "
                f"takes {MAX_EDGES:.1e}: set stitch.min_contact"
            )
        elif self.root_bytes > NODE_BYTES:
            said.append(f"the last merge of the stitch may need {memory} in one process")
        if self.coordinator_bytes > NODE_BYTES / 8:
            needed = format_bytes(self.coordinator_bytes)
            said.append(
                f"the coordinator needs about {needed} on its node: larger blocks, or parts of the "
                "volume one after the other (input.roi)"
            )
        if self.files_peak > FILES_QUOTA:
            said.append(
                f"about {self.files_peak:,} files until the stitch packs them: ask for that quota, "
                "or choose larger blocks"
            )
        return said


def cross_sections(shape: Triple) -> int:
    """Return the block sides in three planes that halve a grid of blocks, both sides counted."""
    z, y, x = shape
    return 2 * sum(area for area, n in ((y * x, z), (z * x, y), (z * y, x)) if n > 1)


def scale(
    grid: BlockGrid, selected: int, blocks: int, density: Density, *, affinities: bool = False
) -> Scale:
    """Work out what a run asks of single processes.

    Parameters
    ----------
    grid
        Blocks of the whole volume.
    selected, blocks
        Of the ROI, and of these those that are not masked.
    density
        Of what is stitched.
    affinities
        Whether they are kept.
    """
    leaf = leaf_shape(grid.shape, max(blocks, 1), 1, 512)
    leaves = math.prod(-(-n // side) for n, side in zip(grid.shape, leaf, strict=True))
    # A part of the grid is taken for a box of its proportions.
    share = (blocks / grid.n_blocks) ** (2 / 3)
    edges = share * cross_sections(grid.shape) * density.edges
    # Never more than all contacts: the made-up graph has 6.3 for each fragment, AC4 6.1.
    edges = min(edges, 6.3 * density.fragments * blocks * math.prod(grid.write_shape) / 1e6)
    return Scale(
        files_peak=(3 if affinities else 2) * blocks,
        coordinator_bytes=int(BASE_BYTES + COORDINATOR_BYTES * selected),
        first_block_s=FIRST_BLOCK_S * selected,
        client_bytes=int(BASE_BYTES + CLIENT_BYTES * blocks),
        leaves=min(blocks, leaves),
        leaf_blocks=math.prod(leaf),
        ledger_bytes=int(LEDGER_BYTES * blocks),
        root_edges=edges,
        root_bytes=int(BASE_BYTES + EDGE_BYTES * edges),
        root_s=EDGE_S * edges,
    )
