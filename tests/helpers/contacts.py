"""Contacts of made-up runs as the sidecars give them, in a form that can be compared."""

import numpy as np

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.sidecar import SidecarFile
from agq.blockwise.stitch.contacts import (
    ContactTable,
    Evidence,
    NodeTable,
    collect,
    merge_contacts,
)

COLUMNS = ("u", "v", "across_sum", "across_count", "within_sum", "within_count")
OVERLAP = ("overlap", "size_u", "size_v")


def rows(evidence: Evidence, columns=COLUMNS):
    listed = [getattr(evidence.contacts, name).tolist() for name in columns]
    table = evidence.nodes
    nodes = zip(table.ids.tolist(), table.sizes.tolist(), table.boxes.tolist(), strict=True)
    return list(zip(*listed, strict=True)), sorted(nodes)


def files(run) -> dict[int, SidecarFile]:
    return {number: SidecarFile(s.to_bytes()) for number, s in run.sidecars.items()}


def from_sidecars(run, batches=None, *, overlap=False):
    present = np.zeros(run.grid.n_blocks, bool)
    present[list(run.sidecars)] = True
    if batches is None:
        batches = [range(run.grid.n_blocks)]
    read = files(run).__getitem__
    parts = [collect(batch, run.grid, present, read, overlap=overlap) for batch in batches]
    nodes = NodeTable.concatenate([part.nodes for part in parts])
    contacts = merge_contacts(t for part in parts for t in (part.contacts, *part.faces))
    if not overlap:  # without it, every pair of a leaf has one row already
        assert sum(len(part.contacts) + sum(map(len, part.faces)) for part in parts) == len(
            contacts
        )
    return Evidence(nodes, contacts, (ContactTable.empty(),) * 3)


def grid(write, before, after, shape=(11, 33, 26)) -> BlockGrid:
    return BlockGrid(
        volume_shape=shape, voxel_size=(30, 6, 6), write_shape=write, before=before, after=after
    )
