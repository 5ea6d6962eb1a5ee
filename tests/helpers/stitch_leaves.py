"""The evidence of made-up graphs, as the stitch writes it for its leaves."""

from pathlib import Path

import numpy as np

from agq.blockwise.blocks.grid import LOCAL_BITS
from agq.blockwise.stitch.contacts import ContactTable, Evidence, NodeTable
from agq.blockwise.stitch.superblocks import StitchFiles, SuperblockTree


def contacts(rows) -> ContactTable:
    """Contacts whose scores at a threshold of 0.5 are those of the rows."""
    u, v, numerator, denominator = np.array(rows, object).reshape(-1, 4).T
    count = denominator.astype(np.int64)
    total = numerator.astype(np.int64) + 255 * count
    return ContactTable.across(u.astype(np.uint64), v.astype(np.uint64), total, count)


def write_leaves(run_dir: Path, shape, leaf, nodes, sizes, rows):
    """Write the evidence as the first step does; return the levels of the tree."""
    run_dir.mkdir(exist_ok=True)
    files, tree = StitchFiles(run_dir), SuperblockTree(shape, leaf)
    leaves = tree.leaves(np.arange(np.prod(shape)))
    of = {number: place for place, numbers in leaves for number in numbers.tolist()}
    for place, numbers in leaves:
        own = [n for n in nodes if n >> LOCAL_BITS in set(numbers.tolist())]
        mine = [r for r in rows if of[r[0] >> LOCAL_BITS] == place]
        inner = [r for r in mine if of[r[1] >> LOCAL_BITS] == place]
        faces = [
            [r for r in mine if of[r[1] >> LOCAL_BITS] == place.neighbor(axis, 1)]
            for axis in range(3)
        ]
        begin = np.array([[n % 97, n % 89, n % 83] for n in own], np.int64).reshape(-1, 3)
        table = NodeTable(
            np.array(own, np.uint64),
            np.array([sizes[n] for n in own], np.int64),
            np.concatenate((begin, begin + 2), axis=1),
        )
        z, y, x = (contacts(face) for face in faces)
        evidence = Evidence(table, contacts(inner), (z, y, x))
        files.save(files.evidence(place), evidence.arrays(overlap=False))
    return files, [leaves, *tree.levels(leaves)]
