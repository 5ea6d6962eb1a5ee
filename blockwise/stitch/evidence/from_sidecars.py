"""Contacts of blocks, read from their sidecars."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.blocks.label_pairs import PairTable
from agq.blockwise.blocks.sidecar import SidecarFile
from agq.blockwise.stitch.evidence.contacts import SAME, ContactTable, Evidence, NodeTable
from agq.errors import InputError


def _ids(number: int, local: NDArray) -> NDArray[np.uint64]:
    """Return fragment ids of labels that are known to be valid and not background."""
    return local.astype(np.uint64) | np.uint64(number << LOCAL_BITS)


def block_evidence(file: SidecarFile, grid: BlockGrid) -> tuple[NodeTable, ContactTable]:
    """Return the fragments of one block and the contacts inside it."""
    tables, number = file.frame("tables"), file.number
    origin = np.array(grid.write_box(number)[0] * 2, np.int64)
    nodes = NodeTable(_ids(number, tables["nodes"]), tables["sizes"], tables["boxes"] + origin)
    contacts = ContactTable.within(
        _ids(number, tables["u"]), _ids(number, tables["v"]), 2 * tables["aff_sum"], tables["count"]
    )
    return nodes, contacts


def face_contacts(
    lower: SidecarFile, upper: SidecarFile, axis: int, grid: BlockGrid, *, overlap: bool = False
) -> ContactTable:
    """Return the contacts across the face between two neighbouring blocks.

    Parameters
    ----------
    lower, upper
        Sidecars of a block and of the next block on ``axis`` (0 z, 1 y, 2 x).
    overlap
        Also compare their labels on the planes that both read.

    Raises
    ------
    InputError
        If the planes of the two blocks do not match.
    """
    below, above = lower.frame(f"high_{axis}"), upper.frame(f"low_{axis}")
    high, low = below["high_labels"], above["low_labels"]
    if high.shape != low.shape:
        raise InputError(
            f"sidecars of blocks {lower.number} and {upper.number}: faces on axis {axis} have"
            f" shapes {high.shape} and {low.shape}; they come from"
            " different grids, predict again with --overwrite"
        )
    own = above["low_affinity"].astype(np.uint16)
    pairs = PairTable(ordered=True)
    pairs.add(high, low, own + below.get("after_affinity", own))
    found = pairs.columns()
    u, v, total, count = found.u, found.v, found.total, found.count
    counted: tuple[NDArray, ...] = ()
    if overlap:
        u, v, (total, count), counted = _with_overlap(
            lower, upper, axis, found.u, found.v, total, count
        )
    if lower.has("tables", "original_labels") and upper.has("tables", "original_labels"):
        below_u = lower.frame("tables")["original_labels"][_rows(lower, u)]
        above_v = upper.frame("tables")["original_labels"][_rows(upper, v)]
        same = below_u == above_v
        total = np.where(same, SAME * count, total)
    # The upper block has the larger number, so u < v holds for the global ids.
    table = ContactTable.across(_ids(lower.number, u), _ids(upper.number, v), total, count)
    if not overlap:
        return table
    none = table.within_sum
    return ContactTable(table.u, table.v, total, count, none, none, *counted)


def _rows(file: SidecarFile, labels: NDArray) -> NDArray[np.int64]:
    return np.searchsorted(file.frame("tables")["nodes"], labels)


def _with_overlap(
    lower: SidecarFile,
    upper: SidecarFile,
    axis: int,
    u: NDArray[np.uint64],
    v: NDArray[np.uint64],
    total: NDArray[np.int64],
    count: NDArray[np.int64],
) -> tuple[NDArray, NDArray, tuple[NDArray, NDArray], tuple[NDArray, NDArray, NDArray]]:
    """Add overlap rows to contact rows; return u, v, (total, count), (overlap, size_u, size_v)."""
    planes = []
    after = lower.frame(f"outer_{axis}").get("after_labels")
    if after is not None:
        planes.append((after, upper.frame(f"low_{axis}")["low_labels"]))
    before = upper.frame(f"outer_{axis}").get("before_labels")
    if before is not None:
        planes.append((lower.frame(f"high_{axis}")["high_labels"], before))
    shared = PairTable(ordered=True)
    sizes = []
    for side, file in enumerate((lower, upper)):
        nodes = file.frame("tables")["nodes"]
        size = np.zeros(int(nodes[-1]) + 1 if len(nodes) else 1, np.int64)
        known = np.zeros(len(size), bool)
        known[nodes] = True
        for pair in planes:
            seen = np.bincount(pair[side].reshape(-1), minlength=len(size))
            size += seen[: len(size)]
        sizes.append((size, known))
    for one, other in planes:
        shared.add(one, other, np.zeros(one.shape, np.uint8))
    both = shared.columns()
    # A label that a block has only outside its write box is no fragment.
    is_node = [
        (labels < len(known)) & known[np.minimum(labels, len(known) - 1).astype(np.int64)]
        for labels, (_, known) in zip((both.u, both.v), sizes, strict=True)
    ]
    keep = is_node[0] & is_node[1]
    shift = np.uint64(32)
    touching = (u << shift) | v
    meeting = ((both.u << shift) | both.v)[keep]
    either = np.union1d(touching, meeting)
    sums = np.zeros((3, len(either)), np.int64)
    rows = np.searchsorted(either, touching)
    sums[0, rows], sums[1, rows] = total, count
    sums[2, np.searchsorted(either, meeting)] = both.count[keep]
    u, v = either >> shift, either & np.uint64(2**32 - 1)
    size_u, size_v = (
        size[labels.astype(np.int64)]
        for size, labels in zip([s for s, _ in sizes], (u, v), strict=True)
    )
    return u, v, (sums[0], sums[1]), (sums[2], size_u, size_v)


def collect(
    numbers: Sequence[int] | NDArray[np.int64],
    grid: BlockGrid,
    present: NDArray[np.bool_],
    read: Callable[[int], SidecarFile],
    *,
    overlap: bool = False,
) -> Evidence:
    """Return the evidence that a box of blocks owns: theirs, and that of their upper faces.

    Over any partition of the blocks of a run into boxes, every contact is owned once.

    Parameters
    ----------
    numbers
        Block numbers; those not ``present`` are left out.
    present
        For each block of the grid, whether it has a sidecar that counts (done, not skipped).
    read
        Returns the sidecar of a block.
    overlap
        Also collect overlaps.
    """
    batch = {int(number) for number in numbers if present[number]}
    kept: dict[int, SidecarFile] = {}
    nodes: list[NodeTable] = []
    contacts: list[ContactTable] = []
    faces: tuple[list[ContactTable], ...] = ([], [], [])
    # In ascending order a block's lower neighbours come before it, so once it has been the
    # lower one itself nothing asks for it again and memory stays at about one layer of blocks.
    for number in sorted(batch):
        own = kept.pop(number, None) or read(number)
        own_nodes, inner = block_evidence(own, grid)
        nodes.append(own_nodes)
        contacts.append(inner)
        for axis in range(3):
            above = grid.neighbor(number, axis)
            if above is None or not present[above]:
                continue
            upper = kept.get(above) or read(above)
            found = face_contacts(own, upper, axis, grid, overlap=overlap)
            if above in batch:
                kept[above] = upper
                contacts.append(found)
            else:
                faces[axis].append(found)
    z, y, x = (ContactTable.concatenate(face) for face in faces)
    return Evidence(NodeTable.concatenate(nodes), ContactTable.concatenate(contacts), (z, y, x))
