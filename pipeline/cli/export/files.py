"""The commands `agq export tiff`, `h5` and `zarr`: a part of a volume as one file or array."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import parse_box, parse_triple
from agq.pipeline.cli.export.arguments import Source, Unit, VoxelSize, by
from agq.pipeline.stitched import version_of
from agq.plain_text import say

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
    size = [by([v]) for v in part.volume.voxel_size]
    say(
        f"wrote {out}: {by(part.volume.shape)} voxels of {' x '.join(size)} {part.volume.unit},"
        f" {part.dtype.name}" + (f"; {table} says which label was which" if relabel else "")
    )
    if writer is files.write_tiff and part.labels and part.largest > files.EXACT_IN_FLOATS:
        say(
            f"agq: Fiji shows 32-bit labels as floats, exact up to {files.EXACT_IN_FLOATS:,}, and"
            f" the largest is {part.largest:,}; --relabel makes them consecutive",
            err=True,
        )
