"""Commands about networks: `agq train` and `agq checkpoint`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from agq import waiting
from agq.pipeline.cli.arguments import AsJson, ConfigFile, Settings
from agq.plain_text import say
from agq.terminal import console

checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="List, fetch and look at checkpoints, write what they recommend, convert or average them.",
)

out = console()

PUBLISHED_CROPS = 8
"""Crops in a step of the published training, one on each GPU."""

Half = Annotated[bool, typer.Option("--half", help="Store matrices and kernels in half precision.")]
CheckpointFile = Annotated[
    str,
    typer.Argument(help="Checkpoint, ours or published, or a name (agq checkpoint list)."),
]


def train(
    config: ConfigFile,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this many steps.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last state in the output folder.")
    ] = False,
    init_from: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="Checkpoint, ours or published, to start from (fine-tuning)."
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Train the network on annotated volumes; under torchrun on several GPUs."""
    from agq.model.training.config import TrainConfig
    from agq.model.training.distributed import Ranks
    from agq.model.training.loop import train as run_training
    from agq.pipeline.config.yaml_settings import load_yaml
    from agq.pipeline.run.train_data import ready

    plan = load_yaml(TrainConfig, config, settings)
    if init_from is not None:
        plan = plan.model_copy(update={"init_from": init_from})
    ranks = Ranks.of_environment()

    def say(line: str) -> None:
        if ranks.first:
            console(stderr=True).print(f"agq: {line}", markup=False)

    plan = ready(plan, say, alone=ranks.size == 1)
    crops = plan.batch_size * ranks.size
    if crops < PUBLISHED_CROPS and "learning_rate" not in plan.optimizer.model_fields_set:
        say(
            f"a step has {crops} of {PUBLISHED_CROPS} crops, and the published learning rate is "
            "for all: choose optimizer.learning_rate for yours (fewer crops give a noisier "
            "gradient), or raise batch_size or the number of processes"
        )
    waiting.doing("reading the volumes and building the network")
    report = run_training(plan, resume=resume, max_steps=max_steps, say=say)
    if not report.first:
        return
    error = "" if report.best_error is None else f", best validation error {report.best_error:.3f}"
    out.print(
        f"{report.step} steps in {report.minutes:.1f} min, {report.waiting:.1%} of the time "
        f"waiting for data{error}: {report.export}",
        markup=False,
    )
    if not report.finished:
        out.print(
            f"not finished; go on with: agq train {config} --resume", soft_wrap=True, markup=False
        )


