"""What AGQ's queries buy: its segmentation beside the usual one from the same affinities.

The baseline (see `baseline.watershed` for the fragments) agglomerates by mean affinity, in the
run's own exact stitch, blockwise, or by the 75 % quantile of affinities with waterz, in memory.
Thresholds are searched on the volume at hand, or taken from the report of another run: tune on one
volume, report on another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from rich.console import Group

from agq import waiting
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.sidecar import open_sidecar
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.stitch.classes import Kinds, read_kinds
from agq.blockwise.stitch.contacts import Evidence, collect, read_evidence
from agq.blockwise.stitch.edits import Constraints
from agq.blockwise.stitch.merge.agglomeration import agglomerate
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import StitchSettings
from agq.blockwise.stitch.superblocks import StitchFiles
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import DamagedError, InputError
from agq.pipeline.evaluate.baseline.quantile import quantile_segments, write_joined
from agq.pipeline.evaluate.baseline.watershed import WatershedRun, WatershedSettings, make_fragments
from agq.pipeline.evaluate.contingency import BlockCounts, BorderRule
from agq.pipeline.evaluate.evaluate import CountOptions, count, evaluate
from agq.pipeline.evaluate.sweep import (
    Criterion,
    Point,
    best,
    one_threshold,
    point,
    points_table,
    thresholds_of,
)
from agq.pipeline.folder import RunFolder
from agq.reading import read_record
from agq.tables import Tabled
from agq.terminal import facts

MEAN, QUANTILE = "watershed + mean", "watershed + 75% quantile"
METHODS = (MEAN, QUANTILE)
_SHORT = {MEAN: "mean", QUANTILE: "75 %"}
_METHODS_LEGEND = (
    "AGQ: this run; mean, 75 %: watershed fragments of the same affinities, joined by the mean or "
    "the 75 % quantile of the affinities between them"
)
REPORT = "baseline.json"
THRESHOLDS = (*(t / 20 for t in range(2, 20)), 0.97, 0.98, 0.99)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BaselineReport(Tabled):
    """The comparison.

    Attributes
    ----------
    agq
        The run's own segmentation, small segments kept.
    chosen
        The baseline by method, at its best threshold, or at the one given; small segments kept.
    final
        The run's own segmentation and the baselines at those thresholds as volumes, small
        segments removed from all of them as the run's `stitch.min_size` says.
    curves
        Every threshold tried; empty where thresholds were given.
    tuned_on
        The run whose thresholds were used; None: searched here.
    segmentation
        Container with the stitched baseline (mean affinity).
    seconds
        Of each part: what the workers spent in the network and its decoding (all blocks added
        up), in the watershed, and wall time of the agglomerations.
    """

    run: str
    truth: str
    settings: WatershedSettings
    agq: Point
    chosen: list[Point]
    final: list[Point]
    min_size: int
    curves: list[Point]
    tuned_on: str | None
    segmentation: str
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {
            **vars(self),
            "settings": asdict(self.settings),
            "agq": self.agq.to_dict(),
            **{
                name: [item.to_dict() for item in getattr(self, name)]
                for name in ("chosen", "final", "curves")
            },
        }

    def table(self) -> Group:
        """Return tables for a rich console."""
        where = f"those of {self.tuned_on}" if self.tuned_on else "the best of those tried here"
        kept = points_table(
            [_named(item) for item in (self.agq, *self.chosen)],
            f"Fragments joined, small segments kept; affinity thresholds: {where}",
        )
        main = points_table(
            [_named(item) for item in self.final],
            "The volumes as written, "
            + (
                f"segments of fewer than {self.min_size} voxels removed"
                if self.min_size
                else "no small segment removed (stitch.min_size is 0)"
            ),
        )
        kept.legend = ""
        main.legend = f"{_METHODS_LEGEND}\n{main.legend}"
        about = facts(
            f"Baseline of {Path(self.run).name}",
            [("run", self.run), ("truth", self.truth), ("baseline", self.segmentation)],
        )
        times = [(name, f"{value:.1f} s") for name, value in self.seconds.items()]
        return Group(about, kept, main, facts("Time", times))


def _named(item: Point) -> Point:
    """Return a point with the short name of its method, for a table."""
    return replace(item, method=_SHORT.get(item.method, item.method))


@dataclass(frozen=True)
class Search:
    """Which baselines are made.

    Attributes
    ----------
    settings
        Of the watershed; None: the defaults, or those of `tuned_on`.
    methods
        Which agglomerations, of `METHODS`.
    thresholds
        Affinities to search over.
    tuned_on
        Take settings and best thresholds from the report of this run and search nothing.
    """

    settings: WatershedSettings | None = None
    methods: Sequence[str] = METHODS
    thresholds: Sequence[float] = THRESHOLDS
    tuned_on: RunFolder | None = None
    criterion: Criterion = "voi_sum"


def compare(
    run: RunFolder,
    truth: Volume,
    client: Any,
    search: Search = Search(),
    *,
    ignore: BorderRule | None = None,
    on_progress: Progress | None = None,
) -> BaselineReport:
    """Make the baseline of a run, score it beside the run's own segmentation, and record both.

    Parameters
    ----------
    run
        A stitched run that kept its affinities.
    client
        A `distributed.Client` whose workers see the run folder.
    on_progress
        Called with the name of a step, items done and items in all.

    Raises
    ------
    InputError
        If the run is not stitched or kept no affinities, `tuned_on` has no report, or memory does
        not suffice for the quantile.
    """
    tuned = None if search.tuned_on is None else _read_report(search.tuned_on)
    settings = search.settings or WatershedSettings(**(tuned["settings"] if tuned else {}))
    options: CountOptions = {"client": client, "ignore": ignore}
    waiting.doing("scoring the run itself")
    agq = _agq(run, truth, options)
    job = make_fragments(run, settings, client=client, on_progress=on_progress)
    container = job.folder / "data.zarr"
    waiting.doing("counting watershed fragments against the truth")
    counts = count(_labels(container, "fragments", truth), truth, **options).counts
    seconds = {
        "network and decoding": Journal(run.journal("predict")).totals()["compute_s"],
        "watershed": Journal(job.folder / "journal" / "predict").totals()["compute_s"],
    }
    curves: list[Point] = []
    chosen = []
    for method in search.methods:
        thresholds = [_threshold(tuned, method)] if tuned else list(search.thresholds)
        waiting.doing(f"trying thresholds, {_SHORT[method]}")
        begun = time.perf_counter()
        points = _agglomerate(job, method, counts, thresholds)
        seconds[f"agglomeration, {method}"] = time.perf_counter() - begun
        chosen.append(best(points, search.criterion))
        if tuned is None:
            curves += points
    min_size = stitch_settings(run).min_size
    final = [_scored(agq, _labels(run.container, "segmentation", truth), truth, options)]
    for item in chosen:
        waiting.doing(f"writing and scoring the volume, {_SHORT[item.method]}")
        name = _write_segments(job, item, min_size, client, on_progress)
        final.append(_scored(item, _labels(container, name, truth), truth, options))
    report = BaselineReport(
        run=str(run.path),
        truth=truth.name,
        settings=settings,
        agq=agq,
        chosen=chosen,
        final=final,
        min_size=min_size,
        curves=curves,
        tuned_on=None if search.tuned_on is None else str(search.tuned_on.path),
        segmentation=str(container / "segmentation"),
        seconds=seconds,
    )
    write_atomic(run.path / REPORT, json.dumps(report.to_dict(), indent=1).encode())
    return report


def fragment_counts(run: RunFolder, truth: Volume, **options: Unpack[CountOptions]) -> BlockCounts:
    """Count the fragments of a run against the truth."""
    return count(_labels(run.container, "fragments", truth), truth, **options).counts


def run_kinds(run: RunFolder) -> Kinds | None:
    """Return which fragments of a stitched run may not merge; None without classes."""
    if not (run.record()["config"].get("input") or {}).get("classes"):
        return None
    return read_kinds(run.path, stitch_settings(run))


def stitch_settings(run: RunFolder) -> StitchSettings:
    """Return the settings of the stitch that a run records."""
    recorded = run.record()["config"].get("stitch") or {}
    return StitchSettings.from_values(recorded, f"{run.record_path}: config.stitch")


def _agq(run: RunFolder, truth: Volume, options: CountOptions) -> Point:
    """Score the run's own segments."""
    evidence = read_evidence(run.path)
    stitch = stitch_settings(run)
    setting = {"across": stitch.across, "within": stitch.within}
    thresholds = thresholds_of(stitch, **setting)
    kinds = run_kinds(run)
    file = StitchFiles(run.path).edits
    edits = Constraints.load(file, "edits") if file.exists() else None
    result = agglomerate(
        evidence.nodes.ids, evidence.contacts, thresholds, kinds, edits, evidence.names
    )
    counts = fragment_counts(run, truth, **options)
    return point("AGQ", setting, counts, result.ids, result.representatives)


