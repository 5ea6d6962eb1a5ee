"""Contacts between fragments, and how they are collected from the sidecars of blocks.

**Classes.** A contact is a pair of 6-connected voxels with different fragments. It is *across* if
the two voxels belong to different blocks, *within* if they belong to one block.

**Units.** Affinities are stored as uint8 (``round(255 * a)``). Across a face two blocks may have
predicted the same contact; its affinity is then the mean of both. To keep means of two integers
whole, all sums here are in *half units*: affinity in 1/510, ``a_lower + a_upper`` where both blocks
read the plane, ``2 * a`` where only the upper one did, and ``2 * a`` inside a block.

**Which affinity.** On a face on axis ``d`` between a lower block A and an upper block B, channel
``d`` of the first plane of B: the mean of A's and B's predictions if A read that plane, else B's.

**Overlap.** On the planes that both blocks labelled (the first of B, if A read it, and the last of
A, if B read it): voxels that are u for A and v for B, and the voxels of u and of v there. Labels
that meet there but do not touch across the face have a row too.

**Fragments of another model** are cut at block borders into pieces with ids of their own
(:mod:`names`). Where sidecars hold the names that pieces had before, the tables hold them too, and
two pieces of one name are no contact.

Every column is additive, so partial tables can be cut and merged in any way: :func:`merge_evidence`
sorts and reduces them, and its result does not depend on the partition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.blocks.label_pairs import PairColumns, PairTable
from agq.blockwise.blocks.packs import pack_sidecars
from agq.blockwise.blocks.sidecar import SidecarFile, open_sidecar
from agq.blockwise.stitch.superblocks import StitchFiles, SuperblockTask
from agq.blockwise.stitch.workers import Task
from agq.blockwise.storage.arrays import (
    Boxes,
    Columns,
    Ids,
    Numbers,
    load_arrays,
    map_array,
)
from agq.errors import InputError

FORMAT_VERSION = 2

PARTS = ("contacts", "face0", "face1", "face2")
"""Tables of contacts in the file of a leaf."""

_WITHIN = ("within_sum", "within_count")
_OVERLAP = ("overlap", "size_u", "size_v")


@dataclass(frozen=True)
class ContactTable(Columns):
    """Contacts between pairs of fragments.

    Attributes
    ----------
    u, v
        Fragment ids, ``u < v``; sorted by (u, v) and distinct once merged.
    across_sum, across_count
        Sum of affinities in half units, and number, of contacts across a block border.
    within_sum, within_count
        The same for contacts inside one block.
    overlap, size_u, size_v
        On planes that two blocks labelled: voxels of both u and v, of u, and of v. Zero where it
        was not collected.
    """

    u: Ids
    v: Ids
    across_sum: Numbers
    across_count: Numbers
    within_sum: Numbers
    within_count: Numbers
    overlap: Numbers
    size_u: Numbers
    size_v: Numbers

    @classmethod
    def across(cls, u: Ids, v: Ids, total: Numbers, count: Numbers) -> ContactTable:
        """Return contacts across a block border, without overlap."""
        none = np.zeros(len(u), np.int64)
        return cls(u, v, total, count, none, none, none, none, none)

    @classmethod
    def within(cls, u: Ids, v: Ids, total: Numbers, count: Numbers) -> ContactTable:
        """Return contacts inside blocks."""
        none = np.zeros(len(u), np.int64)
        return cls(u, v, none, none, total, count, none, none, none)


@dataclass(frozen=True)
class NodeTable(Columns):
    """Fragments.

    Attributes
    ----------
    ids
        Fragment ids, ascending and distinct.
    sizes
        Voxels.
    boxes
        Bounding box in voxels of the volume.
    """

    ids: Ids
    sizes: Numbers
    boxes: Boxes


@dataclass(frozen=True)
class Evidence:
    """Fragments and contacts of a box of blocks.

    Attributes
    ----------
    nodes
        Fragments of the blocks.
    contacts
        Contacts between two of them; distinct pairs.
    faces
        On each axis (z, y, x), the contacts across the upper faces of the box: ``u`` inside,
        ``v`` in the next box.
    names
        Of fragments of another model, the name of each node, uint64; None: nodes have no others.
    pairs
        The names of both ends of the contacts and of those of the faces, the smaller one first,
        uint64 (n, 2); empty without names.
    """

    nodes: NodeTable
    contacts: ContactTable
    faces: tuple[ContactTable, ContactTable, ContactTable]
    names: NDArray[np.uint64] | None = None
    pairs: Sequence[NDArray[np.uint64]] = ()

    def arrays(self, *, overlap: bool) -> dict[str, NDArray]:
        """Return what a file of a leaf holds; columns that can only be zero are left out."""
        unused = () if overlap else _OVERLAP
        arrays = self.nodes.arrays("nodes")
        for part, table in zip(PARTS, (self.contacts, *self.faces), strict=True):
            for name, column in table.arrays(part).items():
                if not name.endswith(unused if part == "contacts" else (*_WITHIN, *unused)):
                    arrays[name] = column
        if self.names is not None:
            arrays["names"] = self.names
            arrays |= {f"{part}.names": p for part, p in zip(PARTS, self.pairs, strict=True)}
        return arrays


def load_contacts(path: Path, part: str) -> ContactTable:
    """Read one of :data:`PARTS` of the file of a leaf."""
    return load_named_contacts(path, part)[0]


def load_named_contacts(path: Path, part: str) -> tuple[ContactTable, NDArray[np.uint64]]:
    """Read one of :data:`PARTS` of the file of a leaf, and the names of both ends, (n, 2)."""
    arrays = load_arrays(path, f"{part}.")
    none = np.zeros(len(arrays[f"{part}.u"]), np.int64)
    zeros = {f"{part}.{name}": none for name in (*_WITHIN, *_OVERLAP)}
    table = ContactTable.of_arrays(part, zeros | arrays)
    names = arrays.get(f"{part}.names")
    if names is None:
        names = np.stack((table.u, table.v), axis=1)
    return table, names


def merge_contacts(tables: Iterable[ContactTable]) -> ContactTable:
    """Add up contact tables: one sorted row for each pair.

    Raises
    ------
    InputError
        If a row does not have ``u < v`` (a fragment cannot touch itself).
    """
    table = ContactTable.concatenate([table for table in tables if len(table)])
    if not len(table):
        return table
    u, v = table.u, table.v
    if bool(np.any(u >= v)):
        row = int(np.flatnonzero(u >= v)[0])
        raise InputError(f"contact table: pair ({u[row]}, {v[row]}) must have u < v")
    table = table.take(np.lexsort((v, u)))
    u, v = table.u, table.v
    first = np.flatnonzero(np.concatenate(([True], (u[1:] != u[:-1]) | (v[1:] != v[:-1]))))
    sums = (np.add.reduceat(getattr(table, name), first) for name in table.names()[2:])
    return ContactTable(u[first], v[first], *sums)


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
    upper_affinity = above["low_affinity"].astype(np.uint16)
    pairs = PairTable(ordered=True)
    pairs.add(high, low, upper_affinity + below.get("after_affinity", upper_affinity))
    touching = pairs.columns()
    u, v, total, count = touching.u, touching.v, touching.total, touching.count
    none = np.zeros(len(u), np.int64)
    overlaps: list[NDArray] = [none, none, none]
    if overlap:
        u, v, total, count, *overlaps = _with_overlaps(lower, upper, axis, touching)
        none = np.zeros(len(u), np.int64)
    # The upper block has the larger number, so u < v holds for the global ids.
    u, v = _ids(lower.number, u), _ids(upper.number, v)
    return ContactTable(u, v, total, count, none, none, *overlaps)


def _with_overlaps(
    lower: SidecarFile, upper: SidecarFile, axis: int, touching: PairColumns
) -> list[NDArray]:
    """Add the pairs of labels that overlap to those that touch.

    Returns
    -------
    list
        Columns: u, v, total and count of the contacts, overlap, size_u, size_v.
    """
    planes = []
    after = lower.frame(f"outer_{axis}").get("after_labels")
    if after is not None:
        planes.append((after, upper.frame(f"low_{axis}")["low_labels"]))
    before = upper.frame(f"outer_{axis}").get("before_labels")
    if before is not None:
        planes.append((lower.frame(f"high_{axis}")["high_labels"], before))
    pairs = PairTable(ordered=True)
    for one, other in planes:
        pairs.add(one, other, np.zeros(one.shape, np.uint8))
    shared = pairs.columns()
    sizes = []
    is_fragment = np.ones(len(shared), bool)
    for side, (file, labels) in enumerate(((lower, shared.u), (upper, shared.v))):
        nodes = file.frame("tables")["nodes"]
        size = np.zeros(int(nodes[-1]) + 1 if len(nodes) else 1, np.int64)
        for pair in planes:
            size += np.bincount(pair[side].reshape(-1), minlength=len(size))[: len(size)]
        sizes.append(size)
        # A label that a block has only outside its write box is no fragment.
        is_fragment &= np.isin(labels, nodes)
    shared = shared.take(is_fragment)
    shift = np.uint64(32)
    touch, meet = ((pairs.u << shift) | pairs.v for pairs in (touching, shared))
    either = np.union1d(touch, meet)
    sums = np.zeros((3, len(either)), np.int64)
    rows = np.searchsorted(either, touch)
    sums[0, rows], sums[1, rows] = touching.total, touching.count
    sums[2, np.searchsorted(either, meet)] = shared.count
    u, v = either >> shift, either & np.uint64(2**32 - 1)
    size_u, size_v = (
        size[labels.astype(np.int64)] for size, labels in zip(sizes, (u, v), strict=True)
    )
    return [u, v, *sums, size_u, size_v]


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
    names = _Names()
    kept: dict[int, SidecarFile] = {}
    nodes: list[NodeTable] = []
    contacts: list[ContactTable] = []
    faces: tuple[list[ContactTable], ...] = ([], [], [])
    # In ascending order a block's lower neighbours come before it: once it has been the lower one
    # itself, it is not needed again. So memory holds about one layer of blocks.
    for number in sorted(batch):
        lower = kept.pop(number, None) or read(number)
        fragments, inner = block_evidence(lower, grid)
        nodes.append(fragments)
        contacts.append(inner)
        names.add(lower)
        for axis in range(3):
            above = grid.neighbor(number, axis)
            if above is None or not present[above]:
                continue
            upper = kept.get(above) or read(above)
            across = face_contacts(lower, upper, axis, grid, overlap=overlap)
            if above in batch:
                kept[above] = upper
                contacts.append(across)
            else:
                faces[axis].append(across)
                names.add(upper)
    fragments = NodeTable.concatenate(nodes)
    inside, z, y, x = (ContactTable.concatenate(tables) for tables in (contacts, *faces))
    if not names:
        return Evidence(fragments, inside, (z, y, x))
    apart = [names.apart(table) for table in (inside, z, y, x)]
    inside, z, y, x = (table for table, _ in apart)
    pairs = [pair for _, pair in apart]
    return Evidence(fragments, inside, (z, y, x), names.of(fragments.ids), pairs)


class _Names:
    """Names that fragments had in the volume that they were imported from."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Ids, Ids]] = {}
        self._table: tuple[Ids, Ids] | None = None

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def add(self, file: SidecarFile) -> None:
        """Take those of a block; it may have none."""
        if file.number not in self._blocks and file.has("tables", "original_labels"):
            tables = file.frame("tables")
            ids = _ids(file.number, tables["nodes"])
            self._blocks[file.number] = ids, tables["original_labels"]

    def of(self, ids: Ids) -> Ids:
        """Return the names of fragments."""
        if self._table is None:
            blocks = [self._blocks[number] for number in sorted(self._blocks)]
            every, names = (np.concatenate(column) for column in zip(*blocks, strict=True))
            self._table = every, names
        every, names = self._table
        return names[np.searchsorted(every, ids)]

    def apart(self, contacts: ContactTable) -> tuple[ContactTable, NDArray[np.uint64]]:
        """Return the contacts of two names, and these names."""
        u, v = self.of(contacts.u), self.of(contacts.v)
        differ = u != v
        pairs = np.stack((np.minimum(u, v), np.maximum(u, v)), axis=1)
        return contacts.take(differ), pairs[differ]


