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
from typing import Any

import numpy as np
from rich.console import Group

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.sidecar import open_sidecar
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import STATE_RANK
from agq.blockwise.stitch.evidence.contacts import Evidence
from agq.blockwise.stitch.evidence.from_sidecars import collect
from agq.blockwise.stitch.evidence.in_memory import read_evidence
from agq.blockwise.stitch.merge.rule import Thresholds, agglomerate
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError
from agq.pipeline.evaluate.baseline.quantile import quantile_segments, write_joined
from agq.pipeline.evaluate.baseline.watershed import WatershedRun, WatershedSettings, make_fragments
from agq.pipeline.evaluate.contingency import BlockCounts, BorderRule
from agq.pipeline.evaluate.evaluate import count, evaluate
from agq.pipeline.evaluate.sweep import Criterion, Point, best, one_threshold, point, points_table
from agq.pipeline.folder import RunFolder

MEAN, QUANTILE = "watershed + mean", "watershed + 75% quantile"
METHODS = (MEAN, QUANTILE)
REPORT = "baseline.json"
THRESHOLDS = (*(t / 20 for t in range(2, 20)), 0.97, 0.98, 0.99)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BaselineReport:
    """The comparison.

    Attributes
    ----------
    run, truth
        What was compared with what.
    settings
        Of the watershed.
    agq
        The run's own segmentation, small segments kept.
    chosen
        The baseline by method, at its best threshold, or at the one given; small segments kept.
    final
        The run's own segmentation and the baselines at those thresholds as volumes, small
        segments removed from all of them as the run's `stitch.min_size` says.
    min_size
        That size in voxels.
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
        where = f"thresholds of {self.tuned_on}" if self.tuned_on else "thresholds searched here"
        kept = points_table(
            [self.agq, *self.chosen],
            f"{self.run}: predicted 0 filled by the nearest; {where}; small segments kept",
        )
        main = points_table(
            self.final, f"the same without segments of fewer than {self.min_size} voxels"
        )
        times = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        return Group(kept, main, f"time: {times}")


def compare(
    run: RunFolder,
    truth: Volume,
    client: Any,
    *,
    settings: WatershedSettings | None = None,
    methods: Sequence[str] = METHODS,
    thresholds: Sequence[float] = THRESHOLDS,
    tuned_on: RunFolder | None = None,
    criterion: Criterion = "voi_sum",
    ignore: BorderRule | None = None,
    on_progress: Progress | None = None,
) -> BaselineReport:
    """Make the baseline of a run, score it beside the run's own segmentation, and record both.

    Parameters
    ----------
    run
        A stitched run that kept its affinities.
    truth
        Ground truth.
    client
        A `distributed.Client` whose workers see the run folder.
    settings
        Of the watershed; None: the defaults, or those of `tuned_on`.
    methods
        Which agglomerations, of `METHODS`.
    thresholds
        Affinities to search over.
    tuned_on
        Take settings and best thresholds from the report of this run and search nothing.
    criterion
        What a search minimises.
    ignore
        Which voxels near borders of the truth are left out.
    on_progress
        Called with the name of a step, items done and items in all.

    Raises
    ------
    InputError
        If the run is not stitched or kept no affinities, `tuned_on` has no report, or memory does
        not suffice for the quantile.
    """
    tuned = None if tuned_on is None else _read_report(tuned_on)
    if tuned is not None and settings is None:
        settings = WatershedSettings(**tuned["settings"])
    settings = settings or WatershedSettings()
    own = _own(run, truth, client, ignore)
    job = make_fragments(run, settings, client=client, on_progress=on_progress)
    grid = BlockGrid.from_dict(job.grid)
    fragments = _labels(job.folder / "data.zarr", "fragments", truth)
    counts = count(fragments, truth, client=client, ignore=ignore).counts
    seconds = {
        "network and decoding": Journal(run.journal("predict")).totals()["compute_s"],
        "watershed": Journal(job.folder / "journal" / "predict").totals()["compute_s"],
    }
    curves: list[Point] = []
    chosen = []
    for method in methods:
        wanted = list(thresholds) if tuned is None else [_threshold(tuned, method)]
        begun = time.perf_counter()
        if method == MEAN:
            found = one_threshold(method, counts, _evidence(job, grid), wanted)
        else:
            found = [
                point(method, {"affinity": threshold}, counts, ids, segments)
                for threshold, ids, segments in quantile_segments(job, wanted)
            ]
        seconds[f"agglomeration, {method}"] = time.perf_counter() - begun
        chosen.append(best(found, criterion))
        if tuned is None:
            curves += found
    min_size = int(run.record()["config"]["stitch"].get("min_size", 0))
    final = [_scored(own, _labels(run.container, "segmentation", truth), truth, client, ignore)]
    for item in chosen:
        threshold = item.setting["affinity"]
        if item.method == MEAN:
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
            name = "segmentation"
        else:
            name = "quantile"
            write_joined(job, name, *quantile_segments(job, [threshold])[0][1:], min_size)
        volume = _labels(job.folder / "data.zarr", name, truth)
        final.append(_scored(item, volume, truth, client, ignore))
    report = BaselineReport(
        run=str(run.path),
        truth=truth.name,
        settings=settings,
        agq=own,
        chosen=chosen,
        final=final,
        min_size=min_size,
        curves=curves,
        tuned_on=None if tuned_on is None else str(tuned_on.path),
        segmentation=str(job.folder / "data.zarr" / "segmentation"),
        seconds=seconds,
    )
    write_atomic(run.path / REPORT, json.dumps(report.to_dict(), indent=1).encode())
    return report


def fragment_counts(
    run: RunFolder, truth: Volume, client: Any, ignore: BorderRule | None = None
) -> BlockCounts:
    """Count the fragments of a run against the truth."""
    return count(
        _labels(run.container, "fragments", truth), truth, client=client, ignore=ignore
    ).counts


def _own(run: RunFolder, truth: Volume, client: Any, ignore: BorderRule | None) -> Point:
    evidence = read_evidence(run.path)
    stitch = run.record()["config"]["stitch"]
    setting = {name: float(stitch[name]) for name in ("across", "within")}
    result = agglomerate(
        evidence.nodes.ids, evidence.contacts, Thresholds(setting["across"], setting["within"])
    )
    counts = fragment_counts(run, truth, client, ignore)
    return point("AGQ", setting, counts, result.ids, result.representatives)


def _labels(container: Path, name: str, truth: Volume) -> Volume:
    return open_volume(container, name, kind="labels", unit=truth.unit)


def _evidence(job: WatershedRun, grid: BlockGrid) -> Evidence:
    journal = Journal(job.folder / "journal" / "predict")
    present = journal.ranks(np.arange(grid.n_blocks)) == STATE_RANK["done"]
    return collect(np.flatnonzero(present), grid, present, lambda n: open_sidecar(job.folder, n))


def _scored(
    item: Point, volume: Volume, truth: Volume, client: Any, ignore: BorderRule | None
) -> Point:
    """Score a volume that a point stands for."""
    report = evaluate(volume, truth, client=client, ignore=ignore, worst=0)
    return replace(item, segments=report.segments, scores=report.scores())


def _read_report(run: RunFolder) -> dict[str, Any]:
    try:
        report = json.loads((run.path / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{run.path} has no {REPORT}; run `agq baseline watershed {run.path}` first"
        ) from None
    assert isinstance(report, dict)
    return report


def _threshold(report: dict[str, Any], method: str) -> float:
    for item in report["chosen"]:
        if item["method"] == method:
            return float(item["setting"]["affinity"])
    raise InputError(f"the report of {report['run']} has no {method}; tune that method there")
