"""Contacts of a stitched run, sorted by the segments that they lie in or between.

One pass over the leaves of the stitch; rows go to *parts* by their segment, through files where
they are many, so memory holds one leaf with its neighbours, or one part, and the table of segments.
All contacts inside a segment, and all between two, are in one part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agq.blockwise.stitch.classes import ClassRule, may_join_each
from agq.blockwise.stitch.contacts import PARTS, ContactTable, NodeTable, load_contacts
from agq.blockwise.stitch.edits import Constraints
from agq.blockwise.stitch.merge.agglomeration import score_contacts
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.stitch.superblocks import StitchFiles, Superblock
from agq.blockwise.storage.arrays import Boxes, Ids, Numbers, load_arrays
from agq.errors import InputError

NODE = np.dtype(
    [
        *((name, np.uint64) for name in ("segment", "id", "name", "group")),
        ("voxels", np.int64),
        ("box", np.int64, 6),
    ]
)
"""A fragment, or a piece of a named one; ``group`` is that of edits, 0 without."""

CONTACT = np.dtype(
    [
        *((name, np.uint64) for name in ("a", "b", "u", "v")),
        *((name, np.int64) for name in ("numerator", "denominator")),
        ("box", np.int64, 6),
        ("bound", np.bool_),
    ]
)
"""Segments a <= b of fragments u and v, their score, and the box in which they touch; or a bond,
which no evidence outweighs, between two that a name or an edit makes one."""

_ROWS = 2**21
"""Rows of a part, and of all parts in memory before they go to files."""


@dataclass(frozen=True)
class Segments:
    """The segments large enough to matter.

    Attributes
    ----------
    ids
        Their ids in the segmentation, ascending.
    voxels, boxes
        Of each.
    contacts
        Touching voxel pairs of each with any other segment.
    """

    ids: Ids
    voxels: Numbers
    boxes: Boxes
    contacts: Numbers

    def rows(self, ids: Ids) -> NDArray[np.int64]:
        """Return the row of each id; -1 for one that is not listed."""
        place = np.searchsorted(self.ids, ids)
        listed = place < len(self.ids)
        listed[listed] = self.ids[place[listed]] == ids[listed]
        return np.where(listed, place, -1)


@dataclass
class _Parts:
    """Rows of one type, by part."""

    folder: Path
    name: str
    count: int
    _waiting: list[tuple[int, NDArray]] = field(default_factory=list)
    _rows: int = 0
    _files: int = 0

    def add(self, rows: NDArray, key: Ids) -> None:
        part = (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) % np.uint64(self.count)
        order = np.argsort(part, kind="stable")
        ends = np.searchsorted(part[order], np.arange(self.count + 1))
        for k in range(self.count):
            if ends[k + 1] > ends[k]:
                self._waiting.append((k, rows[order[ends[k] : ends[k + 1]]]))
        self._rows += len(rows)
        if self._rows > _ROWS:
            self._flush()

    def _flush(self) -> None:
        for part in {part for part, _ in self._waiting}:
            path = self.folder / f"{self.name}-{part}-{self._files}.npy"
            np.save(path, np.concatenate([rows for k, rows in self._waiting if k == part]))
        self._files += 1
        self._waiting, self._rows = [], 0

    def read(self, part: int, dtype: np.dtype) -> NDArray:
        files = sorted(self.folder.glob(f"{self.name}-{part}-*.npy"))
        tables = [np.load(path, allow_pickle=False) for path in files]
        tables += [rows for k, rows in self._waiting if k == part]
        return np.concatenate([np.zeros(0, dtype), *tables])


@dataclass(frozen=True)
class Part:
    """Some segments: their fragments, ascending, contacts inside them, and those of some pairs."""

    nodes: NDArray
    inside: NDArray
    between: NDArray


def bonds(nodes: NDArray, inside: NDArray) -> NDArray:
    """Return rows that bind what has one name, or is in one group of edits, in chains.

    The score of each exceeds what all contacts of its segment can say against it.
    """
    chains = []
    for column in ("name", "group"):
        rows = nodes[nodes[column] > 0]
        rows = rows[np.lexsort((rows["id"], rows[column], rows["segment"]))]
        same = rows[1:][["segment", column]] == rows[:-1][["segment", column]]
        chain = np.zeros(np.count_nonzero(same), CONTACT)
        chain["u"], chain["v"] = rows["id"][:-1][same], rows["id"][1:][same]
        chain["a"] = chain["b"] = rows["segment"][1:][same]
        chains.append(chain)
    found = np.concatenate(chains)
    every, place = np.unique(np.concatenate((inside["a"], found["a"])), return_inverse=True)
    against = np.zeros(len(every), np.int64)
    np.add.at(against, place[: len(inside)], np.abs(inside["numerator"]))
    found["numerator"] = 1 + against[place[len(inside) :]]
    found["denominator"], found["bound"] = 1, True
    return found


@dataclass
class SegmentEvidence:
    """Evidence of a run by segment; a context, which removes its files at the end.

    Parameters
    ----------
    run_dir
        Folder of a stitched run.
    thresholds
        Those of its stitch.
    rule
        Which classes may merge; None without classes.
    least
        Segments of fewer voxels are left out.
    on_progress
        Called with leaves done and leaves in all.
    """

    run_dir: Path
    thresholds: Thresholds
    least: int
    on_progress: Callable[[int, int], None] | None = None
    rule: ClassRule | None = None

    def __enter__(self) -> SegmentEvidence:
        """Read all leaves once."""
        files = StitchFiles(self.run_dir)
        paths = sorted(files.contacts.glob("0/*.npz"))
        if not paths or not files.segments.is_file():
            raise InputError(f"{self.run_dir} is not stitched yet; `agq stitch` it first")
        self.segments = _segments(files, self.least)
        if not len(self.segments.ids):
            raise InputError(
                f"{self.run_dir}: no segment has {self.least} voxels; give a smaller --least"
            )
        self._edits = Constraints.load(files.edits, "edits") if files.edits.exists() else None
        self._rivals: dict[int, int] = {}
        self._kinds = np.zeros(len(self.segments.ids), np.uint64)
        rows = sum(path.stat().st_size for path in paths) // 16
        self.count = 1 + rows // _ROWS
        self._scratch = tempfile.TemporaryDirectory(prefix="suspects-", dir=self.run_dir)
        scratch = Path(self._scratch.name)
        self._parts = [_Parts(scratch, name, self.count) for name in ("nodes", "inside", "between")]
        if self.on_progress is not None:
            self.on_progress(0, len(paths))
        for done, path in enumerate(paths, 1):
            z, y, x = (int(n) for n in path.stem.split("-"))
            self._leaf(files, Superblock(0, (z, y, x)))
            if self.on_progress is not None:
                self.on_progress(done, len(paths))
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()

    def parts(self) -> Iterator[Part]:
        """Yield all parts, one in memory at a time."""
        for k in range(self.count):
            nodes, inside = self._parts[0].read(k, NODE), self._parts[1].read(k, CONTACT)
            nodes = nodes[np.argsort(nodes["id"], kind="stable")]
            inside = np.concatenate((inside, bonds(nodes, inside)))
            yield Part(nodes, inside, self._allowed(self._parts[2].read(k, CONTACT)))

    def _allowed(self, between: NDArray) -> NDArray:
        """Return contacts between segments that neither classes nor edits keep apart."""
        keep = np.ones(len(between), np.bool_)
        if self.rule is not None:
            one, other = (self._kinds[self.segments.rows(between[end])] for end in ("a", "b"))
            keep &= may_join_each(one, other, self.rule.bars)
        if self._edits is not None:
            apart = {
                frozenset(self._rivals.get(mark, 0) for mark in pair)
                for pair in self._edits.rivals.tolist()
            }
            marked = np.array(sorted(self._rivals.values()), np.uint64)
            # Few segments hold a mark, so few rows are looked at one by one.
            for k in np.flatnonzero(np.isin(between["a"], marked) & np.isin(between["b"], marked)):
                keep[k] &= frozenset((int(between["a"][k]), int(between["b"][k]))) not in apart
        return between[keep]

    def _leaf(self, files: StitchFiles, leaf: Superblock) -> None:
        """Sort the rows of one leaf into parts."""
        homes = [leaf, *(leaf.neighbor(axis, 1) for axis in range(3))]
        tables, segments = [], []
        for home in homes:
            if files.evidence(home).exists():
                tables.append(NodeTable.load(files.evidence(home), "nodes"))
                lut = BlockLut.open(files.map(home))
                segments.append(lut.segments_of(tables[-1].ids))
        own = np.zeros(len(tables[0]), NODE)
        own["segment"], own["id"] = segments[0], tables[0].ids
        own["voxels"], own["box"] = tables[0].sizes, tables[0].boxes
        names = load_arrays(files.evidence(leaf), "names").get("names")
        if names is not None:
            own["name"] = names
        place = self.segments.rows(segments[0])
        listed = place >= 0
        if self.rule is not None:
            kinds = self.rule.read(files, [leaf]).of(own["id"] if names is None else own["name"])
            np.bitwise_or.at(self._kinds, place[listed], kinds[listed])
        if self._edits is not None:
            members, groups = self._edits.groups
            if len(members):
                at = np.minimum(np.searchsorted(members, own["id"]), len(members) - 1)
                own["group"] = np.where(members[at] == own["id"], groups[at], 0)
            marked = own[np.isin(own["id"], self._edits.marks[0])]
            self._rivals.update(zip(marked["id"].tolist(), marked["segment"].tolist(), strict=True))
        kept = own[listed]
        self._parts[0].add(kept, kept["segment"])
        nodes, owner = NodeTable.concatenate(tables), np.concatenate(segments)
        order = np.argsort(nodes.ids, kind="stable")
        nodes, owner = nodes.take(order), owner[order]
        contacts = ContactTable.concatenate(
            [load_contacts(files.evidence(leaf), part) for part in PARTS]
        )
        scored = score_contacts(contacts, self.thresholds)
        u, v = np.searchsorted(nodes.ids, scored.u), np.searchsorted(nodes.ids, scored.v)
        rows = np.zeros(len(scored), CONTACT)
        rows["a"], rows["b"] = np.minimum(owner[u], owner[v]), np.maximum(owner[u], owner[v])
        rows["u"], rows["v"] = scored.u, scored.v
        rows["numerator"], rows["denominator"] = scored.numerator, scored.denominator
        rows["box"][:, :3] = np.maximum(nodes.boxes[u, :3], nodes.boxes[v, :3]) - 1
        rows["box"][:, 3:] = np.minimum(nodes.boxes[u, 3:], nodes.boxes[v, 3:]) + 1
        same = rows["a"] == rows["b"]
        ends = [self.segments.rows(rows[end]) for end in ("a", "b")]
        inside = rows[same & (ends[0] >= 0)]
        self._parts[1].add(inside, inside["a"])
        for end in ends:
            known = ~same & (end >= 0)
            np.add.at(self.segments.contacts, end[known], rows["denominator"][known])
        between = rows[~same & (ends[0] >= 0) & (ends[1] >= 0)]
        self._parts[2].add(between, between["a"])


def _segments(files: StitchFiles, least: int) -> Segments:
    """Read the table of segments of at least so many voxels."""
    table = pq.read_table(files.segments, filters=[("voxels", ">=", least)])
    table = table.sort_by("segment")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    boxes = [columns[f"{end}_{axis}"] for end in ("begin", "end") for axis in "zyx"]
    return Segments(
        ids=columns["segment"],
        voxels=columns["voxels"],
        boxes=np.stack(boxes, axis=1),
        contacts=np.zeros(len(table), np.int64),
    )
