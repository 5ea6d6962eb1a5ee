"""Fragments and affinities of another model, made ready for the stitch.

Layout: fragments are unsigned integers (z, y, x), 0 background, one id per fragment in the whole
volume; affinities are (3, z, y, x), uint8 (255 is 1.0) or floats from 0 to 1, where channel ``c``
at a voxel is the affinity to the voxel before it on axis ``c`` (0 = z, 1 = y, 2 = x).

Fragments are cut at the borders of blocks into pieces with ids of their own; sidecars remember
the id that each had, and the stitch puts those of one id together before anything else, wherever
they lie (:mod:`names`): the blocks do not show. Each block is written as a prediction writes it, so
a stopped import goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import LOCAL_BITS, BlockGrid
from agq.blockwise.blocks.mask import Tissue
from agq.blockwise.blocks.overlay import require_overlap
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord
from agq.blockwise.journal.writer import process_journal
from agq.blockwise.stitch.workers import AnyClient, Progress, Task, workers_of
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.affinities import Affinities
from agq.blockwise.volumes.content import Content, Voxels, difference, read_content
from agq.blockwise.volumes.open import Volume
from agq.errors import InputError
from agq.reading import read_record

BLOCK = (16, 256, 256)
"""Voxels of a block, (z, y, x)."""

_BATCH = 64
_MARKER = "imported.json"


@dataclass(frozen=True)
class Fragments:
    """Open inputs; picklable, for workers of dask.

    Attributes
    ----------
    volume, affinities
        The arrays.
    mask
        Hides voxels of both (:class:`blocks.mask.Tissue`); None: none is hidden.
    """

    volume: Volume
    affinities: Affinities
    mask: Volume | None = None

    def volumes(self) -> dict[str, Voxels]:
        """Return the arrays by name."""
        named: dict[str, Voxels] = {"fragments": self.volume, "affinities": self.affinities}
        return named if self.mask is None else named | {"mask": self.mask}

    def layout(self) -> dict[str, Any]:
        """Return what decides how they are imported; JSON types."""
        return {
            "channels": list(self.affinities.channels),
            "grid": self.grid().to_dict(),
            "unit": self.volume.unit,
        }

    def grid(self) -> BlockGrid:
        """Return the blocks that the fragments are cut into."""
        volume = self.volume
        return BlockGrid(
            volume_shape=volume.shape,
            voxel_size=volume.voxel_size,
            write_shape=BLOCK,
            after=(0, 0, 0),
            offset=volume.offset,
        )


def import_fragments(
    source: Fragments,
    run_dir: Path,
    client: AnyClient,
    on_progress: Progress | None = None,
) -> BlockGrid:
    """Write fragments, sidecars and journal into a folder that :func:`run_stitch` takes.

    Raises
    ------
    InputError
        If the folder was made from other arrays, or a value of these cannot be used.
    """
    grid = source.grid()
    if source.mask is not None:
        require_overlap(source.mask, grid)
    run_dir.mkdir(parents=True, exist_ok=True)
    contents = require_same(source, run_dir)
    volumes = source.volumes()
    for name in volumes.keys() - contents:
        contents[name] = read_content(volumes[name]).model_dump(mode="json")
    names = {name: volume.name for name, volume in volumes.items()}
    record = names | source.layout() | {"contents": contents}
    write_atomic(run_dir / _MARKER, json.dumps(record, indent=1).encode())
    BlockWriter.create(run_dir, grid, source.volume.unit)
    journal = Journal(run_dir / "journal" / "predict")
    todo = np.flatnonzero(~journal.done(grid.n_blocks))
    workers = workers_of(client, run_dir, on_progress)
    workers.wait_for_stragglers()
    batches = workers.batches(todo.tolist(), _BATCH, share=4)
    tasks = [ImportBlocks(batch, source, run_dir, journal.revision) for batch in batches]
    try:
        workers.run("import", tasks, grid.n_blocks - len(todo))
        workers.end_journal(journal.folder)
    finally:
        workers.close()
    return grid


def require_same(source: Fragments, run_dir: Path) -> dict[str, Any]:
    """Check that a folder was made from these arrays, if from any.

    Returns
    -------
    dict
        What is recorded of their contents; nothing yet in a new folder.

    Raises
    ------
    InputError
        If it was made from others.
    """
    marker = run_dir / _MARKER
    if not marker.exists():
        return {}
    recorded, volumes = read_record(marker), source.volumes()
    contents: dict[str, Any] = recorded.get("contents", {})
    other = [name for name, value in source.layout().items() if recorded.get(name) != value]
    if ("mask" in recorded) != ("mask" in volumes):
        other.append("mask")
    for name in contents.keys() & volumes:
        if changed := difference(volumes[name], Content.model_validate(contents[name])):
            other.append(f"{volumes[name].name}: {changed}")
    if other:
        raise InputError(
            f"{run_dir} was made from other volumes ({', '.join(sorted(other))}); choose another "
            "--output"
        )
    return contents


def is_import(run_dir: Path) -> bool:
    """Return whether the fragments of a run folder are those of another model."""
    return (run_dir / _MARKER).exists()


def imported_grid(run_dir: Path) -> BlockGrid | None:
    """Return the blocks of a folder into which everything has been imported; else None."""
    marker = run_dir / _MARKER
    if not marker.exists():
        return None
    record = read_record(marker)
    if not isinstance(record.get("grid"), dict):
        raise InputError(f"{marker}: file is damaged (it has no grid)")
    grid = BlockGrid.from_dict(record["grid"])
    done = Journal(run_dir / "journal" / "predict").done(grid.n_blocks)
    return grid if done.all() else None


@dataclass(frozen=True)
class ImportBlocks(Task):
    """Import some blocks into a run folder."""

    items: Sequence[int]
    source: Fragments
    run_dir: Path
    revision: int

    def run(self) -> None:
        """Write fragments, sidecar and journal record of each block."""
        grid = self.source.grid()
        writer = BlockWriter.open(self.run_dir, grid)
        journal = process_journal(self.run_dir / "journal" / "predict", self.revision)
        for number in self.items:
            started = time.time()
            start, stop = grid.read_box(number)
            labels, original = local_labels(self.source.volume.read(start, stop))
            if len(original) > 2**LOCAL_BITS:
                raise InputError(f"fragments: block {number} has {len(original)} of them, too many")
            window = _uint8(self.source.affinities.read(start, stop), number)
            if self.source.mask is not None:
                tissue = Tissue.read(self.source.mask, grid, number)
                labels, window, origin = tissue.hide(labels, window)
                original = original if origin is None else original[origin]
            sums = writer.write(number, labels, window, original_labels=original)
            journal.finish(
                BlockRecord(
                    block=number,
                    state="done",
                    started=started,
                    finished=time.time(),
                    sums=sums,
                    **grid.place(number),
                )
            )


def local_labels(fragments: NDArray) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Return consecutive labels of a block (0 background), and the fragment that each is.

    Raises
    ------
    InputError
        If an id is negative.
    """
    if fragments.dtype.kind == "i" and fragments.min() < 0:
        raise InputError(f"fragments: id {fragments.min()} is below 0; 0 is background")
    flat = fragments.reshape(-1)
    begins = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    original, label = np.unique(flat[begins], return_inverse=True)
    if original[0] != 0:  # label 0 must be background, even in a block without any
        original, label = np.concatenate((original[:1] * 0, original)), label + 1
    lengths = np.diff(np.append(begins, flat.size))
    labels = np.repeat(label.astype(np.uint32), lengths).reshape(fragments.shape)
    return labels, original.astype(np.uint64)


def _uint8(affinities: NDArray, number: int) -> NDArray[np.uint8]:
    if affinities.dtype == np.uint8:
        return affinities
    low, high = float(affinities.min()), float(affinities.max())
    if np.isnan(low):
        raise InputError(f"affinities: block {number} holds NaN; write 0 where nothing is known")
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"affinities: block {number} has values from {low:g} to {high:g}; they must lie"
            " between 0 and 1"
        )
    return np.round(affinities * np.float32(255)).astype(np.uint8)
