"""The command `agq export graph`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import RunDir, parse_box
from agq.plain_text import say

if TYPE_CHECKING:
    from agq.blockwise.export.graph.run import Box


def graph(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(readable=False, help="Folder to write.")],
    roi: Annotated[
        str | None,
        typer.Option(
            help="A box of voxels, z0:z1,y0:y1,x0:x1: fragments of its blocks, edges between them.",
            show_default=False,
        ),
    ] = None,
    webknossos: Annotated[
        bool,
        typer.Option(
            "--webknossos",
            help="Also write OUT/webknossos, a dataset with an agglomerate attachment.",
        ),
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Address of the served run folder: also write OUT/neuroglancer.json, a state that"
            " shows the fragments of each segment as one.",
            show_default=False,
        ),
    ] = None,
    raw_url: Annotated[
        str | None,
        typer.Option(help="With --base-url: address of the raw volume.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes; default one per core, none for a small volume.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write fragments, their contacts with scores, and the merges made, as Parquet.

    Stopped anywhere, the same command goes on there.
    """
    from agq.blockwise.export.graph.run import export_graph
    from agq.blockwise.export.graph.webknossos import FOLDER, write_dataset
    from agq.blockwise.stitch.settings import DaskSettings, Thresholds
    from agq.blockwise.stitch.workers import is_small, lazy_client
    from agq.pipeline.evaluate.baseline.compare import stitch_settings
    from agq.pipeline.folder import RunFolder
    from agq.pipeline.run.verify import require_segmentation
    from agq.pipeline.status.progress import RunProgress
    from agq.pipeline.stitched import version_of

    if webknossos and roi is not None:
        raise InputError("graph: --webknossos takes the whole run, so that it excludes --roi")
    if raw_url is not None and base_url is None:
        raise InputError("graph: --raw-url goes with --base-url")
    run = RunFolder(run_dir)
    box = None if roi is None else parse_box("--roi", roi)
    unit = run.identity()["raw"].get("unit", "nm")
    version_of(run.path)
    require_segmentation(run.path)
    settings = stitch_settings(run)
    small = is_small(run.grid(), run.grid().n_blocks)
    with (
        lazy_client(DaskSettings(workers=workers), small=small) as client,
        RunProgress(None) as progress,
    ):
        report = export_graph(
            run.path.absolute(),
            out.absolute(),
            run.grid(),
            Thresholds(**settings.model_dump(include=set(Thresholds.model_fields))),
            client,
            unit=unit,
            roi=box,
            on_progress=progress.step,
        )
        if webknossos:
            inside = write_dataset(
                run.path.absolute(),
                out.absolute(),
                run.grid(),
                client,
                unit=unit,
                on_progress=progress.step,
            )
    say(
        f"wrote {out}: {report.fragments:,} fragments, {report.edges:,} edges,"
        f" {report.merges:,} merges"
    )
    if base_url is not None:
        say(f"wrote {_write_state(run.path, out, base_url, raw_url, box)}")
    if webknossos:
        say(f"wrote {out / FOLDER}: {inside:,} edges inside segments")


_MOST_JOINED = 100_000
"""Fragments of a state: with many more a browser stands still."""


def _write_state(
    run_dir: Path, out: Path, base_url: str, raw_url: str | None, roi: "Box | None"
) -> Path:
    """Write the state of a viewer that joins the fragments of a graph; return its path."""
    from agq.blockwise.export.graph.tables import read_graph
    from agq.blockwise.storage.files import write_atomic
    from agq.pipeline.config.recorded import read_target
    from agq.pipeline.view.state import joined_state

    groups: dict[int, list[int]] = {}
    for table in read_graph(out, "fragments"):
        pairs = zip(table["segment"].to_pylist(), table["id"].to_pylist(), strict=True)
        for segment, fragment in pairs:
            if segment:
                groups.setdefault(segment, []).append(fragment)
    joined = [groups[segment] for segment in sorted(groups) if len(groups[segment]) > 1]
    count = sum(map(len, joined))
    if count > _MOST_JOINED:
        raise InputError(
            f"graph: a state of {count:,} fragments is more than a browser can show"
            f" ({_MOST_JOINED:,}); the tables are written, name a smaller --roi for a state"
        )
    at = None if roi is None else [(a + b) // 2 for a, b in zip(*roi, strict=True)]
    state = joined_state(read_target(run_dir), base_url, joined, at, raw_url=raw_url)
    write_atomic(out / "neuroglancer.json", json.dumps(state, indent=1).encode())
    return out / "neuroglancer.json"
