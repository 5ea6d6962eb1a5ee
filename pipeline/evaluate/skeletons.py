"""Expected run length: how far one can walk along a neurite before the segmentation fails.

Januszewski et al., Nature Methods 15 (2018). Every edge of a skeleton of the truth is correct if
both its ends lie in one segment, and that segment does not join two skeletons. The expected run
length is the mean length of the correct run around a random place on the skeletons.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.spatial import cKDTree

from agq.blockwise.storage.arrays import load_arrays, save_arrays
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Triple
from agq.errors import InputError
from agq.reading import read_file

Labels = npt.NDArray[np.uint64]
_MOST_BYTES = 2**32
_FARTHEST = 2.0**53
_REACH = 3**0.5 + 1e-6


@dataclass(frozen=True)
class Skeletons:
    """Trees along neurites.

    Attributes
    ----------
    nodes
        (n, 3) float64 world positions (z, y, x).
    edges
        (m, 2) int64 rows of `nodes`.
    owner
        (n,) uint64: the skeleton that each node belongs to.
    """

    nodes: npt.NDArray[np.float64]
    edges: npt.NDArray[np.int64]
    owner: Labels

    @property
    def lengths(self) -> npt.NDArray[np.float64]:
        """Length of each edge in nanometres."""
        a, b = self.nodes[self.edges[:, 0]], self.nodes[self.edges[:, 1]]
        return np.asarray(np.linalg.norm(a - b, axis=1))

    def save(self, path: Path) -> None:
        """Write an npz file."""
        save_arrays(path, vars(self))

    @classmethod
    def merge(cls, parts: Iterable[Skeletons]) -> Skeletons:
        """Put skeletons together."""
        nodes, edges = [np.zeros((0, 3))], [np.zeros((0, 2), np.int64)]
        owner = [np.zeros(0, np.uint64)]
        first = 0
        for part in parts:
            nodes.append(part.nodes)
            edges.append(part.edges + first)
            owner.append(part.owner)
            first += len(part.nodes)
        return cls(np.concatenate(nodes), np.concatenate(edges), np.concatenate(owner))


def skeletonize(truth: Volume) -> Skeletons:
    """Thin every object of a volume to a skeleton (Lee et al. 1994, by scikit-image).

    The volume is read whole: annotated volumes are small. Loops are cut at their longest edge.
    Objects that thin to less than two voxels have no skeleton; this thinning also removes boxes
    of even thickness whole, which neurites are not.

    Raises
    ------
    InputError
        If there is nothing to walk along.
    """
    from skimage.morphology import skeletonize as thin

    labels = truth.read((0, 0, 0), truth.shape)
    ids, compact = np.unique(labels, return_inverse=True)
    compact = compact.reshape(labels.shape).astype(np.int32) + (ids[0] != 0)
    ids = ids[ids != 0]
    size, corner = _nanometres(truth)
    parts = []
    for number, box in enumerate(ndimage.find_objects(compact), 1):
        # A border of zeros: thinning treats the end of its array as inside.
        thinned = thin(np.pad(compact[box] == number, 1))
        voxels = np.argwhere(thinned) - 1
        edges = _tree(voxels, size)
        if not len(edges):
            continue
        start = np.array([s.start for s in box])
        nodes = corner + (voxels + start + 0.5) * size
        parts.append(Skeletons(nodes, edges, np.full(len(nodes), ids[number - 1], np.uint64)))
    if not parts:
        raise InputError(f"{truth.name}: no object is long enough for a skeleton")
    return Skeletons.merge(parts)


def _nanometres(volume: Volume) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return voxel size and offset, (z, y, x): skeletons name no unit, whatever a run counts in."""
    scale = PER_NANOMETRE[volume.unit]
    size = np.array([int(v) for v in volume.voxel_size]) / scale
    return size, np.array([int(v) for v in volume.offset]) / scale


