"""Creating arrays, writing chunks."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from funlib.geometry import Coordinate, Roi

from agq.blockwise.stitch.output import pyramid
from agq.blockwise.storage import files
from agq.blockwise.volumes import create as arrays
from agq.blockwise.volumes.create import (
    create_affinities,
    create_array,
    open_array,
    write_chunk,
)
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError, RunGoneError
from tests.helpers.volumes import SHAPE, check, voxels


def make(folder: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "shape": SHAPE,
        "chunks": (2, 4, 4),
        "dtype": np.uint64,
        "voxel_size": (30, 6, 6),
        "offset": (60, 12, -6),
    }
    return create_array(folder / "data.zarr", "fragments", **arguments | changes)


def all_chunks(array: Any, data: np.ndarray) -> None:
    for index in np.ndindex(*(-(-s // c) for s, c in zip(array.shape, array.chunks, strict=True))):
        start, stop = arrays.chunk_box(array, index)
        box = tuple(slice(b, e) for b, e in zip(start, stop, strict=True))
        write_chunk(array, index, data[box])


def test_created_arrays_open_with_funlib(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # funlib.persistence 0.7 defines a pydantic model in a deprecated way when imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from funlib.persistence import open_ds

    data = voxels(dtype="uint64")
    all_chunks(make(tmp_path), data)
    opened = open_ds(tmp_path / "data.zarr" / "fragments")
    assert opened.voxel_size == Coordinate(30, 6, 6)
    assert opened.roi == Roi((60, 12, -6), (150, 42, 54))
    assert opened.axis_names == ["z", "y", "x"]
    assert opened.units == ["nm", "nm", "nm"]
    assert opened.chunk_shape == Coordinate(2, 4, 4)
    np.testing.assert_array_equal(opened.to_ndarray(opened.roi), data)

    create_affinities(
        tmp_path / "data.zarr",
        "affinities",
        shape=SHAPE,
        chunks=(2, 4, 4),
        voxel_size=(30, 6, 6),
        offset=(60, 12, -6),
    )
    affinities = open_ds(tmp_path / "data.zarr" / "affinities")
    assert affinities.shape == (3, *SHAPE)
    assert affinities.voxel_size == Coordinate(30, 6, 6)
    assert affinities.roi == opened.roi
    assert affinities.channel_dims == 1


def test_created_arrays_open_as_volumes(tmp_path: Path) -> None:
    data = voxels(dtype="uint64")
    all_chunks(make(tmp_path), data)
    volume = open_volume(tmp_path / "data.zarr", "fragments", kind="labels")
    check(volume, data)
    assert tuple(volume.offset) == (60, 12, -6)


def test_pyramids_open_at_every_level_with_one_offset(tmp_path: Path) -> None:
    shape, chunks, offset = (9, 40, 50), (4, 8, 8), (60, 13, -6)
    levels = pyramid.plan_levels(shape, chunks, (30, 6, 6))
    assert len(levels) > 2
    made = pyramid.Pyramid(tmp_path / "data.zarr", "segmentation", levels, chunks, offset)
    made.create(slice(None))
    made.write_metadata()
    for number, level in enumerate(levels):
        for volume in (
            open_volume(tmp_path / "data.zarr", "segmentation", level=number, kind="labels"),
            open_volume(tmp_path / "data.zarr", f"segmentation/{level.name}", kind="labels"),
        ):
            assert volume.shape == level.shape
            assert tuple(volume.voxel_size) == level.voxel_size
            assert tuple(volume.offset) == offset


def test_chunks_larger_than_the_volume(tmp_path: Path) -> None:
    data = voxels(dtype="uint64")
    all_chunks(make(tmp_path, chunks=(16, 16, 16)), data)
    check(open_volume(tmp_path / "data.zarr", "fragments", kind="labels"), data)
    make(tmp_path, chunks=(16, 16, 16))


def test_storage_is_plain_zstd_without_shards(tmp_path: Path) -> None:
    make(tmp_path)
    metadata = json.loads((tmp_path / "data.zarr" / "fragments" / "zarr.json").read_text())
    assert [codec["name"] for codec in metadata["codecs"]] == ["bytes", "zstd"]
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [2, 4, 4]


def test_zero_chunks_are_really_written(tmp_path: Path) -> None:
    make(tmp_path)
    array = open_array(tmp_path / "data.zarr", "fragments")
    write_chunk(array, (2, 1, 2), np.zeros((1, 3, 1), np.uint64))
    assert arrays.chunk_file(array, (2, 1, 2)).is_file()
    assert not arrays.chunk_file(array, (0, 0, 0)).exists()
    plain = zarr.open_array(tmp_path / "data.zarr", path="fragments", mode="r+")
    write_chunk(plain, (0, 0, 0), np.zeros((2, 4, 4), np.uint64))
    assert arrays.chunk_file(array, (0, 0, 0)).is_file()


def test_write_chunk_takes_exactly_one_chunk(tmp_path: Path) -> None:
    array = make(tmp_path)
    for data in (
        np.zeros((1, 4, 4), np.uint64),  # numpy would broadcast it
        np.zeros((2, 4, 4), np.int64),
        np.zeros((5, 7, 9), np.uint64),
    ):
        with pytest.raises(ValueError, match=r"takes \(2, 4, 4\) uint64, not"):
            write_chunk(array, (0, 0, 0), data)
    with pytest.raises(IndexError, match="no chunk"):
        write_chunk(array, (3, 0, 0), np.zeros((2, 4, 4), np.uint64))
    assert not arrays.chunk_file(array, (0, 0, 0)).exists()


def test_write_chunk_syncs_file_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = make(tmp_path)
    synced: list[Path] = []
    real = files.fsync_path

    def record(path: Path) -> None:
        synced.append(path)
        real(path)

    monkeypatch.setattr(files, "fsync_path", record)
    write_chunk(array, (1, 0, 2), np.ones((2, 4, 1), np.uint64))
    top = tmp_path / "data.zarr" / "fragments"
    assert synced == [top / "c/1/0/2", top / "c/1/0", top / "c/1", top / "c", top]


def test_a_chunk_written_twice_has_the_same_bytes(tmp_path: Path) -> None:
    array = make(tmp_path)
    data = voxels((2, 4, 4), "uint64")
    write_chunk(array, (0, 0, 0), data)
    first = arrays.chunk_file(array, (0, 0, 0)).read_bytes()
    write_chunk(array, (0, 0, 0), data[::-1].copy())
    write_chunk(array, (0, 0, 0), data)
    assert arrays.chunk_file(array, (0, 0, 0)).read_bytes() == first
    assert [p.name for p in arrays.chunk_file(array, (0, 0, 0)).parent.iterdir()] == ["0"]


def test_create_array_reopens_the_same_and_refuses_another(tmp_path: Path) -> None:
    write_chunk(make(tmp_path), (0, 0, 0), np.ones((2, 4, 4), np.uint64))
    again = make(tmp_path)
    assert int(again[0, 0, 0]) == 1
    assert again.config.write_empty_chunks
    for change, name in (
        ({"shape": (6, 7, 9)}, "shape"),
        ({"chunks": (1, 4, 4)}, "chunks"),
        ({"dtype": np.uint32}, "dtype"),
        ({"voxel_size": (30, 6, 7)}, "voxel_size"),
        ({"offset": (0, 0, 0)}, "offset"),
        ({"unit": "pm"}, "units"),
    ):
        with pytest.raises(InputError, match=rf"fragments exists with {name} .* is wanted"):
            make(tmp_path, **change)
    assert int(make(tmp_path)[0, 0, 0]) == 1


def test_open_array_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such array yet"):
        open_array(tmp_path / "data.zarr", "fragments")
    make(tmp_path)
    with pytest.raises(InputError, match="there is no such array yet"):
        open_array(tmp_path / "data.zarr", "affinities", mode="r")


def test_killed_writer_leaves_whole_chunks(tmp_path: Path) -> None:
    make(tmp_path, shape=(64, 128, 128), chunks=(64, 128, 128))
    code = (
        "import sys, numpy as np\n"
        "from agq.blockwise.volumes.create import open_array, write_chunk\n"
        "a = open_array(sys.argv[1], 'fragments'); r = np.random.default_rng(1)\n"
        "noise = r.integers(0, 2**62, (64, 128, 128), dtype=np.uint64) * 2\n"
        "while True:\n"
        "    for odd in (0, 1): write_chunk(a, (0, 0, 0), noise + np.uint64(odd))\n"
    )
    array = open_array(tmp_path / "data.zarr", "fragments")
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data.zarr")])
        while not arrays.chunk_file(array, (0, 0, 0)).exists():
            time.sleep(0.01)
            assert writer.poll() is None
        time.sleep(1.2 * (attempt > 0) + 0.05 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        odd = np.unique(np.asarray(array[...]) % 2)
        assert odd.size == 1


def test_a_folder_that_moves_while_chunks_are_written_is_not_made_anew(tmp_path):
    run, away = tmp_path / "run", tmp_path / "away"
    chunk = np.ones((1, 1, 1), np.uint64)

    def write_all(array: Any) -> None:
        for index in np.ndindex(array.shape):
            write_chunk(array, index[::-1], chunk, files.Unsynced())

    for turn in range(20):
        make(run, shape=(20, 20, 20), chunks=(1, 1, 1))
        array = open_array(run / "data.zarr", "fragments")
        mover = threading.Timer(0.002 * turn, run.rename, [away])
        mover.start()
        with pytest.raises(RunGoneError, match=r"run is gone: it was moved"):
            write_all(array)
        mover.join()
        assert not run.exists()
        shutil.rmtree(away)
