"""Commands that look at a run: the web page, a picture, a report."""

import asyncio
import json
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer

from agq import waiting
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import InputError
from agq.owners import stranger
from agq.pipeline.cli.arguments import Target, parse_triple, watched
from agq.pipeline.config.recorded import read_target
from agq.plain_text import say

DEFAULT_RUNS = Path("runs")


def view(
    target: Target,
    port: Annotated[int, typer.Option(help="Port on the loopback interface; 0 takes any.")] = 0,
    at: Annotated[str | None, typer.Option(help="Voxel z,y,x to start at.")] = None,
    suspect: Annotated[
        int | None,
        typer.Option(min=1, help="Start at this suspect of `agq suspects`, on its segments."),
    ] = None,
    napari: Annotated[
        bool, typer.Option("--napari", help="Open a window of napari, where it is installed.")
    ] = False,
    print_state: Annotated[
        bool,
        typer.Option("--print-state", help="Print a state for another neuroglancer and end."),
    ] = False,
    base_url: Annotated[
        str | None, typer.Option(help="With --print-state: address that serves the run folder.")
    ] = None,
    raw_url: Annotated[
        str | None, typer.Option(help="With --print-state: address of the raw volume.")
    ] = None,
    segmentation_url: Annotated[
        str | None,
        typer.Option(help="With --print-state: address of the output of agq export precomputed."),
    ] = None,
) -> None:
    """Look at raw, affinities, fragments and segmentation of a run in neuroglancer or napari."""
    position = None if at is None else parse_triple("--at", at)
    config = read_target(target)
    waiting.doing("opening the volumes")
    segments: tuple[int, ...] = ()
    if suspect is not None:
        from agq.pipeline.suspects.listed import read_suspect

        if at is not None:
            raise InputError("--suspect says where to start: leave out --at")
        row = read_suspect(Path(config.run_dir), suspect)
        position = triple(row[axis] for axis in "zyx")
        segments = (row["segment"], row["other_segment"])
    if napari:
        if print_state or port:
            raise InputError("--napari opens a window: leave out --port and --print-state")
        from agq.pipeline.view.napari_viewer import view_in_napari

        view_in_napari(config, at=position)
        return
    from agq.pipeline.view.state import portable_states
    from agq.pipeline.view.viewer import view_run

    if not print_state:
        view_run(config, port=port, at=position, segments=segments)
        return
    if base_url is None:
        raise InputError("--print-state needs --base-url, the address that serves the run folder")
    [state] = portable_states(
        config,
        base_url,
        [(position, segments)],
        raw_url=raw_url,
        segmentation_url=segmentation_url,
    )
    say(json.dumps(state, indent=1))


def dashboard(
    target: Annotated[
        Path | None,
        typer.Argument(
            readable=False, help="Run folder or configuration; with --all a folder of run folders."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All runs of a folder (default: runs) and of the ledger.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes any free one.")] = 8765,
    token: Annotated[
        bool,
        typer.Option(
            "--token/--no-token",
            help="Ask for the token in the address; without, every user of this machine may read.",
        ),
    ] = True,
    ledger_uri_file: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="With --all: file with the MongoDB URI, instead of AGQ_MONGO_URI."
        ),
    ] = None,
    viewer_port: Annotated[
        int, typer.Option(help="Port of the viewer behind the links; 0 takes any free one.")
    ] = 0,
) -> None:
    """Follow runs in a web browser: block map, speed, workers, failures."""
    from agq.pipeline.dashboard.runs import Runs
    from agq.pipeline.dashboard.server import Dashboard, serve

    runs = Runs(*_sources(target, everything, ledger_uri_file))
    lines = runs.listing()
    if not lines:
        raise InputError(f"no run in {target or DEFAULT_RUNS} and none in a ledger; name a run")

    def announce(page: Dashboard) -> None:
        if page.token is None:
            say(
                "agq: WARNING: --no-token: every user of this machine can read these runs, their "
                "logs and volumes; leave it out to ask for a token",
                err=True,
            )
        say(f"{page.address}\nOpen this address in a browser; Ctrl-C ends.")

    # Kept here: the server forgets a viewer that is garbage-collected.
    viewers: deque[Any] = deque(maxlen=8)

    def show(run_dir: Path, host: str, at: Triple, segments: tuple[int, ...]) -> str:
        from agq.pipeline.view.viewer import run_viewer

        config = read_target(run_dir)
        viewers.append(run_viewer(config, port=viewer_port, at=at, host=host, segments=segments))
        return str(viewers[-1])

    try:
        asyncio.run(serve(runs, announce=announce, host=host, port=port, token=token, viewer=show))
    except KeyboardInterrupt:
        say("")


def snapshot(
    target: Target,
    at: Annotated[str | None, typer.Option(help="Voxel z,y,x to show; default the middle.")] = None,
    out: Annotated[Path, typer.Option(readable=False, help="PNG file to write.")] = Path(
        "snapshot.png"
    ),
    size: Annotated[int, typer.Option(min=1, help="Voxels along y and x to show at most.")] = 1024,
) -> None:
    """Draw raw, fragments, segmentation and truth of a run side by side, xy and xz."""
    from agq.pipeline.dashboard.report import write_snapshot

    position = None if at is None else parse_triple("--at", at)
    waiting.doing("drawing the picture")
    place = write_snapshot(read_target(target), _writable(out), position, size)
    say(f"wrote {out}: {place}")


def report(
    target: Target,
    out: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="HTML file to write; default report.html in the run folder."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML file about a run: settings, speed, block map, scores."""
    from agq.pipeline.dashboard.report import write_report

    config = read_target(target)
    if out is None and (owner := stranger(Path(config.run_dir))):
        raise InputError(
            f"{config.run_dir} belongs to {owner}, and a report may show what only you can read: "
            "name a file of your own with --out"
        )
    file = _writable(out or Path(config.run_dir) / "report.html")
    waiting.doing("drawing the report")
    write_report(config, file)
    say(f"wrote {file}")


def _writable(file: Path) -> Path:
    if not file.parent.is_dir():
        raise InputError(f"--out {file}: the folder {file.parent} does not exist")
    return file


def _sources(
    target: Path | None, everything: bool, uri_file: Path | None
) -> tuple[list[Path], Path | None, Any]:
    """Return run folders, a folder of run folders, and the ledger."""
    from agq.blockwise.ledger.database import connect
    from agq.blockwise.ledger.settings import LedgerSettings

    settings = LedgerSettings.of_environment().model_copy(update={"uri_file": uri_file})
    if everything:
        return [], target or DEFAULT_RUNS, connect(settings)
    if target is None:
        raise InputError("name a run folder or a configuration, or use --all")
    if not target.exists():
        # A run of another machine, by its folder there or its id.
        if settings.resolve() is None:
            return [watched(target)[0]], None, None
        return [target], None, connect(settings.model_copy(update={"required": True}))
    config = read_target(target)
    run_dir = Path(config.run_dir)
    if (run_dir / "run.json").is_file():
        return [run_dir], None, None
    # A run on another machine is known to the ledger by the name of its folder.
    return [run_dir], None, connect(config.ledger or settings)
