"""Tasks that the stitch gives to dask to find evidence and merges: paths in, files out.

Nothing large passes through the scheduler. Every task may run twice or be cut off anywhere: its
files appear whole or not at all, with the same bytes, and an existing file is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.sidecar import SidecarFile, open_sidecar
from agq.blockwise.stitch.evidence.contacts import ContactTable, Evidence, NodeTable
from agq.blockwise.stitch.evidence.from_sidecars import collect
from agq.blockwise.stitch.files import StitchFiles
from agq.blockwise.stitch.merge.graph import (
    NO_EDGES,
    Graph,
    LowerFace,
    ScoreTable,
    UpperFace,
    contract,
)
from agq.blockwise.stitch.merge.rule import Thresholds, score_contacts
from agq.blockwise.stitch.superblocks import Superblock, join
from agq.blockwise.storage.npz import array_table, load_arrays, map_array, save_arrays, table_arrays


def collect_leaves(
    run_dir: str,
    grid: dict[str, Any],
    overlap: bool,
    leaves: Sequence[tuple[Superblock, Sequence[int]]],
) -> tuple[int, int]:
    """Write the evidence of some leaves, given with their blocks; count fragments and contacts."""
    files, blocks = StitchFiles(Path(run_dir)), BlockGrid.from_dict(grid)
    present = map_array(files.present)

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


def leaf_graph(files: StitchFiles, leaf: Superblock, thresholds: Thresholds) -> Graph:
    """Return the graph of a leaf; what it shares with others is read from their files."""
    path = files.evidence(leaf)
    ids = load_arrays(path, "nodes.ids")["nodes.ids"]

    def scored(file: Path, part: str) -> ScoreTable:
        contacts = load_contacts(file, part) if file.exists() else ContactTable.empty()
        return score_contacts(contacts, thresholds)

    above = [scored(path, f"face{axis}") for axis in range(3)]
    below = [scored(files.evidence(leaf.neighbor(axis, -1)), f"face{axis}") for axis in range(3)]
    return Graph.of_fragments(ids, scored(path, "contacts"), above, below)


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
            graph = leaf_graph(files, superblock, thresholds)
        else:
            graph = _join_files(files, children)
        merges, residual = contract(graph)
        arrays = table_arrays("edges", residual.edges) | {"nodes": residual.nodes}
        for axis in range(3):
            arrays |= table_arrays(f"upper{axis}", residual.upper[axis])
            arrays |= table_arrays(f"lower{axis}", residual.lower[axis])
        save_arrays(files.graph(superblock), arrays)
        # Written last: once it is there, the graph is.
        save_arrays(
            files.merges(superblock), table_arrays("merges", merges) | {"up": residual.nodes}
        )
    return len(superblocks)


def _join_files(files: StitchFiles, children: Sequence[Superblock]) -> Graph:
    def column(child: Superblock, name: str) -> NDArray:
        return load_arrays(files.graph(child), f"edges.{name}")[f"edges.{name}"]

    graphs = []
    for child in children:
        arrays = load_arrays(files.graph(child), "nodes", "upper", "lower")
        z, y, x = (array_table(UpperFace, f"upper{axis}", arrays) for axis in range(3))
        c, b, a = (array_table(LowerFace, f"lower{axis}", arrays) for axis in range(3))
        graphs.append((child, Graph(arrays["nodes"], NO_EDGES, (z, y, x), (c, b, a))))
    return join(graphs, column)
