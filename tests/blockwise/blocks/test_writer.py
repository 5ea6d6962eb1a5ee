"""A block becomes durable as a whole, in one order, and its checksums are those of its data."""

from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.blocks import writer as module
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.sidecar import build_sidecar
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.storage.files import checksum
from agq.errors import InputError
from tests.helpers.sidecars import read_sidecar

GRID = BlockGrid(volume_shape=(5, 17, 20), voxel_size=(30, 6, 6), write_shape=(4, 8, 10))


def arrays(number: int) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(b - a for a, b in zip(*GRID.read_box(number), strict=True))
    rng = np.random.default_rng(number)
    labels = rng.integers(0, 9, shape).astype(np.uint16)
    return labels, rng.integers(0, 256, (3, *shape)).astype(np.uint8)


@pytest.mark.parametrize("affinities", [False, True])
def test_files_and_checksums(tmp_path: Path, affinities: bool) -> None:
    writer = BlockWriter.create(tmp_path, GRID, affinities=affinities)
    for number in range(GRID.n_blocks):
        labels, values = arrays(number)
        assert not any(file.exists() for file in writer.files(number))
        sums = writer.write(number, labels, values)
        assert all(file.is_file() for file in writer.files(number))
        box = tuple(slice(a, b) for a, b in zip(*GRID.write_box(number), strict=True))
        inner = GRID.write_in_read(number)
        ids = GRID.fragment_ids(number, labels[inner])
        assert np.array_equal(writer.fragments[box], ids)
        sidecar = build_sidecar(labels, values, GRID, number).to_bytes()
        assert read_sidecar(tmp_path, number).to_bytes() == sidecar
        expected = {"fragments": checksum(ids), "sidecar": checksum(sidecar)}
        if writer.affinities is not None:
            written = values[(slice(None), *inner)]
            assert np.array_equal(writer.affinities[(slice(None), *box)], written)
            expected["affinities"] = checksum(written)
        assert sums == expected


def test_the_sidecar_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BlockWriter.create(tmp_path, GRID, affinities=True)
    written: list[str] = []
    chunk, whole = module.write_chunk, module.write_atomic

    def note_chunk(array, *rest):
        written.append(array.name)
        chunk(array, *rest)

    def note_file(path, data):
        written.append(path.suffix)
        whole(path, data)

    monkeypatch.setattr(module, "write_chunk", note_chunk)
    monkeypatch.setattr(module, "write_atomic", note_file)
    writer.write(0, *arrays(0))
    assert written == ["/fragments", "/affinities", ".agqs"]


def test_wrong_arrays_leave_nothing(tmp_path: Path) -> None:
    writer = BlockWriter.create(tmp_path, GRID)
    labels, values = arrays(0)
    with pytest.raises(InputError, match="do not have the read box's shape"):
        writer.write(0, labels[1:], values)
    with pytest.raises(ValueError, match="do not fit in 21 bits"):
        writer.write(0, labels.astype(np.uint32) + 2**21, values)
    assert not any(file.exists() for file in writer.files(0))


def test_arrays_must_fit_the_grid(tmp_path: Path) -> None:
    BlockWriter.create(tmp_path, GRID)
    other = BlockGrid(volume_shape=(5, 17, 20), voxel_size=(30, 6, 6), write_shape=(2, 8, 10))
    with pytest.raises(InputError, match="do not fit the block grid"):
        BlockWriter.open(tmp_path, other)
    with pytest.raises(InputError, match="no such array"):
        BlockWriter.open(tmp_path, GRID, affinities=True)
