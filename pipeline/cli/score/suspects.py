"""The command `agq suspects`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from agq import waiting
from agq.pipeline.cli.arguments import AsJson, RunDir
from agq.pipeline.cli.score.score import Truth, truth_of
from agq.pipeline.config.recorded import read_target, require_own_folder
from agq.pipeline.folder import RunFolder
from agq.plain_text import say
from agq.terminal import console

out = console()


def suspects(
    run_dir: RunDir,
    top: Annotated[int, typer.Option(min=1, help="How many to list at most.")] = 100,
    least: Annotated[
        int, typer.Option(min=1, help="Voxels that a mistake must concern at least.")
    ] = 500,
    model: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Coefficients of probabilities; default: suspects/model.json of the run, or those "
            "of the release.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Fit the coefficients to the truth, and keep them."),
    ] = False,
    truth: Truth = None,
    show: Annotated[int, typer.Option(min=0, help="How many to print.")] = 20,
    pictures: Annotated[int, typer.Option(min=0, help="How many to draw.")] = 50,
    base_url: Annotated[
        str | None,
        typer.Option(help="Address that serves the run folder, for a link to each suspect."),
    ] = None,
    raw_url: Annotated[
        str | None, typer.Option(help="With --base-url: address of the raw volume.")
    ] = None,
    segmentation_url: Annotated[
        str | None,
        typer.Option(help="With --base-url: address of the output of agq export precomputed."),
    ] = None,
    neuroglancer: Annotated[
        str, typer.Option(help="With --base-url: the neuroglancer that links open.")
    ] = "https://neuroglancer-demo.appspot.com",
    as_json: AsJson = False,
) -> None:
    """List where a stitched run is probably wrong, without any truth."""
    from agq.pipeline.status.progress import step_progress
    from agq.pipeline.stitched import version_of
    from agq.pipeline.suspects import find, outputs
    from agq.pipeline.suspects.coefficients import DEFAULT
    from agq.pipeline.suspects.listed import FOLDER
    from agq.pipeline.suspects.model import Model
    from agq.pipeline.view.close_up import draw_suspects

    run = RunFolder(run_dir)
    run.record()
    require_own_folder(run.path)
    stitch = version_of(run.path)
    folder = run.path / FOLDER
    kept = folder / "model.json"
    if calibrate or truth is not None:
        waiting.doing("fitting probabilities to the truth")
        chosen = find.calibrate(run, truth_of(run, truth), least=least)
        chosen.save(kept)
    elif model is not None:
        chosen = Model.load(model)
    else:
        chosen = Model.load(kept) if kept.exists() else DEFAULT
    with step_progress("suspects") as step:
        listed = find.find_suspects(
            run, chosen, top=top, least=least, drawn=pictures, on_progress=step
        )
    config = read_target(run_dir)
    links = None
    if base_url is not None:
        from agq.pipeline.view.state import link_to, portable_states

        spots = [(suspect.voxel, suspect.segments) for suspect in listed]
        urls = {"raw_url": raw_url, "segmentation_url": segmentation_url}
        states = portable_states(config, base_url, spots, marked=False, **urls)
        links = [link_to(neuroglancer, state) for state in states]
    files = outputs.write_tables(folder, listed, run.path.name, stitch, links)
    with step_progress("pictures") as step:
        drawn = draw_suspects(config, listed[:pictures], step)
    if as_json:
        rows = outputs.rows_of(listed, links)
        say(json.dumps({"model": chosen.source, "suspects": rows}, indent=1))
        return
    title = f"{run.path.name}: the first {min(show, len(listed))} of {len(listed)} suspects"
    out.print(outputs.suspects_table(listed[:show], title))
    out.print(f"Probabilities fitted on: {chosen.source}")
    out.print(f"wrote {', '.join(str(path) for path in files)}, {drawn} pictures")
    if listed:
        out.print(f"Look at them: agq dashboard {run_dir}")
        out.print(f"at the first: agq view {run_dir} --suspect 1")