@dataclass(frozen=True)
class Collect(SuperblockTask):
    """Write the evidence of leaves, with overlaps or without."""

    grid: BlockGrid
    overlap: bool

    def run(self) -> tuple[int, int, int]:
        """Return the numbers of fragments, contacts, and leaves whose fragments have names."""
        files = StitchFiles(self.run_dir)
        present = map_array(files.present)

        def read(number: int) -> SidecarFile:
            return open_sidecar(self.run_dir, number)

        fragments = contacts = named = 0
        for leaf, numbers in self.items:
            path = files.evidence(leaf)
            if not path.exists():
                evidence = collect(numbers, self.grid, present, read, overlap=self.overlap)
                files.save(path, evidence.arrays(overlap=self.overlap))
            columns = load_arrays(path, "nodes.sizes", "names", *(f"{name}.u" for name in PARTS))
            named += columns.pop("names", None) is not None
            fragments += len(columns.pop("nodes.sizes"))
            contacts += sum(len(column) for column in columns.values())
        return fragments, contacts, named


@dataclass(frozen=True)
class PackSidecars(Task):
    """Pack the sidecars in some folders, whose evidence is collected."""

    items: Sequence[Path]

    def run(self) -> int:
        """Return how many sidecars were packed."""
        return sum(map(pack_sidecars, self.items))


def read_evidence(run_dir: Path) -> Evidence:
    """Return the whole evidence that a stitch left in a run folder, in one table.

    For volumes small enough; the stitch itself never does this.

    Raises
    ------
    InputError
        If the run is not stitched.
    """
    paths = sorted(StitchFiles(run_dir).contacts.glob("0/*.npz"))
    if not paths:
        raise InputError(f"{run_dir} is not stitched yet; `agq stitch` it first")
    nodes = NodeTable.concatenate([NodeTable.load(path, "nodes") for path in paths])
    contacts = merge_contacts(load_contacts(path, part) for path in paths for part in PARTS)
    names = [arrays["names"] for p in paths if (arrays := load_arrays(p, "names"))]
    order = np.argsort(nodes.ids, kind="stable")
    return Evidence(
        nodes.take(order),
        contacts,
        (ContactTable.empty(),) * 3,
        np.concatenate(names)[order] if names else None,
    )
