"""The command `agq export precomputed`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import parse_triple
from agq.plain_text import say
from agq.reading import read_record

export_app = typer.Typer(no_args_is_help=True, help="Write results in formats of other programs.")


@export_app.callback()
def _group() -> None:
    """Keep the name of a single command."""


@export_app.command("precomputed")
def precomputed(
    source: Annotated[
        str, typer.Argument(help="Run folder (its segmentation), path or path::dataset.")
    ],
    out: Annotated[Path, typer.Argument(readable=False, help="Folder to write.")],
    image: Annotated[
        bool, typer.Option("--image", help="Grey values (raw encoding) instead of labels.")
    ] = False,
    chunk: Annotated[str, typer.Option(help="Voxels z,y,x of a chunk.")] = "64,64,64",
    voxel_size: Annotated[
        str | None, typer.Option(help="z,y,x, if the array does not say.", show_default=False)
    ] = None,
    offset: Annotated[
        str | None,
        typer.Option(
            help="World position z,y,x of the first voxel, if the array does not say.",
            show_default=False,
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="World unit: nm, angstrom or pm; default: the first that is exact.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; default one per core.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing precomputed volume.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
    ] = False,
) -> None:
    """Write a segmentation as neuroglancer "precomputed", with all levels of its pyramid.

    Stopped anywhere, the same command goes on there.
    """
    from agq.blockwise.stitch.cluster import dask_client
    from agq.blockwise.stitch.output.precomputed import export_precomputed, plan_export
    from agq.blockwise.stitch.settings import DaskSettings
    from agq.pipeline.status.progress import RunProgress

    options: dict[str, Any] = {"kind": "raw" if image else "labels", "unit": unit}
    if voxel_size is not None:
        options["voxel_size"] = parse_triple("--voxel-size", voxel_size, least=1)
    if offset is not None:
        options["offset"] = parse_triple("--offset", offset)
    levels, version = _levels(source, options)
    for note in levels[0].notes:
        say(f"agq: {note}", err=True)
    scales = plan_export(levels, image=image, chunk=parse_triple("--chunk", chunk, least=1))
    for volume, scale in zip(levels, scales, strict=True):
        size = math.prod(scale.shape) * (
            8 if scale.data_type == "uint64" else volume.dtype.itemsize
        )
        say(
            f"{scale.key}: {_by(scale.shape)} voxels of {_by(scale.resolution)} nm at voxel"
            f" {_by(scale.voxel_offset)}, {scale.chunks:,} chunks, {size / 2**30:.3g} GiB"
            " before compression"
        )
        if any(scale.shift):
            say(
                f"  this scale appears {_by(scale.shift)} nm too low: its offset is not a whole "
                "number of voxels"
            )
    if dry_run:
        return
    with dask_client(DaskSettings(workers=workers)) as client, RunProgress(None) as progress:
        written = export_precomputed(
            levels,
            scales,
            out,
            client,
            version=version,
            overwrite=overwrite,
            on_progress=progress.step,
        )
    if version and version_of(Path(source)) != version:
        raise InputError(f"{source} was stitched anew meanwhile; export it again with --overwrite")
    state = "wrote" if written else "complete already:"
    say(f"{state} {out}; serve the folder over http and open precomputed://ADDRESS")


def version_of(run_dir: Path) -> str:
    """Return what changes when a run is stitched again.

    Raises
    ------
    InputError
        If it is not stitched to the end.
    """
    from agq.blockwise.stitch.steps import Step

    for step in ("relabel", "pyramid"):
        marker = Step.read(run_dir, step)
        if not marker.get("done"):
            raise InputError(
                f"{run_dir}: not stitched to the end; run `agq stitch {run_dir}` first"
            )
    return str(marker["key"])


def _levels(source: str, options: dict[str, Any]) -> tuple[list[Any], str]:
    """Open what is exported; return it with what changes when a run is stitched again."""
    from agq.blockwise.volumes.open import open_levels
    from agq.pipeline.folder import RunFolder
    from agq.pipeline.run.verify import require_segmentation

    path, _, dataset = source.partition("::")
    run = RunFolder(Path(path))
    foreign = (run.path / "imported.json").is_file()
    if dataset or not (run.exists() or foreign):
        return open_levels(path, dataset or None, **options), ""
    if options["kind"] == "raw":
        raise InputError(
            f"--image: {path} is a run folder, whose segmentation is exported; name path::dataset"
        )
    version = version_of(run.path)
    require_segmentation(run.path)
    if run.exists():
        options["unit"] = run.identity()["raw"].get("unit", "nm")
    else:
        options["unit"] = read_record(run.path / "imported.json").get("unit", "nm")
    return open_levels(run.path / "data.zarr", "segmentation", **options), version


def _by(values: Any) -> str:
    from agq.blockwise.stitch.output.precomputed import number  # brings dask with it

    return " x ".join(number(v) for v in values)
