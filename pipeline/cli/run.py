"""Commands that make: a whole run, a prediction, a plan, an input volume."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import (
    AsJson,
    ConfigFile,
    Overwrite,
    RunDir,
    Settings,
    Trust,
    Verbose,
    parse_blocks,
    parse_box,
    parse_triple,
)
from agq.pipeline.cli.main import EXIT_FAILED
from agq.pipeline.config.schema import load_config
from agq.plain_text import say
from agq.terminal import busy, console

out = console()
err = console(stderr=True)


def run(
    config: ConfigFile,
    overwrite: Overwrite = False,
    trust: Trust = False,
    verbose: Verbose = False,
    settings: Settings = None,
) -> None:
    """Predict, stitch, build the pyramid, score and report; run it again to go on."""
    from agq.pipeline.api import BlocksFailedError, Run

    bars: Literal["bars", "steps"] = "steps" if verbose else "bars"
    job = Run(load_config(config, settings), on_progress=bars, trust=trust)
    try:
        report = job.run(overwrite=overwrite)
    except BlocksFailedError as error:
        _explain_failures(job.path, config, error.failed)
        raise typer.Exit(EXIT_FAILED) from None
    out.print(report.table())
    if report.predict.failed:
        _explain_failures(job.path, config, report.predict.failed)
        raise typer.Exit(EXIT_FAILED)


def predict(
    config: ConfigFile,
    overwrite: Overwrite = False,
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Try only the blocks that failed before.")
    ] = False,
    blocks: Annotated[
        str | None,
        typer.Option(help="Compute these again, done or not: 12,40-44.", show_default=False),
    ] = None,
    roi: Annotated[
        str | None,
        typer.Option(
            help="Compute the blocks of a box of voxels again: z0:z1,y0:y1,x0:x1.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --blocks or --roi: only say which they are.")
    ] = False,
    trust: Trust = False,
    settings: Settings = None,
) -> None:
    """Label every block that is not done yet, or some blocks again."""
    from agq.pipeline.api import Run

    numbers = None if blocks is None else parse_blocks(blocks)
    box = None if roi is None else parse_box("--roi", roi)
    if numbers is None and box is None:
        if dry_run:
            raise InputError("--dry-run: goes with --blocks or --roi; agq plan is for whole runs")
    elif overwrite or only_failed:
        raise InputError("--blocks and --roi: go with neither --overwrite nor --only-failed")
    values = load_config(config, settings)
    if dry_run:
        from agq.pipeline.run.chosen_blocks import ChosenBlocks, choose_blocks
        from agq.pipeline.run.prepare import prepare

        prepared = prepare(values, trust=trust)
        out.print(ChosenBlocks.look_up(prepared, choose_blocks(prepared, numbers, box)).table())
        return
    job = Run(values, on_progress="bars", trust=trust)
    report = job.predict(only_failed=only_failed, overwrite=overwrite, blocks=numbers, roi=box)
    if report.failed:
        _explain_failures(job.path, config, report.failed)
        raise typer.Exit(EXIT_FAILED)


def worker(
    run_dir: RunDir,
    count: Annotated[
        int, typer.Option(min=1, help="Worker processes, one per GPU where there are GPUs.")
    ] = 1,
    wait_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait for a run and its coordinator, or the next one."),
    ] = 900,
    grace_s: Annotated[
        float,
        typer.Option(min=0, help="Seconds to finish blocks after SIGTERM, SIGUSR2 or Ctrl-C."),
    ] = 5,
) -> None:
    """Join a running prediction from any machine that sees its folder.

    Exit status: 0, the prediction has ended or the next coordinator did not come; 1, none came at
    all; 2, no run there, files of somebody else, or a coordinator out of reach; 130, 140 or 143,
    told to leave before the end (start it again); others, it cannot work on this machine.
    """
    from agq.credentials import log_to_stderr
    from agq.pipeline.slurm.join import join

    log_to_stderr()
    if status := join(run_dir, count, wait_s=wait_s, grace_s=grace_s):
        raise typer.Exit(status)


def plan(
    config: ConfigFile,
    time_block: Annotated[
        bool | None,
        typer.Option(
            "--time/--no-time",
            help="Compute one block here, for the time; default: if none was timed yet and the "
            "work is not for GPUs of a cluster.",
        ),
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Time one block in a short SLURM job.")
    ] = False,
    assume: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for a block, if none is timed.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
    settings: Settings = None,
) -> None:
    """Say what a run would do and cost, and find what would stop it. Writes no result."""
    if submit and (time_block is not None or assume is not None):
        raise InputError("--submit times a block: it goes with neither --time nor --assume")
    if assume is not None and time_block:
        raise InputError("--assume: goes without --time, whose block says how long one takes")
    values = load_config(config, settings)
    on_cluster = submit or values.slurm is not None
    with busy("loading libraries") as tell:
        from agq.pipeline.run.plan import make_plan
        from agq.pipeline.run.prepare import prepare, require_room

        measure = None
        if submit:
            from agq.pipeline.slurm.trial.job import TrialJob

            measure = TrialJob.checked(values, tell)
        tell("opening the input and the checkpoint")
        prepared = prepare(values, check_room=False, workers_here=not on_cluster, trust=trust)
        report = make_plan(
            prepared,
            time_block=time_block,
            on_cluster=on_cluster,
            assumed_s=assume,
            measure_there=measure,
            tell=tell,
        )
    if as_json:
        say(json.dumps(report.to_dict(), indent=1))
    else:
        out.print(report.table())
    # Last, so that the plan is seen.
    require_room(prepared)


def import_(
    source: Annotated[
        str, typer.Argument(help="tif file, folder or glob of tif or png sections, h5, npz, npy.")
    ],
    container: Annotated[Path, typer.Argument(readable=False, help="zarr container to write to.")],
    voxel_size: Annotated[
        str | None,
        typer.Option(help="z,y,x in whole world units; needed if the file does not say it."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Name of the array to make.")] = "raw",
    key: Annotated[str | None, typer.Option(help="Dataset of an h5 or key of an npz.")] = None,
    offset: Annotated[
        str | None,
        typer.Option(help="World position z,y,x of the first voxel; default: the file's, or 0."),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="World unit: nm, angstrom or pm; default: the coarsest that is exact."),
    ] = None,
    allow_gaps: Annotated[
        bool,
        typer.Option("--allow-gaps", help="Fill sections whose number no file of a folder has."),
    ] = False,
    gap_value: Annotated[float, typer.Option(help="Value of filled sections.")] = 0,
) -> None:
    """Turn an image stack into a zarr volume that knows its voxel size."""
    from agq.pipeline.data.importer import import_volume
    from agq.pipeline.status.progress import step_progress

    size = voxel_size and parse_triple("--voxel-size", voxel_size, least=1)
    place = offset and parse_triple("--offset", offset)
    there = (container / dataset).exists()
    with step_progress("import") as report:
        volume = import_volume(
            source,
            container,
            dataset,
            size or None,
            key=key,
            offset=place or None,
            unit=unit,
            gap_value=gap_value if allow_gaps else None,
            on_progress=report,
        )
    state = "complete already:" if there else "wrote"
    out.print(
        f"{state} {container}/{dataset}: {list(volume.shape)} voxels of "
        f"{list(volume.voxel_size)} {volume.unit} at {list(volume.offset)}",
        markup=False,
    )


def synthetic(
    container: Annotated[
        Path, typer.Argument(readable=False, help="zarr container to write raw and labels to.")
    ],
    shape: Annotated[str, typer.Option(help="Voxels z,y,x.")] = "40,768,768",
    seed: Annotated[int, typer.Option(help="The same seed gives the same volume.")] = 0,
) -> None:
    """Make an EM-like volume with ground truth."""
    from agq.pipeline.data.synthetic import volume as generator
    from agq.pipeline.status.progress import step_progress

    with step_progress("synthetic") as report:
        size = parse_triple("--shape", shape, least=1)
        generator.write(container, size, seed=seed, on_progress=report)
    out.print(f"wrote {container}/raw and {container}/labels", markup=False)


def _explain_failures(run_dir: Path, config: Path, failed: tuple[int, ...]) -> None:
    from agq.blockwise.journal.reader import Journal
    from agq.blockwise.volumes.triples import show_voxel
    from agq.pipeline.folder import RunFolder

    journal = Journal(run_dir / "journal" / "predict")
    journal.refresh()
    records = {record.block: record for record in journal.failed()}
    run = RunFolder(run_dir)
    grid, unit = run.grid(), run.identity()["raw"].get("unit", "nm")
    say = partial(err.print, markup=False)
    say(f"{len(failed)} block{'s' if len(failed) > 1 else ''} failed:", style="red")
    for number in failed[:20]:
        record = records.get(number)
        place = show_voxel(grid.middle_voxel(number), grid.voxel_size, unit, grid.offset)
        say(f"  block {number}, {place}: {record.reason if record else 'no record'}")
    if len(failed) > 20:
        say(f"  ... and {len(failed) - 20} more (agq status {run_dir})")
    say(f"Retry only these: agq predict {config} --only-failed")
