"""The command line: `agq COMMAND`. Thin: every command calls one function elsewhere."""

import errno
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from blockwise.errors import InputError, RunStoppedError
from model.errors import ModelInputError
from pipeline import look_cli, stitch_cli, watch_cli
from pipeline.config import Config, load_config, parse_config
from pipeline.export_cli import export_app
from pipeline.score_cli import baseline_app, evaluate, skeletons, sweep
from pipeline.settings import apply_override
from pipeline.slurm import commands as slurm_commands
from pipeline.train_cli import checkpoint_app, train

if TYPE_CHECKING:
    from pipeline.evaluate import EvaluationReport
    from pipeline.prepare import Prepared

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment neurons in large EM volumes: predict blocks, stitch them, watch and evaluate.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check a configuration or print its schema.")
app.add_typer(config_app, name="config")
app.add_typer(baseline_app, name="baseline")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(export_app, name="export")
for _command in (evaluate, sweep, skeletons, train):
    app.command()(_command)
look_cli.register(app)
slurm_commands.register(app)
watch_cli.register(app)
stitch_cli.register(app)

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
_shown = {"tracebacks": False}

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration file.", show_default=False)]
Target = Annotated[
    Path, typer.Argument(help="Run folder or YAML configuration file.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a value of the file: section.field=value (repeatable)."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in run_dir and start over.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks instead of one-line errors.")
    ] = False,
) -> None:
    _shown["tracebacks"] = debug


def read_target(target: Path, settings: list[str] | None = None) -> Config:
    """Return the configuration of a run folder, or of a file."""
    if not target.is_dir():
        return load_config(target, settings)
    from pipeline.run_folder import RunFolder

    recorded = RunFolder(target).record()["config"]
    recorded["run_dir"] = str(target)
    recorded["ledger"] = _recorded_ledger(target, recorded.get("ledger"))
    for setting in settings or []:
        apply_override(recorded, setting)
    return parse_config(recorded, source=str(target / "run.json"))


def _recorded_ledger(run_dir: Path, ledger: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the ledger's settings with a URI that can be used: a recorded one is masked."""
    if ledger is None or ledger.get("uri_file") is None:
        # What was submitted keeps it in a file; anything else, and colleagues, may have the
        # environment variable.
        kept = run_dir / "slurm" / "ledger-uri"
        file = str(kept) if os.access(kept, os.R_OK) else None
        ledger = ledger if file is None else {**(ledger or {}), "uri_file": file}
    return None if ledger is None else {**ledger, "uri": None}


@app.command()
def run(config: ConfigFile, overwrite: Overwrite = False, settings: Settings = None) -> None:
    """Do the whole job: predict, stitch, pyramid, evaluation and report. Resumes by itself."""
    from pipeline import stages
    from pipeline.prepare import prepare
    from pipeline.session import open_session

    prepared = prepare(load_config(config, settings))
    with open_session(prepared, overwrite=overwrite) as session:
        report = stages.predict(session)
        if report.failed:
            _explain_failures(prepared.run.path, config, report.failed)
            if not prepared.config.stitch.allow_missing:
                raise typer.Exit(EXIT_FAILED)
        stages.stitch(session)
        scores = stages.score(session)
        stages.picture(session)
    _summary(prepared, scores)
    if report.failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def predict(
    config: ConfigFile,
    overwrite: Overwrite = False,
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Try only the blocks that failed before.")
    ] = False,
    settings: Settings = None,
) -> None:
    """Label every block that is not done yet."""
    from pipeline import stages
    from pipeline.prepare import prepare
    from pipeline.session import open_session

    prepared = prepare(load_config(config, settings))
    with open_session(prepared, overwrite=overwrite) as session:
        report = stages.predict(session, only_failed=only_failed)
    if report.failed:
        _explain_failures(prepared.run.path, config, report.failed)
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    config: ConfigFile,
    time_block: Annotated[
        bool, typer.Option("--time/--no-time", help="Compute one block to estimate the time.")
    ] = True,
    as_json: AsJson = False,
    settings: Settings = None,
) -> None:
    """Say what a run would do and cost, and find what would stop it. Writes no result."""
    from pipeline.plan import make_plan
    from pipeline.prepare import prepare

    report = make_plan(prepare(load_config(config, settings)), time_block=time_block)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        out.print(report.table())


@app.command()
def status(
    target: Annotated[
        Path | None, typer.Argument(help="Run folder or YAML configuration file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All runs in the database of AGQ_MONGO_URI.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, once."""
    from pipeline import monitor
    from pipeline.monitor_view import render

    if every:
        watch_cli.show_all(as_json)
        return
    if target is None:
        raise InputError("which run? Name its folder, or give --all")
    found = monitor.load_status(*watched(target))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
    else:
        out.print(render(found))


@app.command()
def watch(
    target: Target,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between updates.")] = 2.0,
) -> None:
    """Follow a run until it ends."""
    from pipeline import monitor

    monitor.watch(*watched(target), interval_s=interval)


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="tif file, folder or glob of tif or png sections, h5, npz, npy.")
    ],
    container: Annotated[Path, typer.Argument(help="zarr container to write to.")],
    voxel_size: Annotated[str, typer.Option(help="z,y,x in whole world units.")],
    dataset: Annotated[str, typer.Option(help="Name of the array to make.")] = "raw",
    key: Annotated[str | None, typer.Option(help="Dataset of an h5 or key of an npz.")] = None,
    offset: Annotated[str, typer.Option(help="World position z,y,x of the first voxel.")] = "0,0,0",
    unit: Annotated[str, typer.Option(help="World unit: nm, angstrom or pm.")] = "nm",
) -> None:
    """Turn an image stack into a zarr volume that knows its voxel size."""
    from pipeline.importer import import_volume
    from pipeline.locations import parse_triple
    from pipeline.progress import step_progress

    size, place = (
        parse_triple("--voxel-size", voxel_size, least=1),
        parse_triple("--offset", offset),
    )
    with step_progress("import") as report:
        import_volume(
            source, container, dataset, size, key=key, offset=place, unit=unit, on_progress=report
        )
    out.print(f"wrote {container}/{dataset}")


