"""A block becomes durable as a whole, in one order, and its checksums are those of its data."""

from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.blocks import writer as module
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.sidecar import build_sidecar
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.storage import files as storage
from agq.blockwise.storage.files import checksum, file_checksum
from agq.blockwise.storage.shards import ChunkFiles
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
        file, *_ = writer.files(number)
        expected = {"fragments": file_checksum(file), "sidecar": checksum(sidecar)}
        if writer.affinities is not None:
            written = values[(slice(None), *inner)]
            assert np.array_equal(writer.affinities[(slice(None), *box)], written)
            expected["affinities"] = file_checksum(writer.files(number)[2])
        assert sums == expected


def test_the_sidecar_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = BlockWriter.create(tmp_path, GRID, affinities=True)
    written: list[str] = []
    chunk, whole = ChunkFiles.write, module.write_atomic

    def note_chunk(files, *rest):
        written.append(files.array.name)
        chunk(files, *rest)

    def note_file(path, data):
        written.append(path.suffix)
        whole(path, data)

    monkeypatch.setattr(ChunkFiles, "write", note_chunk)
    monkeypatch.setattr(module, "write_atomic", note_file)
    writer.write(0, *arrays(0))
    assert written == ["/fragments", "/affinities", ".agqs"]


def test_all_of_a_block_is_synced_and_folders_once(tmp_path, monkeypatch) -> None:
    writer = BlockWriter.create(tmp_path, GRID, affinities=True)
    synced: list[Path] = []
    real = storage.fsync_path

    def record(path: Path) -> None:
        synced.append(Path(path))
        real(path)

    monkeypatch.setattr(storage, "fsync_path", record)
    top, kept = (tmp_path / "data.zarr" / name for name in ("fragments", "affinities"))
    folders = ("c/0/0", "c/0", "c", "")
    writer.write(0, *arrays(0))
    first = [*writer.files(0)[::2], *(top / f for f in folders)]
    assert {*first, *(kept / "c/0" / f for f in ("0/0", "0", ""))} <= {*synced}
    synced.clear()
    writer.write(1, *arrays(1))
    chunks = [writer.files(1)[0], writer.files(1)[2]]
    # The folders that name the new files, and no others.
    named = [chunks[0].parent, chunks[1].parent, writer.files(1)[1].parent]
    assert sorted(synced) == sorted([*chunks, *named])


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
