"""Contacts of a volume that fits in memory: what the blockwise ones come to."""

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.label_pairs import PairTable
from agq.blockwise.blocks.sidecar import measure
from agq.blockwise.stitch.contacts import ContactTable, Evidence, NodeTable, merge_contacts
from agq.errors import InputError


def contacts_from_volume(
    fragments: NDArray[np.uint64], affinities: NDArray, border_mask: NDArray[np.bool_]
) -> Evidence:
    """Return the evidence of a whole volume held in memory.

    Parameters
    ----------
    fragments
        Global fragment ids, uint64, (z, y, x); 0 is background.
    affinities
        (3, z, y, x): uint8 affinities, or uint16 affinities already in half units (0 to 510).
    border_mask
        (3, z, y, x): True where the contact of a voxel with its previous voxel on axis ``c``
        (channel ``c``) counts as *across*; elsewhere it counts as *within*.

    Raises
    ------
    InputError
        If shapes or types do not fit.
    """
    shape = (3, *fragments.shape)
    if fragments.ndim != 3 or affinities.shape != shape or border_mask.shape != shape:
        raise InputError(
            f"contacts: fragments {fragments.shape}, affinities {affinities.shape} and border mask"
            f" {border_mask.shape} do not fit together"
        )
    if fragments.dtype != np.uint64 or affinities.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"contacts: fragments are {fragments.dtype} (need uint64), affinities"
            f" {affinities.dtype} (need uint8, or uint16 in half units)"
        )
    scale = np.uint16(2 if affinities.dtype == np.uint8 else 1)
    across, within = PairTable(), PairTable()
    # Plane by plane, so that the copies below stay small.
    for z in range(len(fragments)):
        plane = fragments[z]
        for axis, before, after in (
            (0, fragments[z - 1] if z else None, plane),
            (1, plane[:-1], plane[1:]),
            (2, plane[:, :-1], plane[:, 1:]),
        ):
            if before is None:
                continue
            where = tuple(slice(1, None) if axis == d else slice(None) for d in (1, 2))
            values = affinities[axis, z][where].astype(np.uint16) * scale
            border = border_mask[axis, z][where]
            across.add(before, np.where(border, after, np.uint64(0)), values)
            within.add(before, np.where(border, np.uint64(0), after), values)
    a, w = across.columns(), within.columns()
    contacts = merge_contacts(
        (
            ContactTable.across(a.u, a.v, a.total, a.count),
            ContactTable.within(w.u, w.v, w.total, w.count),
        )
    )
    ids, dense = np.unique(fragments, return_inverse=True)
    sizes, boxes = measure(dense.reshape(fragments.shape), len(ids))
    nodes = NodeTable(ids, sizes, boxes.astype(np.int64)).take(np.flatnonzero(ids))
    return Evidence(nodes, contacts, (ContactTable.empty(),) * 3)
