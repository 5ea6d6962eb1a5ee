"""The command `agq export graph`."""

from pathlib import Path
from typing import Annotated

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import RunDir, parse_box
from agq.plain_text import say


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
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; default one per core.", show_default=False),
    ] = None,
) -> None:
    """Write fragments, their contacts with scores, and the merges made, as Parquet.

    Stopped anywhere, the same command goes on there.
    """
    from agq.blockwise.export.graph.run import export_graph
    from agq.blockwise.export.graph.webknossos import FOLDER, write_dataset
    from agq.blockwise.stitch.cluster import dask_client
    from agq.blockwise.stitch.settings import DaskSettings, Thresholds
    from agq.pipeline.evaluate.baseline.compare import stitch_settings
    from agq.pipeline.folder import RunFolder
    from agq.pipeline.run.verify import require_segmentation
    from agq.pipeline.status.progress import RunProgress
    from agq.pipeline.stitched import version_of

    if webknossos and roi is not None:
        raise InputError("graph: --webknossos takes the whole run, so that it excludes --roi")
    run = RunFolder(run_dir)
    box = None if roi is None else parse_box("--roi", roi)
    unit = run.identity()["raw"].get("unit", "nm")
    version_of(run.path)
    require_segmentation(run.path)
    settings = stitch_settings(run)
    with dask_client(DaskSettings(workers=workers)) as client, RunProgress(None) as progress:
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
    if webknossos:
        say(f"wrote {out / FOLDER}: {inside:,} edges inside segments")
