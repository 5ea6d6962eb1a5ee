"""The commands `agq verify` and `agq pack`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from agq.pipeline.cli.arguments import AsJson
from agq.pipeline.cli.main import EXIT_FAILED
from agq.plain_text import say
from agq.terminal import console

out = console()


def verify(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Run folder.", show_default=False),
    ],
    sample: Annotated[
        float,
        typer.Option(help="Share of the files to read, 0.01 for one in a hundred; all must exist."),
    ] = 1.0,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Take back what is missing or differs: run again after it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare what a run has written with its checksums; exit 1 if a file is missing or differs."""
    from agq.pipeline.run.verify import verify_run
    from agq.pipeline.status.progress import step_progress

    with step_progress("verify") as tell:
        report = verify_run(run_dir, sample=sample, repair=repair, on_progress=tell)
    if as_json:
        say(json.dumps(report.to_dict(), indent=1))
    else:
        out.print(report.table())
        if report.taken_back:
            out.print("Run it again: what was taken back is made again, and nothing else.")
        elif report.problems:
            out.print(f"Take it back: agq verify {run_dir} --repair", markup=False)
    if report.problems:
        raise typer.Exit(EXIT_FAILED)


def pack(
    run_dir: Annotated[
        Path,
        typer.Argument(help="Run folder, finished.", show_default=False),
    ],
    undo: Annotated[
        bool,
        typer.Option("--undo", help="Back to a file a block, so that blocks can be predicted."),
    ] = False,
) -> None:
    """Put the blocks and journals of a finished run into few files; nothing else changes."""
    from agq.pipeline.run.verify import pack_run
    from agq.pipeline.status.progress import step_progress

    with step_progress("pack") as tell:
        pack_run(run_dir, undo=undo, on_progress=tell)
    out.print(f"{run_dir}: {'unpacked' if undo else 'packed'}", markup=False)
