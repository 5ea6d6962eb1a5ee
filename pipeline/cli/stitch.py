"""The command `agq stitch`: a run again, or fragments and affinities of another model."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import Settings, Trust, Verbose, parse_triple
from agq.pipeline.config.yaml_settings import apply_override
from agq.terminal import console

if TYPE_CHECKING:
    from agq.blockwise.stitch.run import StitchReport

out = console()

_NONE_MISSING = "is for runs; of fragments of another model no block is missing"


_option = partial(typer.Option, show_default=False)

Stitched = Annotated[
    Path | None,
    typer.Argument(
        readable=False,
        help="Run folder (of a stitch of --fragments too) or YAML configuration.",
        show_default=False,
    ),
]
AllowMissing = Annotated[
    bool,
    typer.Option("--allow-missing", help="Of a run: leave failed or missing blocks background."),
]
Margin = Annotated[
    float | None,
    _option(
        help="Raise all thresholds by this. At the margin of the earlier stitch or above, its"
        " merges are cut again, in seconds; below it, fragments are merged anew."
    ),
]
Edits = Annotated[
    Path | None,
    _option(
        readable=False,
        help="CSV of merges and splits from proofreading (columns kind, a, b); kept by later"
        " stitches. An end is a fragment id or a point in world units, z y x.",
    ),
]
NoEdits = Annotated[bool, typer.Option("--no-edits", help="Drop the edits of an earlier stitch.")]
Ids = Annotated[
    Literal["consecutive", "fragment", "keep"] | None,
    _option(
        help="keep: segments of the same fragments keep their ids, others get new ones above;"
        " stays so for later stitches (stitch.segment_ids)."
    ),
]
FragmentsArray = Annotated[
    str | None,
    _option(
        help="Array of fragments (z, y, x) of another model, instead of a run; 0 is background."
    ),
]
AffinitiesArray = Annotated[
    str | None,
    _option(
        help="Their affinities (3, z, y, x), uint8 or 0 to 1: channel c is the affinity to the"
        " voxel before on axis c."
    ),
]
Output = Annotated[Path | None, _option(readable=False, help="Folder for the result.")]
Threshold = Annotated[
    float | None,
    _option(
        help="With --fragments or OUTPUT: affinity that a contact must exceed; default 0.5, or as"
        " before."
    ),
]
VoxelSize = Annotated[str | None, _option(help="With --fragments: z,y,x, if the array has none.")]
Unit = Annotated[
    Literal["nm", "angstrom", "pm"] | None,
    _option(help="With --fragments: world unit; default nm."),
]
Channels = Annotated[
    str | None,
    _option(help="With --fragments: channels of the affinities on z, y and x; default 0,1,2."),
]


def stitch(
    target: Stitched = None,
    allow_missing: AllowMissing = False,
    margin: Margin = None,
    edits: Edits = None,
    no_edits: NoEdits = False,
    ids: Ids = None,
    fragments: FragmentsArray = None,
    affinities: AffinitiesArray = None,
    output: Output = None,
    threshold: Threshold = None,
    voxel_size: VoxelSize = None,
    unit: Unit = None,
    channels: Channels = None,
    trust: Trust = False,
    verbose: Verbose = False,
    settings: Settings = None,
) -> None:
    """Join the blocks of a finished prediction into one segmentation with its pyramid.

    Also joins fragments that another model made: name --fragments, --affinities and --output, each
    array as path or path::dataset (zarr v2, v3 or N5). Afterwards `agq stitch OUTPUT` takes other
    settings. What depends on what did not change is kept.
    """
    from agq.pipeline.api import Run, stitch_fragments
    from agq.pipeline.run.fragments import read_stitched

    changes = [*(settings or [])]
    if margin is not None:
        changes.append(f"stitch.margin={margin}")
    if threshold is not None:
        # Before what --set says, so that --set may tell the two apart.
        changes[:0] = [f"stitch.across={threshold}", f"stitch.within={threshold}"]
    if edits is not None and no_edits:
        raise InputError("stitch: --edits and --no-edits exclude each other")
    if edits is not None:
        changes.append(f"stitch.edits={json.dumps(str(edits))}")
    if ids is not None:
        changes.append(f"stitch.segment_ids={ids}")
    if no_edits:
        changes.append("stitch.edits=null")
    bars: Literal["bars", "steps"] = "steps" if verbose else "bars"
    reading = {"--voxel-size": voxel_size, "--unit": unit, "--channels": channels}
    if fragments is None and affinities is None and output is None:
        if target is None:
            raise InputError("stitch: name a run folder, or --fragments, --affinities, --output")
        _refuse(reading, "goes with --fragments, --affinities and --output")
        config = read_stitched(target, changes)
        if config.input.fragments is not None:
            _refuse({"--allow-missing": allow_missing or None}, _NONE_MISSING)
        else:
            _refuse(
                {"--threshold": threshold},
                "is for fragments of another model; a prediction has"
                " --set stitch.across=... and stitch.within=...",
            )
        run = Run(config, on_progress=bars, trust=trust)
        _print(run.stitch(**({"allow_missing": True} if allow_missing else {})), run.path)
        return
    if target is not None or fragments is None or affinities is None or output is None:
        raise InputError(
            "stitch: --fragments, --affinities and --output go together, without a run folder"
        )
    _refuse({"--allow-missing": allow_missing or None}, _NONE_MISSING)
    values: dict[str, Any] = {}
    for change in changes:
        apply_override(values, change)
    report = stitch_fragments(
        fragments,
        affinities,
        None if voxel_size is None else parse_triple("--voxel-size", voxel_size, 1),
        output,
        unit=unit or "nm",
        channels=parse_triple("--channels", channels or "0,1,2", 0),
        on_progress=bars,
        trust=trust,
        **values,
    )
    _print(report, output)


def _print(report: "StitchReport", folder: Path) -> None:
    from agq.pipeline.evaluate.plausibility import recorded_plausibility
    from agq.pipeline.folder import RunFolder

    out.print(report.table(folder / "data.zarr" / "segmentation"))
    if plausible := recorded_plausibility(RunFolder(folder).record()["stages"]["stitch"]):
        out.print(plausible.table())


def _refuse(options: dict[str, Any], reason: str) -> None:
    """Refuse options that were given (are not None): nothing that a user says is ignored."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"stitch: {name} {reason}")
