"""The command `agq stitch`: a run again, or fragments and affinities of another model."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agq.blockwise.stitch.settings import PyramidSettings, StitchSettings
from agq.blockwise.storage.files import write_atomic
from agq.errors import InputError
from agq.pipeline.cli.arguments import parse_triple
from agq.pipeline.config.recorded import read_target
from agq.pipeline.config.yaml_settings import parse_values
from agq.settings import Settings

out = Console(highlight=False, soft_wrap=True)

_RECORD = "settings.json"
"""Of an output folder: arrays and settings of the last stitch."""


_NONE_MISSING = "is for runs; of fragments of another model no block is missing"


class VolumesSettings(Settings):
    """What `--set` may change where there is no run."""

    stitch: StitchSettings
    """Agglomeration."""

    pyramid: PyramidSettings = PyramidSettings()
    """Multiscale output."""


def stitch(
    target: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder, YAML configuration, or OUTPUT of an earlier stitch of --fragments.",
            show_default=False,
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="Of a run: leave failed or missing blocks background."
        ),
    ] = False,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Raise all thresholds by this. At the margin of the earlier stitch or above, its"
            " merges are cut again, in seconds; below it, fragments are merged anew.",
            show_default=False,
        ),
    ] = None,
    fragments: Annotated[
        str | None,
        typer.Option(
            help="Array of fragments (z, y, x) of another model, instead of a run; 0 is"
            " background.",
            show_default=False,
        ),
    ] = None,
    affinities: Annotated[
        str | None,
        typer.Option(
            help="Their affinities (3, z, y, x), uint8 or 0 to 1: channel c is the affinity to the"
            " voxel before on axis c.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the result.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="With --fragments or OUTPUT: affinity that a contact must exceed; default 0.5, or"
            " as before.",
            show_default=False,
        ),
    ] = None,
    voxel_size: Annotated[
        str | None,
        typer.Option(
            help="With --fragments: z,y,x, if the array does not say.", show_default=False
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="With --fragments: world unit; nm (default), angstrom or pm.", show_default=False
        ),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            help="With --fragments: channels of the affinities on z, y and x; default 0,1,2.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a value: section.field=value (repeatable)."),
    ] = None,
) -> None:
    """Join the blocks of a finished prediction into one segmentation with its pyramid.

    Also joins fragments that another model made: name --fragments, --affinities and --output, each
    array as path or path::dataset (zarr v2, v3 or N5). Afterwards `agq stitch OUTPUT` takes other
    settings. What depends on what did not change is kept.
    """
    changes = [*(settings or [])]
    if margin is not None:
        changes.append(f"stitch.margin={margin}")
    if threshold is not None:
        # Before what --set says, so that --set may tell the two apart.
        changes[:0] = [f"stitch.across={threshold}", f"stitch.within={threshold}"]
    reading = {"--voxel-size": voxel_size, "--unit": unit, "--channels": channels}
    if fragments is None and affinities is None and output is None:
        if target is None:
            raise InputError("stitch: name a run folder, or --fragments, --affinities, --output")
        _refuse(reading, "goes with --fragments, --affinities and --output")
        if (target / _RECORD).is_file():
            _refuse({"--allow-missing": allow_missing or None}, _NONE_MISSING)
            _stitch_volumes(target, _recorded(target), changes, again=True)
        else:
            _refuse(
                {"--threshold": threshold},
                "is for fragments of another model; a run has"
                " --set stitch.across=... and stitch.within=...",
            )
            _stitch_run(target, changes, allow_missing)
        return
    if target is not None or fragments is None or affinities is None or output is None:
        raise InputError(
            "stitch: --fragments, --affinities and --output go together, without a run folder"
        )
    _refuse({"--allow-missing": allow_missing or None}, _NONE_MISSING)
    source = {
        "fragments": _absolute(fragments),
        "affinities": _absolute(affinities),
        "voxel_size": None if voxel_size is None else parse_triple("--voxel-size", voxel_size, 1),
        "unit": unit or "nm",
        "channels": parse_triple("--channels", channels or "0,1,2", 0),
    }
    thresholds = {"across": 0.5, "within": 0.5}
    _stitch_volumes(output, {"source": source, "settings": {"stitch": thresholds}}, changes)


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Refuse options that were given (are not None): nothing that a user says is ignored."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"stitch: {name} {reason}")


def _stitch_run(target: Path, changes: list[str], allow_missing: bool) -> None:
    from agq.pipeline.run import stages
    from agq.pipeline.run.prepare import prepare
    from agq.pipeline.run.session import open_session

    config = read_target(target, changes)
    if allow_missing:
        section = config.stitch.model_copy(update={"allow_missing": True})
        config = config.model_copy(update={"stitch": section})
    prepared = prepare(config)
    with open_session(prepared) as session:
        report = stages.stitch(session)
    out.print(stitch_table(report.to_dict(), prepared.run.container / "segmentation"))


def _absolute(location: str) -> str:
    """Return a location that means the same from every folder."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


