"""From a stitched run to a ranked list of suspects, and from a truth to probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.classes import ClassRule
from agq.blockwise.stitch.contacts import NodeTable
from agq.blockwise.stitch.output.relabel import BlockLut
from agq.blockwise.stitch.superblocks import StitchFiles
from agq.blockwise.volumes.open import Volume, open_volume
from agq.blockwise.volumes.triples import Triple, middle, triple
from agq.errors import InputError
from agq.pipeline.evaluate.baseline.compare import fragment_counts, stitch_settings
from agq.pipeline.folder import RunFolder
from agq.pipeline.suspects.candidates import FEATURES, MERGE, Candidates, Finder
from agq.pipeline.suspects.evidence import SegmentEvidence
from agq.pipeline.suspects.model import LEAST, Logistic, Model
from agq.pipeline.suspects.oracle import Truth

LEAST_VOXELS = 500
"""Smaller sides of fewer voxels are no suspects."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Suspect:
    """A place where the segmentation may be wrong.

    Attributes
    ----------
    kind
        ``merge``: one segment that may be two; ``split``: two segments that may be one.
    probability
        That it is an error.
    bits
        Variation of information that mending it is worth if it is one.
    segments
        The segment, or both.
    fragments
        At which to part or to join.
    voxels
        Of both sides, the smaller first.
    voxel, world
        Where: voxel of the volume, and world units, (z, y, x).
    why
        What speaks for it, in words.
    axis
        Along which both sides touch there, 0 to 2.
    side
        Of a merge, the fragments of one side, ascending; filled for those that are drawn.
    """

    kind: str
    probability: float
    bits: float
    segments: tuple[int, ...]
    fragments: tuple[int, int]
    voxels: tuple[int, int]
    voxel: Triple
    world: Triple
    why: str
    axis: int
    side: NDArray[np.uint64] | None = field(default=None, compare=False, repr=False)

    def row(self, rank: int) -> dict[str, Any]:
        """Return it as a flat row of a table."""
        return {
            "rank": rank,
            "kind": self.kind,
            "probability": round(self.probability, 4),
            "bits": round(self.bits, 6),
            "segment": self.segments[0],
            "other_segment": self.segments[-1],
            "fragment": self.fragments[0],
            "other_fragment": self.fragments[1],
            "voxels": self.voxels[0],
            "other_voxels": self.voxels[1],
            **dict(zip("zyx", self.voxel, strict=True)),
            **{f"world_{axis}": value for axis, value in zip("zyx", self.world, strict=True)},
            "why": self.why,
        }


@contextmanager
def finder(run: RunFolder, least: int, on_progress: Progress | None = None) -> Iterator[Finder]:
    """Read the evidence of a stitched run."""
    settings = stitch_settings(run)
    classes = (run.record()["config"].get("input") or {}).get("classes")
    rule = ClassRule.of(settings) if classes else None
    evidence = SegmentEvidence(run.path, settings, least, on_progress, rule)
    with evidence:
        boxes, voxels = evidence.segments.boxes, int(evidence.segments.voxels.sum())
        # What was segmented may be a part of the volume.
        low, high = boxes[:, :3].min(axis=0), boxes[:, 3:].max(axis=0)
        yield Finder(evidence, triple(low), triple(high), voxels)


def weakest(candidates: Candidates) -> NDArray[np.float64]:
    """Return what is highest for the cut with the lowest mean affinity."""
    return -candidates.features[:, 0]


def find_suspects(
    run: RunFolder,
    model: Model,
    *,
    top: int = 100,
    least: int = LEAST_VOXELS,
    drawn: int = 0,
    on_progress: Progress | None = None,
) -> list[Suspect]:
    """List where a stitched run is probably wrong, the largest expected error first.

    Parameters
    ----------
    model
        Gives the probabilities.
    top
        How many to list at most.
    least
        Voxels of the smaller side.
    drawn
        How many get their `Suspect.side`.
    on_progress
        Called with leaves read and leaves in all.

    Raises
    ------
    InputError
        If the run is not stitched, or no segment is that large.
    """
    with finder(run, least, on_progress) as found:
        tables = [best(t, model, top) for t in (*found.cuts(model.value), *found.pairs())]
        values = np.concatenate([np.zeros(0), *(model.value(table) for table in tables)])
        places = [(table, row) for table in tables for row in range(len(table.rows))]
        order = np.argsort(-values, kind="stable")[:top]
        chosen = [table.take(slice(row, row + 1)) for table, row in (places[k] for k in order)]
        sides = found.sides([one.rows[0] for one in chosen[:drawn] if one.kind == MERGE])
    grid, dropped = run.grid(), _dropped(run)
    fragments = open_volume(run.container, "fragments", level=0, kind="labels", unit=None)
    suspects = []
    for rank, one in enumerate(chosen):
        suspect = _suspect(one, float(model.probability(one)[0]), grid, dropped, fragments)
        if rank < drawn and one.kind == MERGE:
            suspect = replace(suspect, side=sides.pop(0))
        suspects.append(suspect)
    return suspects