def _tree(voxels: npt.NDArray[np.int64], size: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Edges (m, 2) between 26-connected voxels, without loops."""
    if len(voxels) < 2:
        return np.zeros((0, 2), np.int64)
    pairs = cKDTree(voxels).query_pairs(_REACH, output_type="ndarray")
    pairs = pairs[np.lexsort(pairs.T[::-1])]
    lengths = np.linalg.norm((voxels[pairs[:, 0]] - voxels[pairs[:, 1]]) * size, axis=1)
    graph = sparse.coo_matrix((lengths, (pairs[:, 0], pairs[:, 1])), (len(voxels),) * 2)
    tree = sparse.csgraph.minimum_spanning_tree(graph).tocoo()
    edges = np.stack([tree.row, tree.col], 1).astype(np.int64)
    return edges[np.lexsort(edges.T[::-1])]


def read_skeletons(path: Path) -> Skeletons:
    """Read an npz file of `Skeletons.save`, an SWC file, or a folder of SWC files.

    SWC coordinates (x, y, z) are nanometres; each file is one skeleton.

    Raises
    ------
    InputError
        If the file does not exist or is damaged.
    """
    try:
        if path.suffix == ".npz":
            arrays = load_arrays(path, most=_MOST_BYTES)
            skeletons = Skeletons(
                arrays["nodes"].astype(np.float64),
                arrays["edges"].astype(np.int64),
                arrays["owner"].astype(np.uint64),
            )
        else:
            files = sorted(path.glob("*.swc")) if path.is_dir() else [path]
            skeletons = Skeletons.merge(_swc(file, n) for n, file in enumerate(files, 1))
    except OSError as error:
        raise InputError(f"skeletons {path}: {error.strerror or error}") from None
    except (LookupError, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"skeletons {path}: not an npz or SWC file ({error})") from None
    nodes, edges, owner = skeletons.nodes, skeletons.edges, skeletons.owner
    if (nodes.shape, edges.shape) != ((len(owner), 3), (len(edges), 2)) or owner.ndim != 1:
        raise InputError(f"skeletons {path}: nodes, edges and owners do not fit together")
    if not (np.abs(nodes) < _FARTHEST).all():
        raise InputError(f"skeletons {path}: a node has a coordinate that is no place")
    if not len(skeletons.edges):
        raise InputError(f"skeletons {path}: the file has no edges")
    if skeletons.edges.min() < 0 or skeletons.edges.max() >= len(skeletons.nodes):
        raise InputError(f"skeletons {path}: an edge names a node that the file does not have")
    return skeletons


def _swc(file: Path, number: int) -> Skeletons:
    text = read_file(file, most=_MOST_BYTES).decode().splitlines()
    rows = [line.split() for line in text if line.strip() and not line.lstrip().startswith("#")]
    place = {int(row[0]): k for k, row in enumerate(rows)}
    nodes = np.array([[float(row[4]), float(row[3]), float(row[2])] for row in rows])
    edges = [(k, place[int(row[6])]) for k, row in enumerate(rows) if int(row[6]) >= 0]
    return Skeletons(
        nodes.reshape(-1, 3),
        np.array(edges, np.int64).reshape(-1, 2),
        np.full(len(rows), number, np.uint64),
    )


def segments_at(
    volume: Volume, nodes: npt.NDArray[np.float64], block: Triple = (32, 256, 256)
) -> Labels:
    """Look up the label at places in nm, reading each touched block once; 0 outside."""
    size, corner = _nanometres(volume)
    voxels = np.floor((nodes - corner) / size).astype(np.int64)
    inside = ((voxels >= 0) & (voxels < volume.shape)).all(1)
    segments = np.zeros(len(nodes), np.uint64)
    rows = np.flatnonzero(inside)
    if not len(rows):
        return segments
    corner, group = np.unique(voxels[rows] // block, axis=0, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    ends = np.cumsum(np.bincount(group.reshape(-1)))
    for index, some in zip(corner, np.split(rows[order], ends[:-1]), strict=True):
        start = index * np.array(block)
        stop = np.minimum(start + block, volume.shape)
        labels = volume.read(start.tolist(), stop.tolist())
        segments[some] = labels[tuple((voxels[some] - start).T)]
    return segments


@dataclass(frozen=True)
class RunLength:
    """Expected run length and what it is made of.

    Attributes
    ----------
    expected
        Nanometres; 0 is worst.
    possible
        What a perfect segmentation would reach: the mean length of a skeleton, by length.
    total
        Length of all skeletons.
    correct, split, merged, omitted
        Shares of that length: inside one segment; between two segments; in a segment that joins
        skeletons; with an end in background.
    skeletons
        Their number.
    mergers
        Segments that join skeletons.
    tolerance
        Nodes of a second skeleton that a segment may hold and still be no merger.
    """

    expected: float
    possible: float
    total: float
    correct: float
    split: float
    merged: float
    omitted: float
    skeletons: int
    mergers: int
    tolerance: int

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return dict(vars(self))

    def line(self, unit: str = "nm") -> str:
        """Return a line for people."""
        return (
            f"expected run length {self.expected:,.0f} of {self.possible:,.0f} {unit} "
            f"({self.skeletons} skeletons, {self.total:,.0f} {unit}: {self.correct:.1%} correct, "
            f"{self.split:.1%} at splits, {self.merged:.1%} in {self.mergers} mergers, "
            f"{self.omitted:.1%} in background)"
        )


def expected_run_length(skeletons: Skeletons, segments: Labels, *, tolerance: int = 0) -> RunLength:
    """Measure a segmentation along skeletons.

    Parameters
    ----------
    segments
        Segment at each node (`segments_at`); 0 is background.
    tolerance
        A segment joins two skeletons if it holds more than this many nodes of each.
    """
    pairs, nodes_in = np.unique(
        np.stack([segments, skeletons.owner])[:, segments != 0], axis=1, return_counts=True
    )
    held, times = np.unique(pairs[0][nodes_in > tolerance], return_counts=True)
    mergers = held[times > 1]
    first, second = segments[skeletons.edges[:, 0]], segments[skeletons.edges[:, 1]]
    lengths, owner = skeletons.lengths, skeletons.owner[skeletons.edges[:, 0]]
    omitted = (first == 0) | (second == 0)
    merged = ~omitted & (np.isin(first, mergers) | np.isin(second, mergers))
    split = ~omitted & ~merged & (first != second)
    correct = ~omitted & ~merged & ~split
    total = float(lengths.sum())

    def runs(groups: npt.NDArray[Any], chosen: npt.NDArray[Any]) -> float:
        index = np.unique(groups[:, chosen], axis=1, return_inverse=True)[1].reshape(-1)
        return float(np.sum(np.bincount(index, weights=lengths[chosen]) ** 2))

    everything = np.ones(len(lengths), bool)
    shares = (float(lengths[part].sum()) / total for part in (correct, split, merged, omitted))
    right, between, joined, outside = shares
    return RunLength(
        expected=runs(np.stack([owner, first]), correct) / total,
        possible=runs(owner[None], everything) / total,
        total=total,
        correct=right,
        split=between,
        merged=joined,
        omitted=outside,
        skeletons=len(np.unique(owner)),
        mergers=len(mergers),
        tolerance=tolerance,
    )
