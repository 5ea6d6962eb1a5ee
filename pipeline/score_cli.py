"""Commands that score: `agq evaluate`, `agq sweep`, `agq baseline watershed`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from blockwise.arrays import Volume
from blockwise.errors import InputError
from pipeline.run_folder import RunFolder

baseline_app = typer.Typer(no_args_is_help=True, help="Other methods on the same run, to compare.")

out = Console(highlight=False)

RunDir = Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)]
Truth = Annotated[
    str | None,
    typer.Option(help="Truth: path or path::dataset; default: that of the configuration."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Border = Annotated[
    int, typer.Option("--ignore-border", help="Leave out voxels this near to borders of the truth.")
]
Border3d = Annotated[
    bool, typer.Option("--border-3d", help="Measure that distance over sections too.")
]
By = Annotated[
    Literal["voi_sum", "adapted_rand_error"], typer.Option(help="What a search minimises.")
]


def truth_of(run: RunFolder, location: str | None) -> Volume:
    """Open the truth named, or that of a run's configuration."""
    from pipeline.config import parse_config
    from pipeline.locations import open_location
    from pipeline.prepare import open_section

    if location is not None:
        return open_location(location, "labels")
    recorded = {**run.record()["config"], "ledger": None}
    section = parse_config(recorded, source=str(run.record_path)).evaluate
    if section is None:
        raise InputError(f"{run.path}: its configuration names no truth; give --truth")
    return open_section(section.truth, run, "labels", "evaluate.truth")


@baseline_app.callback()
def _group() -> None:
    """Keep the name of a single command."""


@baseline_app.command("watershed")
def watershed(
    run_dir: RunDir,
    truth: Truth = None,
    tuned_on: Annotated[
        Path | None,
        typer.Option(help="Run whose best thresholds are used; default: search here."),
    ] = None,
    method: Annotated[
        Literal["both", "mean", "quantile"], typer.Option(help="How edges are scored.")
    ] = "both",
    boundary: Annotated[float, typer.Option(help="In-plane affinity of a border.")] = 0.5,
    seed_distance: Annotated[int, typer.Option(help="Window of a seed, voxels.")] = 10,
    grow: Annotated[bool, typer.Option("--grow", help="Fragments grow over borders too.")] = False,
    by: By = "voi_sum",
    ignore_border: Border = 0,
    border_3d: Border3d = False,
    as_json: AsJson = False,
) -> None:
    """Compare with seeded watershed and agglomeration of the same network's affinities."""
    from blockwise.cluster import local_client
    from pipeline.baseline import MEAN, METHODS, QUANTILE, compare
    from pipeline.contingency import BorderRule
    from pipeline.progress import RunProgress
    from pipeline.watershed import WatershedSettings

    settings = WatershedSettings(boundary, seed_distance, grow)
    if tuned_on is not None and settings != WatershedSettings():
        raise InputError("--tuned-on brings its own watershed settings; leave the others out")
    run = RunFolder(run_dir)
    with run.lock(), local_client() as client, RunProgress(run.path) as progress:
        report = compare(
            run,
            truth_of(run, truth),
            client,
            settings=None if tuned_on else settings,
            methods={"both": METHODS, "mean": (MEAN,), "quantile": (QUANTILE,)}[method],
            tuned_on=RunFolder(tuned_on) if tuned_on else None,
            criterion=by,
            ignore=BorderRule(ignore_border, border_3d),
            on_progress=progress.step,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
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
    as_json: AsJson = False,
) -> None:
    """Score many stitching thresholds of a stitched run without stitching again."""
    from blockwise.cluster import local_client
    from blockwise.contacts import Evidence
    from blockwise.files import write_atomic
    from blockwise.stitch_tasks import EVIDENCE_FILE
    from pipeline.baseline import fragment_counts
    from pipeline.contingency import BorderRule
    from pipeline.sweep import best, points_table, two_thresholds

    run = RunFolder(run_dir)
    labels = truth_of(run, truth)
    path = run.path / "contacts" / EVIDENCE_FILE
    if not path.exists():
        raise InputError(f"{run.path} is not stitched yet; `agq stitch` it first")
    evidence = Evidence.from_bytes(path.read_bytes())
    with local_client() as client:
        counts = fragment_counts(run, labels, client, BorderRule(ignore_border, border_3d))
    points = two_thresholds(
        "AGQ", counts, evidence, _numbers("--across", across), _numbers("--within", within)
    )
    points.sort(key=lambda item: item.value(by))
    report = {"best": best(points, by).to_dict(), "points": [item.to_dict() for item in points]}
    write_atomic(run.path / "sweep.json", json.dumps(report, indent=1).encode())
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        out.print(points_table(points[:10], f"{run.path.name}: the best of {len(points)} settings"))


def _numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} {text}: expected numbers with commas between") from None
    if not all(0 <= value <= 1 for value in values):
        raise InputError(f"{name} {text}: thresholds are affinities from 0 to 1")
    return values
