"""Tasks that the stitch gives to dask to find evidence and merges: paths in, files out.

Nothing large passes through the scheduler. Every task may run twice or be cut off anywhere: its
files appear whole or not at all, with the same bytes, and a file that is there is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockwise.agglomerate import Thresholds, score_edges
from blockwise.agglomerate_graph import EdgeTable, Graph, contract, positions
from blockwise.agglomerate_tree import Faces, Superblock, join
from blockwise.array_files import array_table, load_arrays, save_arrays, table_arrays
from blockwise.contacts import ContactTable, Evidence, NodeTable
from blockwise.contacts_blocks import collect
from blockwise.grid import BlockGrid
from blockwise.sidecar import SidecarFile, open_sidecar
from blockwise.stitch_files import StitchFiles


def collect_leaves(
    run_dir: str,
    grid: dict[str, Any],
    overlap: bool,
    leaves: Sequence[tuple[Superblock, Sequence[int]]],
) -> tuple[int, int]:
    """Write the evidence of some leaves, given with their blocks; count fragments and contacts."""
    files, blocks = StitchFiles(Path(run_dir)), BlockGrid.from_dict(grid)
    present = np.load(files.present, mmap_mode="r", allow_pickle=False)

    def read(number: int) -> SidecarFile:
        return open_sidecar(Path(run_dir), number)

    fragments = contacts = 0
    for leaf, numbers in leaves:
        path = files.evidence(leaf)
        if not path.exists():
            save_evidence(path, collect(numbers, blocks, present, read, overlap=overlap), overlap)
        columns = load_arrays(path, "nodes.sizes", *(f"{name}.u" for name in PARTS))
        fragments += len(columns.pop("nodes.sizes"))
        contacts += sum(len(column) for column in columns.values())
    return fragments, contacts


PARTS = ("contacts", "face0", "face1", "face2")
"""Tables of contacts in the file of a leaf."""

_OVERLAP = ("overlap", "size_u", "size_v")


def save_evidence(path: Path, evidence: Evidence, overlap: bool) -> None:
    """Write the evidence of a leaf; columns that can only be zero are left out."""
    arrays = table_arrays("nodes", evidence.nodes)
    inner = table_arrays("contacts", evidence.contacts)
    unused = () if overlap else _OVERLAP
    arrays |= {name: a for name, a in inner.items() if not name.endswith(unused)}
    unused = ("within_sum", "within_count", *unused)
    for axis, face in enumerate(evidence.faces):
        columns = table_arrays(f"face{axis}", face)
        arrays |= {name: a for name, a in columns.items() if not name.endswith(unused)}
    save_arrays(path, arrays)


def load_contacts(path: Path, prefix: str) -> ContactTable:
    """Read ``contacts``, ``face0``, ``face1`` or ``face2`` of a leaf."""
    arrays = load_arrays(path, f"{prefix}.")
    none = np.zeros(len(arrays[f"{prefix}.u"]), np.int64)
    names = ("within_sum", "within_count", *_OVERLAP)
    return array_table(ContactTable, prefix, {f"{prefix}.{name}": none for name in names} | arrays)


def load_nodes(path: Path) -> NodeTable:
    """Read the fragments of a leaf."""
    return array_table(NodeTable, "nodes", load_arrays(path, "nodes."))


def leaf_graph(files: StitchFiles, leaf: Superblock, thresholds: Thresholds) -> tuple[Graph, Faces]:
    """Return the graph of a leaf; what it shares with others is read from their files."""
    path = files.evidence(leaf)
    ids = load_arrays(path, "nodes.ids")["nodes.ids"]
    edges = score_edges(load_contacts(path, "contacts"), thresholds)
    outside = np.zeros(len(ids), np.uint8)
    faces: list[EdgeTable] = []
    for axis in range(3):
        faces.append(score_edges(load_contacts(path, f"face{axis}"), thresholds))
        _mark(ids, outside, faces[-1].u, 3 + axis)
        below = files.evidence(leaf.neighbor(axis, -1))
        if below.exists():
            _mark(
                ids, outside, score_edges(load_contacts(below, f"face{axis}"), thresholds).v, axis
            )
    return Graph(ids, outside, edges), (faces[0], faces[1], faces[2])


def _mark(
    ids: NDArray[np.uint64], outside: NDArray[np.uint8], touched: NDArray[np.uint64], bit: int
) -> None:
    outside[positions(ids, touched)] |= np.uint8(1 << bit)


def contract_superblocks(
    run_dir: str,
    thresholds: Thresholds,
    superblocks: Sequence[tuple[Superblock, Sequence[Superblock]]],
) -> int:
    """Merge what is certain in some superblocks, given with their children; return how many."""
    files = StitchFiles(Path(run_dir))
    for superblock, children in superblocks:
        if files.merges(superblock).exists():
            continue
        if superblock.level == 0:
            graph, faces = leaf_graph(files, superblock, thresholds)
        else:
            graph, faces = join([(child, *_load_graph(files.graph(child))) for child in children])
        merges, residual = contract(graph)
        arrays = table_arrays("edges", residual.edges)
        for axis, face in enumerate(faces):
            arrays |= table_arrays(f"face{axis}", face)
        arrays |= {"nodes": residual.nodes, "outside": residual.outside}
        save_arrays(files.graph(superblock), arrays)
        # Written last: once it is there, the graph is.
        save_arrays(
            files.merges(superblock), table_arrays("merges", merges) | {"up": residual.nodes}
        )
    return len(superblocks)


def _load_graph(path: Path) -> tuple[Graph, Faces]:
    arrays = load_arrays(path)
    z, y, x = (array_table(EdgeTable, f"face{axis}", arrays) for axis in range(3))
    edges = array_table(EdgeTable, "edges", arrays)
    return Graph(arrays["nodes"], arrays["outside"], edges), (z, y, x)
