"""Compares what a stitch has written with its records: tables, chunks, metadata of arrays."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.stitch.output.pyramid import Pyramid, shard_problem
from agq.blockwise.stitch.steps import Step
from agq.blockwise.storage.arrays import load_arrays
from agq.blockwise.storage.files import file_checksum
from agq.blockwise.verify.report import Kind, Problem
from agq.blockwise.volumes.create import open_array
from agq.blockwise.volumes.triples import triple
from agq.errors import DamagedError, InputError

STEPS = ("contacts", "classes", "agglomerate", "lut", "relabel", "pyramid")
"""In the order of the stitch; one without classes has no step of that name."""

TABLES = {
    "contacts": "contacts",
    "classes": "classes",
    "agglomerate": "agglomeration",
    "lut": "lut",
}
"""Folders of tables, by the step that makes them."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that a stitch has written.

    Attributes
    ----------
    kind, block
        As of a `Problem`.
    path
        In the run folder.
    recorded
        Checksum of a table, or digest of the journal for a chunk; None: not recorded.
    """

    kind: Kind
    path: str
    recorded: str | int | None
    block: int | None = None

    def problem(self, folder: Path, *, contents: bool) -> str | None:
        """Say what is wrong with it; its contents are read only if asked for."""
        file = folder / self.path
        if isinstance(self.recorded, int) and contents:
            return shard_problem(file, self.recorded)
        if not file.exists():
            # A coarse chunk of background has no file, and no one says here which those are.
            return None if self.kind == "pyramid" else "file is missing"
        if not contents:
            return None
        if self.recorded is not None:
            same = file_checksum(file) == self.recorded
            return None if same else "contents differ from their checksum"
        if file.suffix == ".npz":
            try:
                load_arrays(file)
            except DamagedError as error:
                return str(error).split(": ", 1)[1]
        return None


def pyramid_of(folder: Path, grid: BlockGrid) -> Pyramid:
    """Return the files of the segmentation's levels, however many of these were made."""
    pyramid = Pyramid.planned(folder / "data.zarr", "segmentation", grid)
    with suppress(InputError):
        if open_array(pyramid.container, pyramid.array(0), "r").shards is None:
            return replace(pyramid, passes=())
    return pyramid


def damaged_markers(folder: Path) -> dict[str, Problem]:
    """Return the steps whose marker cannot be read."""
    problems = {}
    for step in STEPS:
        try:
            Step.read(folder, step)
        except InputError:
            problems[step] = Problem("tables", f"stitch/{step}.json", "file is damaged")
    return problems


def written_files(folder: Path, grid: BlockGrid) -> Iterator[WrittenFile]:
    """Yield every file that the steps which are done have written."""
    for step in STEPS:
        try:
            done = Step.read(folder, step).get("done", False)
        except InputError:
            continue
        if done:
            yield from _tables(folder, step)
    yield from _chunks(folder, grid)


def _tables(folder: Path, step: str) -> Iterator[WrittenFile]:
    sums = Step.sums(folder, step)
    if sums is not None:
        for path, total in sums.items():
            kind: Kind = "metadata" if path.endswith("zarr.json") else "tables"
            yield WrittenFile(kind, path, total)
    elif step in TABLES:
        for file in sorted((folder / TABLES[step]).rglob("*")):
            if file.is_file():
                yield WrittenFile("tables", str(file.relative_to(folder)), None)


def _chunks(folder: Path, grid: BlockGrid) -> Iterator[WrittenFile]:
    """Yield the files of the segmentation that the journals know."""
    pyramid = pyramid_of(folder, grid)
    stages: list[tuple[str, Kind]] = [("relabel", "segmentation"), ("pyramid", "pyramid")]
    for stage, kind in stages:
        rows = Journal(folder / "journal" / stage).rows
        rows = rows[rows["rank"] == BlockState.DONE]
        rows = rows[np.argsort(rows["block"])]
        numbers = rows["block"].astype(np.int64)
        if stage == "relabel":
            # The blocks of one file all have its checksum: the first stands for them.
            index = np.stack(np.unravel_index(numbers, grid.shape), axis=1)
            files, first = np.unique(index // np.array(pyramid.shard(0)), axis=0, return_index=True)
            rows, numbers = rows[first], numbers[first]
            places = [(0, triple(place)) for place in files]
        else:
            places = pyramid.places(numbers)
        for number, digest, (level, place) in zip(
            numbers.tolist(), rows["digest"].tolist(), places, strict=True
        ):
            path = f"data.zarr/{pyramid.array(level)}/c/{'/'.join(map(str, place))}"
            yield WrittenFile(kind, path, digest or None, number)
