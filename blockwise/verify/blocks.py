"""Compares the outputs of blocks with the checksums in the journal of the prediction."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.packs import sidecar_bytes, sidecar_file
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState, sums_digest
from agq.blockwise.storage.files import checksum
from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.verify.report import Check, Kind, Problem
from agq.blockwise.volumes.create import chunk_file, open_array, read_chunk
from agq.errors import DamagedError, InputError
from agq.reading import NotAFileError

_KINDS: Mapping[str, Kind] = {
    "fragments": "fragments",
    "affinities": "affinities",
    "sidecar": "sidecars",
}
"""Names of checksums in the journal."""


@dataclass(frozen=True)
class BlockOutputs:
    """The outputs of the blocks of a run folder, open for reading; threads may share it.

    Attributes
    ----------
    folder, grid
        The run folder, and the blocks of the whole volume.
    arrays
        By the name of their checksum; one whose metadata cannot be used is left out.
    journal
        Of the prediction.
    problems
        What is wrong with the metadata of the arrays.
    """

    folder: Path
    grid: BlockGrid
    arrays: "Mapping[str, zarr.Array[Any]]"
    journal: Journal
    problems: list[Problem]

    @classmethod
    def open(cls, folder: Path, grid: BlockGrid, *, affinities: bool) -> "BlockOutputs":
        """Open the outputs that a run with these settings has."""
        arrays, problems = {}, []
        for name in ("fragments", "affinities") if affinities else ("fragments",):
            path = f"data.zarr/{name}/zarr.json"
            try:
                arrays[name] = _array_of(folder, grid, name)
            except DamagedError as error:
                problems.append(Problem("metadata", path, str(error).split(": ", 1)[1]))
            except InputError as error:
                missing = not (folder / path).exists()
                what = "file is missing" if missing else f"file is damaged ({error})"
                problems.append(Problem("metadata", path, what))
        journal = Journal(folder / "journal" / "predict")
        return cls(folder, grid, arrays, journal, problems)

    def check(self, number: int, digest: int, *, contents: bool) -> Check:
        """Compare the outputs of a block that is done with its record.

        Parameters
        ----------
        number
            The block.
        digest
            Of its checksums, as the journal's table has it; 0: none were recorded.
        contents
            Read the files; else only look whether they are there.
        """
        stored, problems = self._sums(number, contents=contents)
        kinds = [_KINDS[name] for name in stored]
        if not contents:
            return Check(kinds, [], problems)
        if not problems and sums_digest(stored) == digest:
            return Check(kinds, [], [])
        # Earlier releases recorded checksums of voxels; and what has none must decode at least.
        sums, problems = self._sums(number, contents=True, decoded=True)
        kinds = [_KINDS[name] for name in sums]
        if digest == 0:
            return Check([], kinds, problems)
        if not problems and sums_digest(sums) == digest:
            return Check(kinds, [], [])
        record = self.journal.record(number)
        recorded = {} if record is None else record.sums
        if not recorded and not problems:
            # The line is gone, and the journal's snapshot does not say which of them differs.
            problems.append(self._problem("fragments", number, "block differs from its checksum"))
        for name, value in sums.items():
            if name in recorded and recorded[name] not in (value, stored.get(name)):
                what = "contents differ from their checksum"
                problems.append(self._problem(name, number, what))
        unrecorded = [_KINDS[name] for name in sums if recorded and name not in recorded]
        return Check([k for k in kinds if k not in unrecorded], unrecorded, problems)

    def _files(self, number: int) -> dict[str, Path]:
        index = self.grid.index(number)
        files = {"sidecar": sidecar_file(self.folder, number)}
        for name, array in self.arrays.items():
            files[name] = chunk_file(array, (*[0] * (array.ndim - 3), *index))
        return files

    def _sums(
        self, number: int, *, contents: bool, decoded: bool = False
    ) -> tuple[dict[str, str], list[Problem]]:
        """Return a checksum of each output that can be read, and what is wrong with others."""
        sums, problems = {}, []
        for name, file in self._files(number).items():
            try:
                sums[name] = self._checksum(name, number, file, contents=contents, decoded=decoded)
            except DamagedError as error:
                problems.append(self._problem(name, number, str(error).split(": ", 1)[1]))
        return sums, problems

    def _checksum(
        self, name: str, number: int, file: Path, *, contents: bool, decoded: bool
    ) -> str:
        try:
            if file.stat().st_size == 0:
                raise DamagedError(f"{file}: file is empty")
            if name == "sidecar":
                data = sidecar_bytes(self.folder, number)
                return checksum(data) if contents else ""
            if not contents:
                return ""
        except FileNotFoundError:
            raise DamagedError(f"{file}: file is missing") from None
        except NotAFileError as error:
            raise DamagedError(str(error)) from None
        array = self.arrays[name]
        index = (*[0] * (array.ndim - 3), *self.grid.index(number))
        stored = None if decoded else ChunkFiles(array).encoded(index)
        return checksum(read_chunk(array, index) if stored is None else stored)

    def _problem(self, name: str, number: int, what: str) -> Problem:
        path = self._files(number)[name].relative_to(self.folder)
        return Problem(_KINDS[name], str(path), what, number)


def _array_of(folder: Path, grid: BlockGrid, name: str) -> "zarr.Array[Any]":
    """Open an array of a run, whose metadata must be those of its blocks."""
    array = open_array(folder / "data.zarr", name, "r")
    channels = (3,) if name == "affinities" else ()
    expected = {
        "shape": (*channels, *grid.volume_shape),
        "chunks": (*channels, *grid.write_shape),
        "dtype": np.dtype(np.uint8 if channels else np.uint64),
        "voxel_size": [int(v) for v in grid.voxel_size],
        "offset": [int(v) for v in grid.offset],
    }
    existing = {name: getattr(array, name) for name in ("shape", "chunks", "dtype")}
    existing |= dict(array.attrs)
    for key, value in expected.items():
        if existing.get(key) != value:
            raise InputError(f"{key} is {existing.get(key)}, not {value}")
    return array


def done_blocks(journal: Journal) -> Iterator[tuple[int, int]]:
    """Yield number and digest of each block that is done."""
    rows = journal.rows
    rows = rows[rows["rank"] == BlockState.DONE]
    rows = rows[np.argsort(rows["block"])]
    yield from zip(rows["block"].tolist(), rows["digest"].tolist(), strict=True)