@app.command()
def synthetic(
    container: Annotated[Path, typer.Argument(help="zarr container to write raw and labels to.")],
    shape: Annotated[str, typer.Option(help="Voxels z,y,x.")] = "40,768,768",
    seed: Annotated[int, typer.Option(help="The same seed gives the same volume.")] = 0,
) -> None:
    """Make an EM-like volume with ground truth."""
    from pipeline import synthetic as generator
    from pipeline.locations import parse_triple
    from pipeline.progress import step_progress

    with step_progress("synthetic") as report:
        size = parse_triple("--shape", shape, least=1)
        generator.write(container, size, seed=seed, on_progress=report)
    out.print(f"wrote {container}/raw and {container}/labels")


@config_app.command("check")
def config_check(config: ConfigFile, settings: Settings = None) -> None:
    """Check names and values of a configuration (`agq plan` also opens the files)."""
    load_config(config, settings)
    out.print(f"{config}: ok")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration, every field described."""
    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


def watched(target: Path) -> tuple[Path, Any]:
    """Return the run folder to watch and the ledger that knows it, if there is one."""
    from blockwise.ledger import LedgerError, LedgerSettings, connect

    if not target.exists():
        # A run of another machine, by its folder there or its id.
        settings = LedgerSettings.of_environment()
        if settings.resolve() is None:
            raise InputError(
                f"{target}: no such run folder or configuration file; to ask the database for a "
                "run of another machine, set AGQ_MONGO_URI"
            )
        return target, connect(settings.model_copy(update={"required": True}))
    config = read_target(target)
    settings = config.ledger or LedgerSettings()
    # Watching works without the database: the journal says the same.
    try:
        return Path(config.run_dir), connect(settings.model_copy(update={"required": False}))
    except LedgerError as error:
        # For example, a colleague's run, whose URI only that colleague can read.
        if not target.is_dir():
            raise
        err.print(f"agq: {error}: read from the journal", markup=False, soft_wrap=True)
        return Path(config.run_dir), None


def _explain_failures(run_dir: Path, config: Path, failed: tuple[int, ...]) -> None:
    from blockwise.journal_read import Journal

    journal = Journal(run_dir / "journal" / "predict")
    journal.refresh()
    records = {record.block: record for record in journal.failed()}
    # Paths and commands are there to be copied, so lines are not wrapped.
    say = partial(err.print, markup=False, soft_wrap=True)
    say(f"{len(failed)} block{'s' if len(failed) > 1 else ''} failed:", style="red")
    for number in failed[:20]:
        record = records.get(number)
        place = f" at {record.roi[0]} + {record.roi[1]}" if record and record.roi else ""
        say(f"  block {number}{place}: {record.reason if record else 'no record'}")
    if len(failed) > 20:
        say(f"  ... and {len(failed) - 20} more (agq status {run_dir})")
    say(f"Retry only these: agq predict {config} --only-failed")


def _summary(prepared: "Prepared", scores: "EvaluationReport | None") -> None:
    run = prepared.run
    stitch = run.record()["stages"]["stitch"]["report"]
    predict = run.record()["stages"]["predict"]["report"]
    table = Table(title=f"Run {run.path.name}", show_header=False, title_justify="left")
    table.add_row("fragments", f"{stitch['fragments']:,} in {stitch['blocks']:,} blocks")
    table.add_row("segments", f"{stitch['segments']:,} after {stitch['merges']:,} merges")
    if predict["dropped"]:
        table.add_row("dropped by the query limit", f"{predict['dropped']:,}")
    if stitch["missing"]:
        table.add_row("missing blocks", f"{stitch['missing']:,} (background)")
    table.add_row("largest", stitch_cli.largest_segments(stitch))
    table.add_row("segmentation", str(run.container / "segmentation"))
    table.add_row("picture", str(run.path / f"{run.path.name}.png"))
    table.add_row("viewer", f"agq view {run.path}")
    out.print(table)
    if scores is not None:
        out.print(scores.table())


def main() -> None:
    """Run the command line; wrong input becomes one line and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        # A reader that has seen enough (agq status | head). The interpreter must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, ModelInputError) as error:
        _fail(error, EXIT_BAD_INPUT)
    except RunStoppedError as error:
        _fail(error, EXIT_FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error = OSError(f"{error}: free some space, then the same command goes on")
        _fail(error, EXIT_BAD_INPUT)


def _fail(error: Exception, code: int) -> None:
    if _shown["tracebacks"]:
        raise error
    err.print(f"agq: {' '.join(str(error).split())}", markup=False, soft_wrap=True)
    sys.exit(code)
