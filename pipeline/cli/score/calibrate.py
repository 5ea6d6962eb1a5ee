"""The command `agq calibrate`."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from agq import waiting
from agq.errors import InputError
from agq.pipeline.cli.arguments import AsJson
from agq.pipeline.cli.score.score import (
    IgnoreLabels,
    RunDir,
    Truth,
    labels_to_ignore,
    numbers_of,
    truth_of,
)
from agq.pipeline.config.recorded import require_own_folder
from agq.pipeline.folder import RunFolder
from agq.plain_text import say
from agq.terminal import console

out = console()


def calibrate(
    run_dir: RunDir,
    truth: Truth = None,
    merge_price: Annotated[
        float, typer.Option(min=0, help="Bits of VOI split that a bit of VOI merge costs.")
    ] = 2.0,
    across: Annotated[str, typer.Option(help="Thresholds to try.")] = "0.5,0.55,0.6,0.65,0.7,0.8",
    within: Annotated[
        str, typer.Option(help="Thresholds to try.")
    ] = "0.5,0.55,0.575,0.6,0.65,0.7,0.8",
    min_contact: Annotated[str, typer.Option(help="Values to try.")] = "0,5,20,50",
    min_size: Annotated[str, typer.Option(help="Values to try.")] = "0,50,100,200,500",
    ignore_labels: IgnoreLabels = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write", readable=False, help="Set the chosen values in this YAML configuration."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the settings of the stitch on half of a small truth, and judge them on the other."""
    from agq.blockwise.stitch.contacts import read_evidence
    from agq.blockwise.storage.files import write_atomic
    from agq.pipeline.config.edit import set_values
    from agq.pipeline.evaluate.baseline.compare import (
        fragment_counts,
        run_kinds,
        stitch_settings,
    )
    from agq.pipeline.evaluate.calibrate import Grid, tiles
    from agq.pipeline.evaluate.calibrate import calibrate as choose
    from agq.pipeline.evaluate.contingency import BlockCounts, BorderRule
    from agq.pipeline.evaluate.evaluate import NothingScoredError

    run = RunFolder(run_dir)
    settings = stitch_settings(run)
    require_own_folder(run.path)
    grid = Grid(
        numbers_of("--across", across),
        numbers_of("--within", within),
        _whole("--min-contact", min_contact),
        _whole("--min-size", min_size),
    )
    if write is not None and not write.is_file():
        raise InputError(f"--write {write}: no such configuration file")
    waiting.doing("reading the truth and the evidence")
    parts = tiles(truth_of(run, truth))
    evidence = read_evidence(run.path)
    ignore = BorderRule(labels=labels_to_ignore(run, ignore_labels))
    waiting.doing("counting fragments against the truth")
    counts = []
    for part in parts:
        try:
            counts.append(fragment_counts(run, part, ignore=ignore))
        except NothingScoredError:
            counts.append(BlockCounts.empty())
    waiting.doing("scoring settings")
    chosen = choose(
        run.path.name, evidence, counts, settings, grid, price=merge_price, kinds=run_kinds(run)
    )
    values = {f"stitch.{name}": f"{value:.12g}" for name, value in chosen.best.setting.items()}
    words = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    margin = ["--margin", "0"] if settings.margin else []
    apply = shlex.join(["agq", "stitch", str(run_dir), *words, *margin])
    report = chosen.to_dict() | {"apply": apply}
    write_atomic(run.path / "calibration.json", json.dumps(report, indent=1).encode())
    if write is not None:
        set_values(write, values)
    if as_json:
        say(json.dumps(report, indent=1))
        return
    out.print(chosen.table())
    out.print(f"To apply it: {apply}")
    if write is not None:
        out.print(f"set in {write}: {', '.join(f'{n}: {v}' for n, v in values.items())}")


def _whole(name: str, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{name} {text}: expected whole numbers with commas between") from None
    if min(values) < 0:
        raise InputError(f"{name} {text}: give 0 or more")
    return values