@checkpoint_app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the checkpoints that have names: of the package, and of the registry AGQ_REGISTRY."""
    from agq.caches import checkpoints_folder
    from agq.pipeline.checkpoints.registry import known

    entries = known()
    states = {
        name: "in the package"
        if entry.file
        else "fetched"
        if (checkpoints_folder() / name).is_file()
        else f"agq checkpoint fetch {name}"
        for name, entry in entries.items()
    }
    if as_json:
        say(
            json.dumps(
                [e.model_dump(mode="json") | {"state": states[n]} for n, e in entries.items()],
                indent=1,
            )
        )
        return
    for name, entry in entries.items():
        out.print(f"{name}: {states[name]}", markup=False)
        size = " x ".join(f"{v:g}" for v in entry.voxel_size or ())
        facts = [entry.tissue, size and f"{size} nm", entry.licence and f"licence: {entry.licence}"]
        for line in [*filter(None, facts), *entry.scores]:
            out.print(f"  {line}", markup=False)


@checkpoint_app.command("fetch")
def fetch(
    checkpoint: Annotated[str, typer.Argument(help="Name of a registry, or address or path.")],
    sha256: Annotated[
        str | None, typer.Option(help="Of the file; needed for an address.", show_default=False)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What to call it; default: as its file.", show_default=False),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(help="Folder, or its address, that holds the file.", show_default=False),
    ] = None,
) -> None:
    """Download a checkpoint once, check it, and keep it under a name for model.checkpoint.

    A download that breaks off goes on where it was. AGQ_CHECKPOINTS names the folder.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from agq.pipeline.checkpoints.fetch import fetch as fetch_checkpoint
    from agq.pipeline.checkpoints.fetch import find

    wanted = find(checkpoint, sha256, name, mirror)
    bar = Progress(
        TextColumn("fetch"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
    )
    with bar:
        task = bar.add_task("fetch", total=None)
        file, fetched = fetch_checkpoint(
            wanted, lambda done, total: bar.update(task, completed=done, total=total)
        )
    state = "fetched" if fetched else "there already:"
    say(f"{state} {file}; use it with model.checkpoint: {wanted.name}")


@checkpoint_app.command("show")
def show(checkpoint: CheckpointFile, as_json: AsJson = False) -> None:
    """Print what a checkpoint is: what it recommends, where it comes from, size and checksum."""
    from agq.model.checkpoint import load, resolve

    loaded = load(checkpoint)
    numbers = sum(value.numel() for value in loaded.state_dict.values())
    about = {
        "file": str(resolve(checkpoint)),
        "sha256": loaded.file_sha256,
        "sha256 without what is recommended": loaded.sha256,
        "entries": len(loaded.state_dict),
        "numbers": numbers,
        "config": loaded.config.model_dump(mode="json"),
        "recommended": loaded.recommended.settings | loaded.recommended.facts,
        "provenance": loaded.provenance,
    }
    if as_json:
        say(json.dumps(about, indent=1))
        return
    for key, value in about.items():
        if isinstance(value, dict):
            out.print(f"{key}:" if value else f"{key}: none recorded")
            for name, entry in value.items():
                out.print(f"  {name}: {entry}", markup=False)
        else:
            out.print(f"{key}: {value}", markup=False)


@checkpoint_app.command("recommend")
def recommend(
    checkpoint: CheckpointFile,
    run: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Take pieces, blocks and thresholds of this run.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """Write the settings for runs with a checkpoint into its file, or print them.

    They have the names of a configuration (stitch.across=0.6); tissue, licence and notes are lines
    of text. Runs take them where their configuration says nothing.
    """
    from agq.model.checkpoint import load, recommend, resolve
    from agq.model.recommended import Recommended
    from agq.pipeline.config.yaml_settings import parse_values
    from agq.pipeline.folder import RunFolder

    path = resolve(checkpoint)
    values = load(path).recommended.model_dump()
    if run is not None:
        recorded = RunFolder(run).config()
        for section in ("model", "blocks", "stitch"):
            values[section] = {name: recorded[section][name] for name in values[section]}
    found = parse_values(Recommended, values, settings, f"recommended settings of {path}")
    if run is not None or settings:
        recommend(path, found)
        out.print(f"wrote {path}", markup=False)
    for name, value in (found.settings | found.facts).items():
        out.print(f"  {name}: {value}", markup=False)


@checkpoint_app.command("convert")
def convert(
    checkpoint: CheckpointFile,
    output: Annotated[Path, typer.Argument(readable=False, help="safetensors file to write.")],
    half: Half = False,
    voxel_size: Annotated[
        str | None, typer.Option(help="z,y,x in nm that it was trained at, if it does not say.")
    ] = None,
) -> None:
    """Write a published checkpoint, or one of ours, as safetensors with its configuration."""
    from agq.model.checkpoint import load, resolve, save

    _refuse_existing(output)
    loaded = load(checkpoint)
    origin = {"converted_from": resolve(checkpoint).name, "converted_sha256": loaded.sha256}
    config = loaded.config
    if voxel_size is not None:
        size = {"voxel_size": voxel_size.split(",")}
        config = type(config).from_values(config.model_dump() | size, "--voxel-size")
    provenance = {**loaded.provenance, **origin}
    save(output, loaded.state_dict, config, provenance, recommended=loaded.recommended, half=half)
    out.print(f"wrote {output}", markup=False)


@checkpoint_app.command("average")
def average(
    checkpoints: Annotated[list[str], typer.Argument(help="Two or more checkpoints.")],
    output: Annotated[
        Path, typer.Option(readable=False, help="safetensors file to write.", show_default=False)
    ],
    half: Half = False,
) -> None:
    """Write the mean of the weights of networks trained on from the same weights."""
    from agq.model.averaging import average as write_average

    _refuse_existing(output)
    write_average(checkpoints, output, half=half)
    out.print(f"wrote {output}", markup=False)


def _refuse_existing(output: Path) -> None:
    from agq.errors import InputError

    if output.exists():
        raise InputError(f"{output} exists; choose another file")
