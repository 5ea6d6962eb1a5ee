"""Commands that score: `agq evaluate`, `skeletons`, `sweep` and `baseline watershed`."""

import json
import shlex
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agq import waiting
from agq.blockwise.volumes.triples import commas
from agq.errors import InputError
from agq.pipeline.cli.arguments import AsJson, open_location
from agq.pipeline.config.recorded import require_own_folder
from agq.pipeline.folder import RunFolder
from agq.plain_text import say
from agq.terminal import console

if TYPE_CHECKING:
    from agq.blockwise.volumes.open import Volume

baseline_app = typer.Typer(no_args_is_help=True, help="Other methods on the same run, to compare.")

out = console()

RunDir = Annotated[
    Path, typer.Argument(readable=False, help="Folder of a finished run.", show_default=False)
]
Truth = Annotated[
    str | None,
    typer.Option(help="Truth: path or path::dataset; default: that of the configuration."),
]
Border = Annotated[
    int,
    typer.Option(
        "--ignore-border", help="Leave out voxels within this distance of borders of the truth."
    ),
]
Border3d = Annotated[
    bool, typer.Option("--border-3d", help="Measure that distance across sections too.")
]
IgnoreLabels = Annotated[
    str | None,
    typer.Option(
        help="Labels of the truth that mean unlabelled, as 0 does: -1,4294967295; default: those "
        "of the configuration."
    ),
]
By = Annotated[
    Literal["voi_sum", "adapted_rand_error"], typer.Option(help="Score that the search minimises.")
]


def truth_of(run: RunFolder, location: str | None) -> "Volume":
    """Open the truth named, or that of a run's configuration; only what lies in the run's ROI."""
    from agq.pipeline.config.schema import VolumeSettings, parse_config
    from agq.pipeline.data.importer import is_importable
    from agq.pipeline.data.inputs import open_input, roi_box, world_roi

    recorded = {**run.config(), "ledger": None, "notify": None}
    config = parse_config(recorded, source=str(run.record_path))
    path, _, dataset = (location or "").partition("::")
    if location is not None and is_importable(path):
        settings = VolumeSettings(path=path, dataset=dataset or None)
        truth = open_input(settings, run, "labels", "--truth", config.input.unit)
    elif location is not None:
        # In the unit of the ROI and of what is scored.
        truth = open_location(location, "labels", config.input.unit)
    elif config.evaluate is not None:
        unit = config.input.unit
        truth = open_input(config.evaluate.truth, run, "labels", "evaluate.truth", unit)
    else:
        raise InputError(f"{run.path}: its configuration names no truth; give --truth")
    if config.input.roi is None:
        return truth
    grid = run.grid()
    return truth.crop(world_roi(roi_box(config.input.roi, grid), grid))


def labels_to_ignore(run: RunFolder, text: str | None) -> tuple[int, ...]:
    """Return the labels not to score: those asked for, or those of a run's configuration."""
    if text is None:
        recorded = run.record()["config"].get("evaluate") if run.exists() else None
        return tuple((recorded or {}).get("ignore_labels", ()))
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--ignore-labels {text}: expected whole numbers a,b,...") from None


