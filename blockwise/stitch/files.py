"""Where the stitch keeps what it makes in a run folder, and the layout of superblocks.

::

    contacts/layout.json        blocks of a leaf superblock
    contacts/present.npy        which blocks take part
    contacts/0/Z-Y-X.npz        fragments and contacts of a leaf
    agglomeration/L/Z-Y-X.npz   merges of a superblock, and the nodes it hands up
    agglomeration/L/Z-Y-X.graph.npz  its residual graph; removed when the root is done
    lut/cut/L/Z-Y-X.npz         clusters of a superblock at the margin in use
    lut/names/L/Z-Y-X.npz       what its clusters are called in the end
    lut/map/Z-Y-X.npz           segment ids of a leaf, by block
    lut/smallest.npy            smallest fragment of each segment, ascending
    lut/segments.parquet        table of segments
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.superblocks import Superblock


@dataclass(frozen=True)
class StitchFiles:
    """Paths of a run's stitch."""

    run_dir: Path

    @property
    def contacts(self) -> Path:
        """Evidence."""
        return Path(self.run_dir) / "contacts"

    @property
    def agglomeration(self) -> Path:
        """Merges."""
        return Path(self.run_dir) / "agglomeration"

    @property
    def lut(self) -> Path:
        """Id map and segments."""
        return Path(self.run_dir) / "lut"

    @property
    def present(self) -> Path:
        """Which blocks take part, bool (n_blocks,)."""
        return self.contacts / "present.npy"

    def evidence(self, leaf: Superblock) -> Path:
        """Fragments and contacts of a leaf."""
        return self.contacts / f"{leaf.name}.npz"

    def merges(self, superblock: Superblock) -> Path:
        """Path of the merges of a superblock and the nodes it hands up."""
        return self.agglomeration / f"{superblock.name}.npz"

    def graph(self, superblock: Superblock) -> Path:
        """Residual graph of a superblock."""
        return self.agglomeration / f"{superblock.name}.graph.npz"

    def cut(self, superblock: Superblock) -> Path:
        """Clusters of a superblock."""
        return self.lut / "cut" / f"{superblock.name}.npz"

    def names(self, superblock: Superblock) -> Path:
        """Path of what became of all that entered a superblock."""
        return self.lut / "names" / f"{superblock.name}.npz"

    def map(self, leaf: Superblock) -> Path:
        """Segment ids of a leaf."""
        return self.lut / "map" / f"{leaf.name[2:]}.npz"

    @property
    def smallest(self) -> Path:
        """Smallest fragment of each segment, uint64, ascending."""
        return self.lut / "smallest.npy"

    @property
    def segments(self) -> Path:
        """Table of segments."""
        return self.lut / "segments.parquet"


def leaf_shape(
    grid_shape: Sequence[int], blocks: int, cores: int, most: int
) -> tuple[int, int, int]:
    """Return a compact box of blocks, small enough to keep all workers busy.

    Parameters
    ----------
    grid_shape
        Blocks of the whole volume, (z, y, x).
    blocks
        Blocks that take part.
    cores
        Threads of all workers.
    most
        Most blocks in a box.
    """
    most = min(most, -(-blocks // (4 * cores)))
    shape = [1, 1, 1]
    while True:
        open_axes = [d for d in range(3) if shape[d] < grid_shape[d]]
        axis = min(open_axes, key=lambda d: shape[d], default=None)
        if axis is None or 2 * shape[0] * shape[1] * shape[2] > most:
            return shape[0], shape[1], shape[2]
        shape[axis] *= 2


def groups(weights: NDArray[np.int64], tasks: int) -> list[slice]:
    """Cut items into at most about ``tasks`` runs of similar weight."""
    if not len(weights):
        return []
    ends = np.cumsum(weights)
    share = max(1, int(ends[-1]) // max(1, tasks))
    cuts = np.flatnonzero(np.diff((ends - 1) // share)) + 1
    edges = [0, *cuts.tolist(), len(weights)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
