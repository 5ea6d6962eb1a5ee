"""Score a segmentation against ground truth from contingency tables counted block by block.

A table of (truth label, segment, voxels) is all that variation of information and the adapted Rand
error need. Tables of blocks are merged as integers, so neither the block size nor the order of
blocks changes a figure, and memory is bounded by the block and the number of touching pairs.

Label 0 of the truth is not scored, nor are others that the user names (`BorderRule.labels`). A
*predicted* 0 is scored in three ways, all reported, because the usual metrics count it as one
segment, which alone ruins a perfect segmentation with membranes: ``as_is`` (0 is one segment),
``background_filled`` (it becomes the nearest segment, within a named distance) and
``background_ignored`` (voxels of predicted 0 are left out).

Voxels near the borders of truth objects, where annotators differ, can be left out too
(``BorderRule``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np
from funlib.geometry import Coordinate

from agq.blockwise.volumes.boxes import boxes, unordered
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Box, Triple, triple
from agq.errors import InputError
from agq.pipeline.evaluate.contingency import (
    BlockCounts,
    BorderRule,
    Window,
    count_block,
    reserved_labels,
)
from agq.pipeline.evaluate.scores import Disagreement, EvaluationReport, scores_of, shares

_FILL_NANOMETRES = 150.0


class NothingScoredError(InputError):
    """The truth has no labelled voxel where it overlaps the segmentation."""


@dataclass(frozen=True)
class Counted:
    """Contingency tables of two volumes over the window that both have.

    Tables name the boxes by their place in the list.
    """

    window: Window
    blocks: list[Box]
    counts: BlockCounts


class CountOptions(TypedDict, total=False):
    """How two volumes are read and compared.

    Attributes
    ----------
    client
        A `distributed.Client` whose workers can open both volumes; None: threads.
    workers
        Threads without a client; by default one per processor this process may use.
    block
        Voxels (z, y, x) counted at a time; bounds the memory and changes no figure.
    fill_distance
        World units, by default 150 nm: a predicted 0 takes the nearest segment within it for
        ``background_filled`` (ties go to the lower z, then y, then x); one further away stays 0
        and is counted in the report.
    ignore
        Which voxels of the truth are left out; None: only those of label 0.
    on_progress
        Called with (blocks done, blocks in all) after each block.
    """

    client: Any
    workers: int | None
    block: Sequence[int]
    fill_distance: float
    ignore: BorderRule | None
    on_progress: Callable[[int, int], None] | None


def count(segmentation: Volume, truth: Volume, **options: Unpack[CountOptions]) -> Counted:
    """Count the pairs of labels of two volumes, block by block; errors as for `evaluate`."""
    fill_distance = options.get("fill_distance", _FILL_NANOMETRES * PER_NANOMETRE[truth.unit])
    on_progress = options.get("on_progress")
    ignore = (options.get("ignore") or BorderRule()).for_type(truth.dtype)
    window = _window(segmentation, truth, fill_distance, ignore)
    blocks = boxes((0, 0, 0), window.shape, options.get("block", (32, 256, 256)))
    task = partial(count_block, segmentation, truth, window)
    counted = unordered(
        task,
        list(enumerate(blocks)),
        client=options.get("client"),
        workers=options.get("workers"),
    )
    total = BlockCounts.empty()
    gathered: list[BlockCounts] = []
    rows = 0
    if on_progress is not None:
        on_progress(0, len(blocks))
    for done, counts in enumerate(counted, 1):
        gathered.append(counts)
        rows += counts.rows
        # Merging costs a sort; doing it only when the new rows outgrow the old keeps it linear.
        if rows > max(1_000_000, total.rows):
            total, gathered, rows = BlockCounts.merge([total, *gathered]), [], 0
        if on_progress is not None:
            on_progress(done, len(blocks))
    total = BlockCounts.merge([total, *gathered])
    if total.scored == 0:
        raise NothingScoredError(
            f"{truth.name}: no labelled voxel where it overlaps {segmentation.name}; "
            "nothing can be scored"
        )
    return Counted(window, blocks, total)


def evaluate(
    segmentation: Volume, truth: Volume, *, worst: int = 5, **options: Unpack[CountOptions]
) -> EvaluationReport:
    """Compare a segmentation with ground truth where the two volumes overlap in the world.

    Parameters
    ----------
    segmentation, truth
        Labels, any integer type, (z, y, x), of one voxel size; their offsets may differ by whole
        voxels.
    worst
        How many mergers and splits to list.
    options
        See `CountOptions`.

    Raises
    ------
    InputError
        If voxel sizes differ, offsets differ by a fraction of a voxel, the volumes do not
        overlap, or the truth has no labelled voxel there.
    """
    counted = count(segmentation, truth, **options)
    window, total = counted.window, counted.counts
    scores = scores_of(total)
    locate = partial(_disagreements, segmentation, truth, counted, worst)
    return EvaluationReport(
        segmentation=segmentation.name,
        truth=truth.name,
        offset=tuple(int(v) for v in window.offset),
        shape=window.shape,
        voxel_size=tuple(int(v) for v in window.voxel_size),
        unit=truth.unit,
        ignored_border=window.ignore.describe(),
        voxels=total.scored,
        background=total.background.total / total.scored,
        unfilled=int(total.filled.count[total.filled.segment == 0].sum()) / total.scored,
        fill_distance=window.fill_distance,
        truth_objects=len(
            np.unique(np.concatenate([total.labelled.truth, total.background.truth]))
        ),
        segments=len(np.unique(total.labelled.segment)),
        as_is=scores["as_is"],
        background_filled=scores["background_filled"],
        background_ignored=scores["background_ignored"],
        worst_mergers=locate(by_segment=True),
        worst_splits=locate(by_segment=False),
        reserved=_reserved(truth, total),
        origin=tuple(int(v) for v in segmentation.offset),
    )


def _reserved(truth: Volume, counts: BlockCounts) -> dict[str, int]:
    """Count the scored voxels of labels that often mean unlabelled."""
    found: dict[str, int] = {}
    for label, name in reserved_labels(truth.dtype).items():
        tables = (counts.labelled, counts.background)
        if voxels := sum(int(table.count[table.truth == label].sum()) for table in tables):
            found[name if name.startswith("-") else f"{label} ({name})"] = voxels
    return found


def _window(
    segmentation: Volume, truth: Volume, fill_distance: float, ignore: BorderRule
) -> Window:
    """Voxels that both volumes have."""
    size = segmentation.voxel_size
    if size != truth.voxel_size or segmentation.unit != truth.unit:
        raise InputError(
            f"voxel sizes differ: {tuple(size)} {segmentation.unit} in {segmentation.name} and "
            f"{tuple(truth.voxel_size)} {truth.unit} in {truth.name}; resample one of them"
        )
    apart = segmentation.offset - truth.offset
    if any(a % v for a, v in zip(apart, size, strict=True)):
        raise InputError(
            f"{segmentation.name} and {truth.name} are offset by {tuple(apart)}, which is not a "
            f"whole number of voxels of {tuple(size)}; correct one offset"
        )
    common = segmentation.roi.intersect(truth.roi)
    if common.empty:
        raise InputError(
            f"{segmentation.name} ({segmentation.roi}) and {truth.name} ({truth.roi}) do not "
            "overlap; correct one offset"
        )
    z, y, x = (int(n) for n in common.shape / size)
    return Window(
        shape=(z, y, x),
        offset=common.offset,
        voxel_size=size,
        in_segmentation=_start(common.offset, segmentation),
        in_truth=_start(common.offset, truth),
        fill_distance=fill_distance,
        ignore=ignore,
    )


def _start(offset: Coordinate, volume: Volume) -> Triple:
    return triple((offset - volume.offset) / volume.voxel_size)


def _disagreements(
    segmentation: Volume, truth: Volume, counted: Counted, worst: int, *, by_segment: bool
) -> list[Disagreement]:
    """List the segments (or truth objects) that add most to the merge (or split) entropy."""
    table = counted.counts.labelled
    whole, parts = (table.segment, table.truth) if by_segment else (table.truth, table.segment)
    ids, share = shares(whole, table.count)
    order = np.argsort(-share, kind="stable")[:worst]
    disagreements = []
    for k in order[share[order] > 0]:
        rows = np.flatnonzero(whole == ids[k])
        rows = rows[np.argsort(-table.count[rows], kind="stable")]
        largest = []
        for row in rows[:4]:
            box = counted.blocks[int(table.block[row])]
            pair = (table.segment[row], table.truth[row])
            at = counted.window.inside(segmentation, truth, box, *pair)
            largest.append((int(parts[row]), int(table.count[row]), at))
        disagreements.append(Disagreement(int(ids[k]), float(share[k]), len(rows), tuple(largest)))
    return disagreements
