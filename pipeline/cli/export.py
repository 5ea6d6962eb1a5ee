"""The commands `agq export`: neuroglancer precomputed, TIFF, HDF5, OME-Zarr."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import parse_box, parse_triple
from agq.plain_text import say

export_app = typer.Typer(no_args_is_help=True, help="Write results in formats of other programs.")


Source = Annotated[
    str,
    typer.Argument(help="Run folder, path or path::dataset.", show_default=False),
]
Layer = Annotated[
    Literal["segmentation", "fragments", "raw", "truth"],
    typer.Option(help="Of a run; of other volumes: raw for grey values, else labels."),
]
Level = Annotated[int, typer.Option(min=0, help="Resolution; 0 is the finest.")]
Part = Annotated[
    str | None,
    typer.Option(
        help="A box of voxels of the finest level: z0:z1,y0:y1,x0:x1.", show_default=False
    ),
]
Relabel = Annotated[
    bool,
    typer.Option("--relabel", help="Consecutive labels, and OUT.labels.csv with the former ones."),
]
VoxelSize = Annotated[
    str | None, typer.Option(help="z,y,x, if the array does not say.", show_default=False)
]
Unit = Annotated[
    str | None,
    typer.Option(
        help="World unit: nm, angstrom or pm; default: the first that is exact.",
        show_default=False,
    ),
]


@export_app.command("tiff")
def tiff(
    source: Source,
    out: Annotated[Path, typer.Argument(readable=False, help="File to write.")],
    layer: Layer = "segmentation",
    level: Level = 0,
    roi: Part = None,
    relabel: Relabel = False,
    voxel_size: VoxelSize = None,
    unit: Unit = None,
) -> None:
    """Write sections as one TIFF with ImageJ's voxel size, for Fiji; BigTIFF above 4 GB."""
    from agq.pipeline.export import files

    part = _opened(source, layer, level, roi, voxel_size, unit)
    _write(part, out, files.write_tiff, files.TIFF_BITS, relabel)


@export_app.command("h5")
def hdf5(
    source: Source,
    out: Annotated[Path, typer.Argument(readable=False, help="File to write.")],
    layer: Layer = "segmentation",
    level: Level = 0,
    roi: Part = None,
    relabel: Relabel = False,
    voxel_size: VoxelSize = None,
    unit: Unit = None,
) -> None:
    """Write an HDF5 file with one chunked dataset, named like the layer, for ilastik and Fiji."""
    from agq.pipeline.export import files

    part = _opened(source, layer, level, roi, voxel_size, unit)
    _write(part, out, files.write_hdf5, files.BITS, relabel)


@export_app.command("zarr")
def ome_zarr(
    source: Source,
    out: Annotated[Path, typer.Argument(readable=False, help="Folder to write.")],
    layer: Layer = "segmentation",
    level: Level = 0,
    roi: Part = None,
    relabel: Relabel = False,
    voxel_size: VoxelSize = None,
    unit: Unit = None,
) -> None:
    """Write an OME-NGFF 0.5 image (zarr v3) of one resolution, for napari and webknossos."""
    from agq.pipeline.export import files

    part = _opened(source, layer, level, roi, voxel_size, unit)
    _write(part, out, files.write_zarr, files.BITS, relabel)


def _opened(
    source: str,
    layer: Any,
    level: int,
    roi: str | None,
    voxel_size: str | None,
    unit: str | None,
) -> tuple[Any, str, str]:
    """Open what is exported; return it with its source and its version."""
    from agq.pipeline.export.part import open_part
    from agq.pipeline.folder import RunFolder
    from agq.pipeline.run.verify import require_segmentation

    version = ""
    if layer == "segmentation" and RunFolder(Path(source)).exists():
        version = version_of(Path(source))
        require_segmentation(Path(source))
    part = open_part(
        source,
        layer=layer,
        level=level,
        roi=None if roi is None else parse_box("--roi", roi),
        voxel_size=None if voxel_size is None else parse_triple("--voxel-size", voxel_size, 1),
        unit=unit,
    )
    return part, source, version


def _write(
    opened: tuple[Any, str, str], out: Path, writer: Any, widest: int, relabel: bool
) -> None:
    from agq.pipeline.export import files
    from agq.pipeline.export.part import with_labels
    from agq.pipeline.status.progress import step_progress

    part, source, version = opened
    table = out.with_name(f"{out.name}.labels.csv")
    for file in (out, table) if relabel else (out,):
        files.require_new(file)
    for note in part.volume.notes:
        say(f"agq: {note}", err=True)
    with step_progress("look at labels") as tell:
        part = with_labels(part, widest=widest, relabel=relabel, on_progress=tell)
    if relabel:
        files.write_ids(part, table)
    with step_progress("export") as tell:
        writer(part, out, tell)
    if version and version_of(Path(source)) != version:
        raise InputError(f"{source} was stitched anew meanwhile; remove {out} and export again")
    size = [_by([v]) for v in part.volume.voxel_size]
    say(
        f"wrote {out}: {_by(part.volume.shape)} voxels of {' x '.join(size)} {part.volume.unit},"
        f" {part.dtype.name}" + (f"; {table} says which label was which" if relabel else "")
    )
    if writer is files.write_tiff and part.labels and part.largest > files.EXACT_IN_FLOATS:
        say(
            f"agq: Fiji shows 32-bit labels as floats, exact up to {files.EXACT_IN_FLOATS:,}, and"
            f" the largest is {part.largest:,}; --relabel makes them consecutive",
            err=True,
        )


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
    voxel_size: VoxelSize = None,
    offset: Annotated[
        str | None,
        typer.Option(
            help="World position z,y,x of the first voxel, if the array does not say.",
            show_default=False,
        ),
    ] = None,
    unit: Unit = None,
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
    if dataset or not run.exists():
        return open_levels(path, dataset or None, **options), ""
    if options["kind"] == "raw":
        raise InputError(
            f"--image: {path} is a run folder, whose segmentation is exported; name path::dataset"
        )
    version = version_of(run.path)
    require_segmentation(run.path)
    options["unit"] = run.identity()["raw"].get("unit", "nm")
    return open_levels(run.path / "data.zarr", "segmentation", **options), version


def _by(values: Any) -> str:
    from agq.blockwise.stitch.output.precomputed import number  # brings dask with it

    return " x ".join(number(v) for v in values)
