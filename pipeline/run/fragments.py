"""Fragments of another model, stitched in a folder of their own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from agq.blockwise.stitch.cluster import lazy_client
from agq.blockwise.stitch.import_fragments import Fragments, import_fragments, imported_grid
from agq.blockwise.stitch.run import StitchReport, run_stitch
from agq.blockwise.stitch.settings import PyramidSettings, StitchSettings
from agq.blockwise.storage.addresses import put_away, put_back
from agq.blockwise.storage.files import write_atomic
from agq.errors import DamagedError, InputError
from agq.paths import expanded
from agq.pipeline.config.recorded import require_own_folder
from agq.pipeline.config.schema import VolumeSettings
from agq.pipeline.config.yaml_settings import parse_values
from agq.pipeline.data.inputs import open_input
from agq.pipeline.evaluate.plausibility import assess
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.stages import stitch_spec
from agq.pipeline.status.progress import Shown, open_progress
from agq.reading import read_record
from agq.settings import Settings

RECORD: Final = "settings.json"
"""Of an output folder: arrays and settings of the last stitch."""


class FragmentsInput(Settings):
    """What may lie beside the fragments."""

    mask: VolumeSettings | None = None
    """As for a run: hides voxels of fragments and affinities when they are imported."""

    classes: VolumeSettings | None = None
    """As for a run: classes of tissue that must not merge."""


class FragmentsSettings(Settings):
    """What may be set where there is no run."""

    input: FragmentsInput = FragmentsInput()
    """Volumes besides fragments and affinities."""

    stitch: StitchSettings
    """Agglomeration."""

    pyramid: PyramidSettings = PyramidSettings()
    """Multiscale output."""


def recorded_source(output: Path) -> dict[str, Any]:
    """Return what `stitch_arrays` has recorded in a folder: ``source`` and ``settings``."""
    try:
        recorded: dict[str, Any] = put_back(output / RECORD, read_record(output / RECORD))
    except (DamagedError, ValueError):
        raise InputError(f"{output / RECORD} is damaged; remove {output} and start over") from None
    return recorded


def absolute_location(location: str) -> str:
    """Return a path or address that means the same from every folder."""
    return location if "://" in location else str(expanded(location).absolute())


def stitch_arrays(
    output: Path,
    source: dict[str, Any],
    settings: dict[str, Any],
    changes: list[str] | None = None,
    *,
    again: bool = False,
    on_progress: Shown = "bars",
) -> StitchReport:
    """Stitch arrays of another model into a folder.

    Parameters
    ----------
    output
        The folder.
    source
        Arguments of `Fragments.open`.
    settings
        Values of `FragmentsSettings`.
    changes
        ``a.b=value`` settings that replace some of them.
    again
        The arrays are those of the last time: what is imported already is not looked at again, and
        may be gone.
    on_progress
        Where progress goes, see `open_progress`.
    """
    require_own_folder(output)
    before = parse_values(FragmentsSettings, settings).input.mask
    values = parse_values(FragmentsSettings, settings, changes)
    section = values.stitch
    if section.evidence != "affinity":
        raise InputError(
            f"stitch.evidence: {section.evidence} needs two labels of each voxel at the borders of"
            " blocks, which fragments of another model do not have; use affinity"
        )
    run = RunFolder(output)
    grid = imported_grid(output) if again else None
    if grid is not None and values.input.mask != before:
        raise InputError(
            f"input.mask: {output} was imported with another mask; choose another --output"
        )
    opened = None if grid is not None else Fragments.open(**source)
    if opened is not None and values.input.mask is not None:
        mask = open_input(values.input.mask, run, "mask", "input.mask", source["unit"])
        opened = replace(opened, mask=mask)
    classes = None
    if values.input.classes is not None:
        classes = open_input(values.input.classes, run, "labels", "input.classes", source["unit"])
    with lazy_client(section.dask) as client, open_progress(output, on_progress) as progress:
        if opened is not None:
            for note in opened.volume.notes:
                progress.note(note)
            grid = import_fragments(opened, output, client, progress.step)
        assert grid is not None
        record = {"source": source, "settings": values.model_dump(mode="json")}
        record = put_away(output / RECORD, record)
        write_atomic(output / RECORD, json.dumps(record, indent=1).encode(), mode=0o644)
        report = run_stitch(
            stitch_spec(section, values.pyramid, output, grid, classes=classes),
            client,
            progress.step,
            progress.note,
            wait_s=section.dask.wait_s,
        )
    plausible = assess(output, section, truth=False)
    said = report.to_dict() | {"plausibility": plausible and plausible.to_dict()}
    write_atomic(output / "stitch.json", json.dumps(said, indent=1).encode())
    return report