def _recorded(output: Path) -> dict[str, Any]:
    try:
        recorded: dict[str, Any] = json.loads((output / _RECORD).read_bytes())
    except ValueError:
        raise InputError(f"{output / _RECORD} is damaged; remove {output} and start over") from None
    return recorded


def _stitch_volumes(
    output: Path, recorded: dict[str, Any], changes: list[str], *, again: bool = False
) -> None:
    """Stitch arrays of another model into a folder.

    Parameters
    ----------
    output
        The folder.
    recorded
        What its `_RECORD` holds, or will.
    changes
        ``a.b=value`` settings that replace recorded ones.
    again
        The arrays are those of the last time: what is imported already is not looked at again, and
        may be gone.
    """
    from agq.blockwise.stitch.import_fragments import Fragments, import_fragments, imported_grid
    from agq.blockwise.stitch.run import run_stitch
    from agq.pipeline.run.stages import dask_client, stitch_spec
    from agq.pipeline.status.progress import RunProgress

    values = parse_values(VolumesSettings, recorded["settings"], changes)
    section = values.stitch
    if section.evidence != "affinity":
        raise InputError(
            f"stitch.evidence: {section.evidence} needs two labels of each voxel at the borders of"
            " blocks, which fragments of another model do not have; use affinity"
        )
    grid = imported_grid(output) if again else None
    source = None if grid is not None else Fragments.open(**recorded["source"])
    with dask_client(section.dask) as client, RunProgress(output) as progress:
        progress.note(f"dask dashboard: {client.dashboard_link}")
        if source is not None:
            grid = import_fragments(source, output, client, progress.step)
        assert grid is not None
        settings = values.model_dump(mode="json")
        record = {"source": recorded["source"], "settings": settings}
        write_atomic(output / _RECORD, json.dumps(record, indent=1).encode())
        report = run_stitch(
            stitch_spec(section, values.pyramid, output, grid),
            client,
            progress.step,
            progress.note,
        )
    write_atomic(output / "stitch.json", json.dumps(report.to_dict(), indent=1).encode())
    out.print(stitch_table(report.to_dict(), output / "data.zarr" / "segmentation"))


def stitch_table(report: dict[str, Any], segmentation: Path) -> Table:
    """Return what a stitch made, for a rich console: a merger shows among the largest first."""
    table = Table(title=f"Stitch of {escape(segmentation.parents[1].name)}", show_header=False)
    table.title_justify = "left"
    table.add_row("fragments", f"{report['fragments']:,} in {report['blocks']:,} blocks")
    table.add_row("segments", f"{report['segments']:,} after {report['merges']:,} merges")
    if report["small_segments"]:
        small = f"{report['small_segments']:,} of {report['small_voxels']:,} voxels, now background"
        table.add_row("small segments", small)
    if report["missing"]:
        table.add_row("missing blocks", f"{report['missing']:,} (background)")
    table.add_row("largest", largest_segments(report))
    if report["reused"]:
        table.add_row("kept from before", ", ".join(report["reused"]))
    table.add_row("segmentation", escape(str(segmentation)))
    return table


def largest_segments(report: dict[str, Any]) -> str:
    """Return the largest segments of a stitch, with the number of their fragments, one a line."""
    return "\n".join(
        f"{s['id']}: {s['voxels']:,} voxels, {s['fragments']:,} fragment"
        + "s" * (s["fragments"] > 1)
        for s in report["largest"]
    )