def evaluate(
    segmentation: Annotated[
        str, typer.Argument(help="Labels to score: run folder, path or path::dataset.")
    ],
    groundtruth: Annotated[
        str | None,
        typer.Argument(help="Truth: path or path::dataset; default: that of the run."),
    ] = None,
    ignore_border: Border = 0,
    border_3d: Border3d = False,
    ignore_labels: IgnoreLabels = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Also score each block of a run before stitching.")
    ] = False,
    skeletons: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Skeletons (npz, swc, folder of swc): adds the expected run length.",
        ),
    ] = None,
    tolerance: Annotated[
        int,
        typer.Option(
            help="Nodes of a second skeleton that a segment may hold without being a merger."
        ),
    ] = 0,
    worst: Annotated[int, typer.Option(help="Mergers and splits to list.")] = 5,
    plot: Annotated[
        Path | None, typer.Option(readable=False, help="Also draw the scores to this png.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(readable=False, help="Also write JSON to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a segmentation against ground truth: variation of information, Rand, run length."""
    from agq.blockwise.storage.files import write_atomic
    from agq.pipeline.evaluate import evaluate as scoring
    from agq.pipeline.evaluate.block_scores import score_blocks
    from agq.pipeline.evaluate.contingency import BorderRule
    from agq.pipeline.evaluate.plot import plot_report
    from agq.pipeline.evaluate.skeletons import expected_run_length, read_skeletons, segments_at
    from agq.pipeline.status.progress import step_progress

    run = RunFolder(Path(segmentation))
    if blocks and not run.exists():
        raise InputError(f"--blocks needs a run folder, and {segmentation} is not one")
    waiting.doing("opening the volumes")
    trees = None if skeletons is None else read_skeletons(skeletons)
    labels, truth = _volumes(run, segmentation, groundtruth)
    ignore = BorderRule(ignore_border, border_3d, labels_to_ignore(run, ignore_labels))
    with step_progress("evaluate") as step:
        report = scoring.evaluate(labels, truth, ignore=ignore, worst=worst, on_progress=step)
    plain = report.to_dict()
    shown: list[Any] = [report.table()]
    single = None
    if blocks:
        with step_progress("blocks") as step:
            single = score_blocks(run, truth, ignore=ignore, on_progress=step)
        plain["blocks"] = single.to_dict()
        shown.append(single.table())
    waiting.doing("preparing the scores")
    if trees is not None:
        runs = expected_run_length(trees, segments_at(labels, trees.nodes), tolerance=tolerance)
        plain["expected_run_length"] = runs.to_dict()
        shown.append(runs.line())
    if plot is not None:
        plot_report(plot, report, single)
    text = json.dumps(plain, indent=1)
    if output is not None:
        write_atomic(output, text.encode())
    if as_json:
        say(text)
        return
    errors = [*report.worst_mergers, *report.worst_splits]
    if run.exists() and errors:
        shown.append(f"Look at one: agq view {run.path} --at {commas(report.voxel(errors[0]))}")
    for item in shown:
        out.print(item, markup=False)


def _volumes(
    run: RunFolder, segmentation: str, groundtruth: str | None
) -> tuple["Volume", "Volume"]:
    """Open a segmentation and its truth, by default that of its run."""
    from agq.blockwise.volumes.placement import UNITS

    if run.exists():
        truth = truth_of(run, groundtruth)
        return open_location(segmentation, "labels", truth.unit), truth
    if groundtruth is None:
        raise InputError(f"{segmentation} is not a run folder: name the truth as second argument")
    volumes = [open_location(where, "labels", None) for where in (segmentation, groundtruth)]
    # Both in the finer of the two units, in which both are exact.
    unit = max((volume.unit for volume in volumes), key=UNITS.index)
    labels, truth = (
        volume if volume.unit == unit else open_location(where, "labels", unit)
        for where, volume in zip((segmentation, groundtruth), volumes, strict=True)
    )
    return labels, truth


def skeletons(
    groundtruth: Annotated[str, typer.Argument(help="Truth: path or path::dataset.")],
    output: Annotated[Path, typer.Argument(readable=False, help="npz file to write.")],
) -> None:
    """Thin the objects of a truth to skeletons, for the expected run length."""
    from agq.pipeline.evaluate.skeletons import skeletonize

    thinned = skeletonize(open_location(groundtruth, "labels", None))
    thinned.save(output)
    out.print(f"wrote {output}: {len(set(thinned.owner.tolist()))} skeletons", markup=False)


@baseline_app.callback()
def _group() -> None:
    """Keep the name of a single command."""


@baseline_app.command("watershed")
def watershed(
    run_dir: RunDir,
    truth: Truth = None,
    tuned_on: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="Run whose best thresholds are used; default: search here."
        ),
    ] = None,
    method: Annotated[
        Literal["both", "mean", "quantile"], typer.Option(help="How edges are scored.")
    ] = "both",
    boundary: Annotated[float, typer.Option(help="In-plane affinity of a border.")] = 0.5,
    seed_distance: Annotated[int, typer.Option(help="Window of a seed, voxels.")] = 10,
    grow: Annotated[bool, typer.Option("--grow", help="Fragments grow over borders too.")] = False,
    context: Annotated[
        int, typer.Option(help="Voxels around a block, in y and x, that the watershed reads.")
    ] = 32,
    by: By = "voi_sum",
    ignore_border: Border = 0,
    border_3d: Border3d = False,
    ignore_labels: IgnoreLabels = None,
    as_json: AsJson = False,
) -> None:
    """Compare with seeded watershed and agglomeration of the same network's affinities."""
    from agq.blockwise.stitch.cluster import dask_client
    from agq.pipeline.evaluate.baseline.compare import MEAN, METHODS, QUANTILE, Search, compare
    from agq.pipeline.evaluate.baseline.watershed import WatershedSettings
    from agq.pipeline.evaluate.contingency import BorderRule
    from agq.pipeline.evaluate.plot import plot_curves
    from agq.pipeline.status.progress import RunProgress

    settings = WatershedSettings(boundary, seed_distance, grow, context)
    if tuned_on is not None and settings != WatershedSettings():
        raise InputError(
            "--tuned-on takes the watershed settings of that run; leave out these options"
        )
    search = Search(
        settings=None if tuned_on else settings,
        methods={"both": METHODS, "mean": (MEAN,), "quantile": (QUANTILE,)}[method],
        tuned_on=RunFolder(tuned_on) if tuned_on else None,
        criterion=by,
    )
    run = RunFolder(run_dir)
    require_own_folder(run.path)
    ignore = BorderRule(ignore_border, border_3d, labels_to_ignore(run, ignore_labels))
    with run.lock(), dask_client() as client, RunProgress(run.path) as progress:
        labels = truth_of(run, truth)
        report = compare(run, labels, client, search, ignore=ignore, on_progress=progress.step)
    waiting.doing("drawing the curves")
    plot_curves(run.path / "baseline.png", report.curves, [report.agq, *report.chosen])
    if as_json:
        say(json.dumps(report.to_dict(), indent=1))
    else:
        out.print(report.table())


def sweep(
    run_dir: RunDir,
    truth: Truth = None,
    across: Annotated[str, typer.Option(help="Thresholds across borders.")] = "0.5,0.6,0.7,0.8,0.9",
    within: Annotated[
        str, typer.Option(help="Thresholds inside blocks.")
    ] = "0.6,0.7,0.75,0.8,0.85,0.9,1.0",
    by: By = "voi_sum",
    ignore_border: Border = 0,
    border_3d: Border3d = False,
    ignore_labels: IgnoreLabels = None,
    widen: Annotated[
        bool,
        typer.Option("--widen", help="Go on beyond the edge where the best lies there, 4 times."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(readable=False, help="Also draw the scores to this png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score many stitching thresholds of a stitched run without stitching again."""
    from agq.blockwise.stitch.contacts import read_evidence
    from agq.blockwise.stitch.workers import is_small
    from agq.blockwise.storage.files import write_atomic
    from agq.pipeline.evaluate.baseline.compare import (
        fragment_counts,
        run_kinds,
        stitch_settings,
    )
    from agq.pipeline.evaluate.contingency import BorderRule
    from agq.pipeline.evaluate.sweep import MOST_ROUNDS, points_table, search_pairs, two_thresholds

    run = RunFolder(run_dir)
    if plot is not None and not plot.parent.is_dir():
        raise InputError(f"--plot {plot}: the folder {plot.parent} does not exist")
    waiting.doing("reading the truth and the evidence")
    labels = truth_of(run, truth)
    evidence = read_evidence(run.path)
    workers: AbstractContextManager[Any] = nullcontext()
    if not is_small(run.grid(), run.grid().n_blocks):
        from agq.blockwise.stitch.cluster import dask_client  # loads dask

        workers = dask_client()
    with workers as client:
        ignore = BorderRule(ignore_border, border_3d, labels_to_ignore(run, ignore_labels))
        waiting.doing("counting fragments against the truth")
        counts = fragment_counts(run, labels, client=client, ignore=ignore)
    waiting.doing("scoring pairs of thresholds")
    pairs = numbers_of("--across", across), numbers_of("--within", within)
    base = stitch_settings(run)
    score = partial(two_thresholds, "AGQ", counts, evidence, kinds=run_kinds(run), base=base)
    found = search_pairs(score, *pairs, by, MOST_ROUNDS if widen else 0)
    apply = _apply(run, found.best.setting)
    report = found.to_dict() | {"apply": apply}
    write_atomic(run.path / "sweep.json", json.dumps(report, indent=1).encode())
    if plot is not None:
        from agq.pipeline.evaluate.plot import plot_search  # loads matplotlib

        plot_search(plot, found, by)
    if as_json:
        say(json.dumps(report, indent=1))
        return
    title = f"{run.path.name}: the best of {len(found.points)} settings"
    out.print(points_table(found.points[:10], title))
    for name, values in found.beyond().items():
        edge = found.best.setting[name]
        way, side = ("lowest", "lower") if values[0] < edge else ("highest", "higher")
        how = f"--{name} {','.join(f'{v:g}' for v in values)}" if widen else "--widen"
        out.print(
            f"The best {name}, {edge:g}, is the {way} tried: a {side} one may be better ({how})",
            style="yellow",
        )
    out.print(f"To apply the best: {apply}")


def _apply(run: RunFolder, setting: dict[str, float]) -> str:
    """Return the command that stitches with these thresholds."""
    words = ["agq", "stitch", str(run.path)]
    for name, value in setting.items():
        words += ["--set", f"stitch.{name}={value:g}"]
    # A margin of the run would be added to both.
    if run.config().get("stitch", {}).get("margin"):
        words += ["--margin", "0"]
    return shlex.join(words)


def numbers_of(name: str, text: str) -> tuple[float, ...]:
    """Read thresholds with commas between."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name} {text}: expected numbers with commas between") from None
    if not all(0 <= value <= 1 for value in values):
        raise InputError(f"{name} {text}: thresholds are affinities from 0 to 1")
    return values
