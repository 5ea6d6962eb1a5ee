"""The command `agq export precomputed`."""

import math
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import parse_triple
from agq.pipeline.cli.export.arguments import Unit, VoxelSize, by
from agq.pipeline.stitched import version_of
from agq.plain_text import say

_FEW_VOXELS: Final = 1 << 24
_FEW_MESHED: Final = 1 << 20
"""Voxels that take less time than dask's processes take to start: alone, and with meshes,
skeletons or properties."""


def precomputed(
    source: Annotated[
        str, typer.Argument(help="Run folder (its segmentation), path or path::dataset.")
    ],
    out: Annotated[
        str | None,
        typer.Argument(
            help="Folder to write, or s3://bucket/prefix, gs://bucket/prefix; default: precomputed "
            "in the run folder, where the viewer finds it.",
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        bool, typer.Option("--image", help="Grey values (raw encoding) instead of labels.")
    ] = False,
    chunk: Annotated[str, typer.Option(help="Voxels z,y,x of a chunk.")] = "64,64,64",
    unsharded: Annotated[
        bool, typer.Option("--unsharded", help="One file for each chunk, for older readers.")
    ] = False,
    with_meshes: Annotated[
        bool, typer.Option("--meshes", help="Also a mesh of each segment, for the 3-D view.")
    ] = False,
    level_of_meshes: Annotated[
        int | None,
        typer.Option(
            "--mesh-level",
            min=0,
            help="Level to make meshes of; default: the finest with voxels of at least 16 nm.",
            show_default=False,
        ),
    ] = None,
    with_skeletons: Annotated[
        bool, typer.Option("--skeletons", help="Also the centre lines of each segment.")
    ] = False,
    level_of_skeletons: Annotated[
        int | None,
        typer.Option(
            "--skeleton-level",
            min=0,
            help="Level to trace; default: the one with voxels nearest to 32 nm.",
            show_default=False,
        ),
    ] = None,
    swc: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Local folder for the skeletons as SWC files, in nanometres.",
            show_default=False,
        ),
    ] = None,
    with_properties: Annotated[
        bool,
        typer.Option(
            "--properties",
            help="Also size, surface, box and fragments of each segment, for neuroglancer and as "
            "segment_properties/segments.parquet.",
        ),
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Meshes, skeletons, properties.")
    ] = False,
    least_voxels: Annotated[
        int,
        typer.Option(
            min=0,
            help="Voxels of the smallest segment with a skeleton, and with properties in "
            "neuroglancer.",
        ),
    ] = 1000,
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
        typer.Option(
            min=1,
            help="Processes; default one per core, none for a small volume.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Local folder for what an export to a bucket has done so far; default: exports in "
            "the run folder, else agq-exports.",
            show_default=False,
        ),
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
    from agq.blockwise.export.meshes.run import Plan, export_meshes, mesh_level
    from agq.blockwise.export.target import Target
    from agq.blockwise.export.volume import export_precomputed, plan_export
    from agq.blockwise.stitch.settings import DaskSettings
    from agq.blockwise.stitch.superblocks import StitchFiles
    from agq.blockwise.stitch.workers import lazy_client
    from agq.pipeline.folder import RunFolder
    from agq.pipeline.status.progress import RunProgress

    with_meshes, with_properties = with_meshes or everything, with_properties or everything
    with_skeletons = with_skeletons or everything or swc is not None
    if image and (with_meshes or with_skeletons or with_properties):
        raise InputError(
            "--meshes, --skeletons, --properties, --all: grey values have no segments; leave out"
            " --image"
        )
    options: dict[str, Any] = {"kind": "raw" if image else "labels", "unit": unit}
    if voxel_size is not None:
        options["voxel_size"] = parse_triple("--voxel-size", voxel_size, least=1)
    if offset is not None:
        options["offset"] = parse_triple("--offset", offset)
    levels, version = _levels(source, options)
    if version:
        work = work or Path(source) / "exports"
        out = out or str(RunFolder(Path(source)).precomputed)
    if out is None:
        raise InputError(f"{source} is not a run folder: name OUT too, the folder to write")
    target = Target.of(out, work)
    for note in levels[0].notes:
        say(f"agq: {note}", err=True)
    scales = plan_export(
        levels,
        image=image,
        chunk=parse_triple("--chunk", chunk, least=1),
        sharded=not unsharded,
    )
    for volume, scale in zip(levels, scales, strict=True):
        size = math.prod(scale.shape) * (
            8 if scale.data_type == "uint64" else volume.dtype.itemsize
        )
        say(
            f"{scale.key}: {by(scale.shape)} voxels of {by(scale.resolution)} nm at voxel"
            f" {by(scale.voxel_offset)}, {scale.chunks:,} chunks, {size / 2**30:.3g} GiB"
            " before compression"
        )
        if any(scale.shift):
            say(
                f"  this scale appears {by(scale.shift)} nm too low: its offset is not a whole "
                "number of voxels"
            )
    meshed = mesh_level(scales) if level_of_meshes is None else level_of_meshes
    if meshed >= len(scales):
        raise InputError(f"--mesh-level {meshed}: the levels are 0 to {len(scales) - 1}")
    if level_of_skeletons is not None and level_of_skeletons >= len(scales):
        raise InputError(
            f"--skeleton-level {level_of_skeletons}: the levels are 0 to {len(scales) - 1}"
        )
    if with_meshes:
        say(f"meshes of {scales[meshed].key}")
    if dry_run:
        return
    few = _FEW_MESHED if with_meshes or with_skeletons or with_properties else _FEW_VOXELS
    small = math.prod(scales[0].shape) <= few
    with (
        lazy_client(DaskSettings(workers=workers), small=small) as client,
        RunProgress(None) as progress,
    ):
        written = export_precomputed(
            levels,
            scales,
            target,
            client,
            version=version,
            overwrite=overwrite,
            on_progress=progress.step,
        )
        if with_meshes:
            written += export_meshes(
                Plan(levels[meshed], scales[meshed], target), client, on_progress=progress.step
            )
        if with_skeletons:
            from agq.blockwise.export.skeletons.run import export_skeletons

            skeletons = export_skeletons(
                levels,
                target,
                client,
                level=level_of_skeletons,
                least_voxels=least_voxels,
                swc_folder=None if swc is None else swc.absolute(),
                on_progress=progress.step,
            )
            written += skeletons.written
        if with_properties:
            from agq.blockwise.export.properties import export_properties
            from agq.blockwise.export.skeletons.run import cable_of

            properties = export_properties(
                levels[0],
                target,
                client,
                segments=StitchFiles(Path(source)).segments if version else None,
                cable=cable_of(target),
                least_voxels=least_voxels,
                on_progress=progress.step,
            )
    if version and version_of(Path(source)) != version:
        raise InputError(f"{source} was stitched anew meanwhile; export it again with --overwrite")
    state = "wrote" if written else "complete already:"
    serve = "serve the folder over http and open precomputed://ADDRESS"
    if with_skeletons:
        say(
            f"skeletons of {scales[skeletons.level].key}: {skeletons.skeletons:,} of"
            f" {skeletons.cable_um:,.1f} um in all; {skeletons.small:,} segments are too small"
            f" (--least-voxels {least_voxels})"
        )
    if with_properties:
        say(
            f"segment_properties: {properties.segments:,} segments in segments.parquet,"
            f" {properties.shown:,} of at least {least_voxels:,} voxels in neuroglancer"
        )
    say(f"{state} {target.text}; " + (serve if target.is_local else f"open precomputed://{out}"))


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
