"""Shards: other libraries read ours, we read theirs, and damage is one line."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.volumes.create import create_array, open_array, read_chunk, write_chunk
from agq.blockwise.volumes.open import open_volume
from agq.errors import DamagedError

SHAPE, CHUNKS, SHARD = (5, 9, 7), (2, 3, 2), (1, 2, 3)


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**63, SHAPE).astype(np.uint64)


def make(folder: Path) -> ChunkFiles:
    shards = [s * c for s, c in zip(SHARD, CHUNKS, strict=True)]
    create_array(
        folder, "a", shape=SHAPE, chunks=CHUNKS, shards=shards, dtype=np.uint64,
        voxel_size=(1, 1, 1),
    )  # fmt: skip
    return ChunkFiles(open_array(folder, "a"))


def chunk(files: ChunkFiles, index) -> tuple[slice, ...]:
    starts = [i * c for i, c in zip(index, CHUNKS, strict=True)]
    return tuple(slice(a, a + n) for a, n in zip(starts, files.extent(index), strict=True))


def write(files: ChunkFiles, volume: np.ndarray, without=()) -> None:
    by_shard: dict = {}
    for index in np.ndindex(3, 3, 4):
        if index not in without:
            place = tuple(i // s for i, s in zip(index, SHARD, strict=True))
            by_shard.setdefault(place, {})[index] = files.encode(volume[chunk(files, index)])
    for place, encoded in by_shard.items():
        assert files.write_shard(place, encoded)


def test_other_libraries_read_our_shards(tmp_path, volume):
    files, without = make(tmp_path), ((0, 0, 0), (2, 2, 3))
    write(files, volume, without)
    for index in without:
        volume[chunk(files, index)] = 0
        assert files.read(index) is None
        with pytest.raises(DamagedError, match="missing"):
            read_chunk(files.array, index)
    assert np.array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], volume)
    spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path / 'a'}"}
    assert np.array_equal(tensorstore.open(spec, open=True).result()[:].read().result(), volume)
    for index in np.ndindex(3, 3, 4):
        if index not in without:
            assert np.array_equal(read_chunk(files.array, index), volume[chunk(files, index)])


def test_we_read_shards_of_zarr(tmp_path, volume):
    files = make(tmp_path)
    files.array[:] = volume
    for index in np.ndindex(3, 3, 4):
        assert np.array_equal(files.read(index), volume[chunk(files, index)])
    with pytest.raises(IndexError):
        files.read((0, 0, 4))


def test_a_shard_has_no_writers_of_chunks(tmp_path, volume):
    files = make(tmp_path)
    with pytest.raises(ValueError, match="one by one"):
        write_chunk(files.array, (0, 0, 0), volume[chunk(files, (0, 0, 0))])
    write(files, volume)
    assert files.write_shard((0, 0, 0), {}) is None
    assert not files.file((0, 0, 0)).exists()


def test_damage_is_one_line(tmp_path, volume):
    files = make(tmp_path)
    write(files, volume)
    file = files.file((0, 0, 0))
    whole = file.read_bytes()
    for damaged in (b"", whole[:50], whole[:-9], whole[:-30] + bytes(10) + whole[-20:], bytes(200)):
        file.write_bytes(damaged)
        with pytest.raises(DamagedError, match="damaged") as caught:
            ChunkFiles(files.array).read((0, 0, 0))
        assert "\n" not in str(caught.value)
    file.write_bytes(bytes(40) + whole[40:])
    with pytest.raises(DamagedError, match="damaged"):
        ChunkFiles(files.array).read((0, 0, 0))


@pytest.mark.parametrize("keep", [0, 100, 10**6])
@pytest.mark.parametrize("shards", [None, (4, 8, 8)])
def test_boxes_are_those_that_zarr_reads(tmp_path, keep, shards):
    """Any box, chunks missing, kept or not; two threads' worth of reads of one object."""
    layout = {"shape": (7, 13, 9), "chunks": (2, 4, 4), "dtype": np.uint16, "fill_value": 7}
    compressors = zarr.codecs.ZstdCodec()
    array = zarr.create_array(tmp_path / "a.zarr", shards=shards, compressors=compressors, **layout)
    rng = np.random.default_rng(0)
    array[:4, :9] = rng.integers(0, 2**16, (4, 9, 9))
    files = ChunkFiles(zarr.open_array(tmp_path / "a.zarr", mode="r"), keep)
    for _ in range(50):
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in array.shape]
        box = files.read_box(*np.transpose(ends).tolist())
        assert box is not None
        assert np.array_equal(box, array[tuple(slice(a, b) for a, b in ends)])
        box[:] = 0  # the caller's own


@pytest.mark.parametrize(
    "stored",
    [
        {"compressors": zarr.codecs.GzipCodec()},
        {"serializer": zarr.codecs.BytesCodec(endian="big")},
        {"filters": [zarr.codecs.TransposeCodec(order=(2, 1, 0))]},
        {"zarr_format": 2},
    ],
)
def test_what_only_zarr_reads_is_left_to_it(tmp_path, stored):
    layout = {"shape": (4, 4, 4), "chunks": (2, 4, 4), "dtype": np.uint16}
    array = zarr.create_array(tmp_path / "a.zarr", **layout, **stored)
    array[:] = values = np.arange(64).reshape(4, 4, 4)
    assert ChunkFiles(array).read_box((0, 0, 0), (4, 4, 4)) is None
    volume = open_volume(tmp_path / "a.zarr", voxel_size=(1, 1, 1))
    assert np.array_equal(volume.read((1, 1, 1), (3, 4, 4)), values[1:3, 1:, 1:])