def _agglomerate(
    job: WatershedRun, method: str, counts: BlockCounts, thresholds: Sequence[float]
) -> list[Point]:
    """Score the fragments, joined at each threshold."""
    if method == MEAN:
        return one_threshold(method, counts, _evidence(job), thresholds)
    return [
        point(method, {"affinity": threshold}, counts, ids, segments)
        for threshold, ids, segments in quantile_segments(job, thresholds)
    ]


def _write_segments(
    job: WatershedRun, item: Point, min_size: int, client: Any, on_progress: Progress | None
) -> str:
    """Write the volume that a point stands for; return the name of its array."""
    threshold = item.setting["affinity"]
    if item.method != MEAN:
        ((_, ids, segments),) = quantile_segments(job, [threshold])
        write_joined(job, "quantile", ids, segments, min_size)
        return "quantile"
    spec = StitchSpec(
        run_dir=job.folder,
        grid=job.grid,
        across=threshold,
        within=threshold,
        min_size=min_size,
        levels=1,
        allow_missing=True,
    )
    run_stitch(spec, client, on_progress)
    return "segmentation"


def _labels(container: Path, name: str, truth: Volume) -> Volume:
    return open_volume(container, name, kind="labels", unit=truth.unit)


def _evidence(job: WatershedRun) -> Evidence:
    grid = BlockGrid.from_dict(job.grid)
    journal = Journal(job.folder / "journal" / "predict")
    present = journal.ranks(np.arange(grid.n_blocks)) == BlockState.DONE
    return collect(np.flatnonzero(present), grid, present, lambda n: open_sidecar(job.folder, n))


def _scored(item: Point, volume: Volume, truth: Volume, options: CountOptions) -> Point:
    """Score a volume that a point stands for."""
    report = evaluate(volume, truth, worst=0, **options)
    return replace(item, segments=report.segments, scores=report.scores())


def _read_report(run: RunFolder) -> dict[str, Any]:
    try:
        return read_record(run.path / REPORT)
    except (OSError, DamagedError):
        raise InputError(
            f"{run.path} has no {REPORT}; run `agq baseline watershed {run.path}` first"
        ) from None


def _threshold(report: dict[str, Any], method: str) -> float:
    for item in report["chosen"]:
        if item["method"] == method:
            return float(item["setting"]["affinity"])
    raise InputError(f"the report of {report['run']} has no {method}; tune that method there")
