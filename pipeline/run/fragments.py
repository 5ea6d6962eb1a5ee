"""Fragments of another model: their folder is a run whose prediction is an import."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from agq.blockwise.stitch.import_fragments import (
    Fragments,
    import_fragments,
    imported_grid,
    require_same,
)
from agq.blockwise.stitch.workers import AnyClient
from agq.blockwise.storage.addresses import put_back
from agq.blockwise.volumes.affinities import Affinities
from agq.errors import InputError
from agq.pipeline.config.recorded import read_target, require_own_folder
from agq.pipeline.config.schema import Config, masked, parse_config
from agq.pipeline.config.yaml_settings import apply_override
from agq.pipeline.data.inputs import open_input
from agq.pipeline.folder import EARLIER_FRAGMENTS, RunFolder
from agq.pipeline.run.prepare import Prepared, require_trusted_scheduler
from agq.pipeline.run.session import Session
from agq.reading import read_record

DEFAULT_THRESHOLD: Final = 0.5
"""Affinity that a contact must exceed, where nothing else is said."""


def open_fragments(config: Config) -> Fragments:
    """Open the arrays that a configuration names, and the mask that hides voxels of them.

    Raises
    ------
    InputError
        If one is missing, or they do not fit together.
    """
    run, section = RunFolder(Path(config.run_dir)), config.input
    volume = open_input(section.fragments, run, "labels", "input.fragments")
    assert section.affinities is not None
    location = "::".join(filter(None, (section.affinities.path, section.affinities.dataset)))
    affinities = Affinities.open(location, volume, section.affinities.channels)
    mask = None
    if section.mask is not None:
        mask = open_input(section.mask, run, "mask", "input.mask", section.unit)
    return Fragments(volume, affinities, mask)


def prepare_fragments(config: Config, *, again: bool = True, trust: bool = False) -> Prepared:
    """Check what a stitch of another model's fragments needs.

    Parameters
    ----------
    config
        Names the arrays.
    again
        Arrays that are recorded in the same words are not looked at again once they are imported,
        and may be gone.
    trust
        As for `prepare`.

    Raises
    ------
    InputError
        If an array cannot be used, or the folder was made from others.
    """
    if config.stitch.evidence != "affinity":
        raise InputError(
            f"stitch.evidence: {config.stitch.evidence} needs two labels of each voxel at the"
            " borders of blocks, which fragments of another model do not have; use affinity"
        )
    run = RunFolder(Path(config.run_dir))
    require_own_folder(run.path, trust=trust)
    require_trusted_scheduler(config, run, trust=trust)
    grid = imported_grid(run.path)
    notes: tuple[str, ...] = ()
    if grid is None or not again or not _in_the_same_words(config, run):
        opened = open_fragments(config)
        require_same(opened, run.path)
        grid, notes = opened.grid(), opened.volume.notes
    identity = {
        "raw": {"unit": config.input.unit},
        "mask": None,
        "grid": grid.to_dict(),
        "model": {},
        "affinities": False,
    }
    return Prepared(
        config=config,
        run=run,
        grid=grid,
        identity=run.identity() if run.exists() else identity,
        notes=notes,
    )


def import_missing(session: Session, client: AnyClient) -> None:
    """Import the blocks of the fragments that are not in the run folder yet."""
    prepared = session.prepared
    if imported_grid(prepared.run.path) is not None:
        return
    opened = open_fragments(prepared.config)
    with session.stage("predict", prepared.grid.n_blocks):
        import_fragments(opened, prepared.run.path, client, session.progress.step)


def read_stitched(target: Path, changes: list[str]) -> Config:
    """Return the configuration of what is stitched again: a run, or its YAML file.

    A folder of fragments that an earlier release made becomes a run by being stitched.
    """
    record = target / EARLIER_FRAGMENTS
    if not record.is_file() or RunFolder(target).exists():
        return read_target(target, changes)
    require_own_folder(target)
    try:
        recorded = put_back(record, read_record(record))
        source, settings = recorded["source"], recorded["settings"]
        fragments, affinities = source["fragments"], source["affinities"]
    except (InputError, ValueError, KeyError, TypeError):
        raise InputError(f"{record} is damaged; remove {target} and start over") from None
    placed = {name: source.get(name) for name in ("voxel_size", "unit")}
    values = settings | {
        "run_dir": str(target),
        "input": settings.get("input", {})
        | {
            "fragments": location_settings(fragments) | placed,
            "affinities": location_settings(affinities) | {"channels": source.get("channels")},
        },
    }
    for change in changes:
        apply_override(values, change, expand=True)
    return parse_config(values, source=str(record))


def location_settings(location: str) -> dict[str, Any]:
    """Return ``path::dataset`` as the section of a volume."""
    path, _, dataset = location.partition("::")
    return {"path": path, "dataset": dataset or None}


def _in_the_same_words(config: Config, run: RunFolder) -> bool:
    """Whether the folder was made from the same arrays, as far as their names say."""
    if not run.exists():
        return False
    try:
        recorded = read_target(run.path)
    except InputError:
        return False
    names = ("fragments", "affinities", "mask")
    old, new = (masked(c)["input"] for c in (recorded, config))
    return all(old[name] == new[name] for name in names)