def best(table: Candidates, model: Model, top: int) -> Candidates:
    """Return the best candidates of a table."""
    return table.take(np.argsort(-model.value(table), kind="stable")[:top])


def calibrate(run: RunFolder, truth: Volume, *, least: int = LEAST_VOXELS, **options: Any) -> Model:
    """Fit the probabilities to the errors that a truth shows in a run.

    `options` are those of `evaluate.count`.

    Raises
    ------
    InputError
        If there are too few candidates or errors.
    """
    with finder(run, least) as found:
        tables = [*found.cuts(weakest, keep_trees=True), *found.pairs()]
    judge = Truth.of(found.fragments, all_owners(run), fragment_counts(run, truth, **options))
    kinds = {}
    for kind in FEATURES:
        judged = [(t, judge.worth(t) > 0) for t in tables if t.kind == kind]
        none = np.zeros(0)
        features = np.concatenate(
            [np.zeros((0, len(FEATURES[kind]))), *(table.features for table, _ in judged)]
        )
        wrong = np.concatenate([none > 0, *(bad for _, bad in judged)])
        gain = np.concatenate([none, *(table.gain for table, _ in judged)])
        if min(wrong.sum(), (~wrong).sum()) < LEAST:
            raise InputError(
                f"--calibrate: the truth shows {int(wrong.sum())} errors of kind {kind} among "
                f"{len(wrong)} candidates; at least {LEAST} are needed, and as many that are none"
            )
        kinds[kind] = Logistic.fit(features, wrong, gain)
    return Model(kinds, f"{run.path.name}, {truth.name}")


def all_owners(run: RunFolder) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return all fragments of a run, ascending, and their segments; for small volumes."""
    files = StitchFiles(run.path)
    ids, segments = [], []
    for path in sorted(files.contacts.glob("0/*.npz")):
        ids.append(NodeTable.load(path, "nodes").ids)
        segments.append(BlockLut.open(files.lut / "map" / path.name).segments_of(ids[-1]))
    order = np.argsort(np.concatenate(ids), kind="stable")
    return np.concatenate(ids)[order], np.concatenate(segments)[order]


def _dropped(run: RunFolder) -> set[int]:
    """Return the blocks in which the network found more than it could keep."""
    rows = Journal(run.journal("predict")).rows
    return set(rows["block"][rows["dropped"] > 0].tolist())


def _suspect(
    one: Candidates, probability: float, grid: BlockGrid, dropped: set[int], fragments: Volume
) -> Suspect:
    row = one.rows[0]
    pair = int(row["u"]), int(row["v"])
    voxel, axis = _touching(fragments, pair, row["box"])
    features = dict(zip(FEATURES[one.kind], one.features[0].tolist(), strict=True))
    segments = (int(row["a"]),) if one.kind == MERGE else (int(row["a"]), int(row["b"]))
    return Suspect(
        kind=one.kind,
        probability=probability,
        bits=float(one.gain[0]),
        segments=segments,
        fragments=pair,
        voxels=(int(row["sides"][0]), int(row["sides"][1])),
        voxel=voxel,
        world=middle(voxel, grid.voxel_size, grid.offset),
        why=", ".join(_reasons(features, {n >> LOCAL_BITS for n in pair} & dropped)),
        axis=axis,
    )


def _reasons(features: dict[str, float], dropped: set[int]) -> list[str]:
    """Say what is odd about a candidate; the mean affinity always."""
    why = [f"affinity {features['affinity']:+.2f}"]
    if features["contacts"] < 2 / 3 * features["small"] - 1:
        why.append("thin contact")
    if features["small_ends"] == 0:
        why.append("ends inside")
    if features.get("behind", -1.0) > 0 and features["ahead"] > 0:
        why.append("best pair of both")
    if dropped:
        why.append("dropped queries")
    return why


def _touching(
    fragments: Volume, pair: tuple[int, int], box: NDArray[np.int64]
) -> tuple[Triple, int]:
    """Return a voxel of the first fragment at which it touches the second, and along which axis.

    It is the one nearest to the middle of all; the middle of the box where none is found.
    """
    low = np.maximum(box[:3], 0)
    high = np.minimum(box[3:], fragments.shape)
    labels = fragments.read(low.tolist(), high.tolist())
    one, other = (labels == np.uint64(n) for n in pair)
    beside = np.zeros((3, *one.shape), bool)
    for axis in range(3):
        ahead = [slice(None)] * 3
        behind = [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        beside[axis][tuple(behind)] |= other[tuple(ahead)]
        beside[axis][tuple(ahead)] |= other[tuple(behind)]
    beside &= one
    places = np.argwhere(beside.any(axis=0))
    if not len(places):
        return triple((low + high) // 2), 2
    nearest = places[np.argmin(np.abs(places - np.median(places, axis=0)).sum(axis=1))]
    # A contact in the plane is looked at in the plane, as sections were imaged.
    return triple(low + nearest), 2 - int(np.argmax(beside[(slice(None), *nearest)][::-1]))
