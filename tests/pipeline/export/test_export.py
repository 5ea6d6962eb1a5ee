"""Export for other programs: the same voxels at the same place, whole or not at all."""

import csv
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from ome_zarr_models.v05.image import Image

from agq.blockwise.volumes.open import open_volume
from agq.pipeline.data.importer import import_volume
from agq.pipeline.export import files
from agq.pipeline.export.part import open_part, with_labels
from tests.helpers.runs import VOXEL_SIZE, blobs, environment, write_volume

SHAPE = (11, 50, 70)
OFFSET = (60, 12, -18)
ROI = "3:10,8:40,16:61"
BOX = (slice(3, 10), slice(8, 40), slice(16, 61))
INSIDE = [60 + 3 * 30, 12 + 8 * 6, -18 + 16 * 6]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Labels of an array with a place of its own, and raw beside them."""
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 7, 70_000], np.uint64), SHAPE)
    write_volume(tmp_path / "in.zarr", "labels", labels, offset=OFFSET)
    write_volume(tmp_path / "in.zarr", "raw", blobs(SHAPE), offset=OFFSET)
    return tmp_path / "in.zarr"


def stored(container: Path, name: str) -> np.ndarray:
    return zarr.open_array(str(container / name), mode="r")[:]


def test_a_tiff_has_imagej_s_voxel_size(source, main, tmp_path):
    for layer, name in (("segmentation", "labels"), ("raw", "raw")):
        out = tmp_path / f"{name}.tif"
        code, said, error = main(
            "export", "tiff", f"{source}::{name}", out, "--layer", layer, "--roi", ROI
        )
        assert code == 0, error
        assert "7 x 32 x 45 voxels of 30 x 6 x 6 nm" in said
        expected = stored(source, name)[BOX]
        with tifffile.TiffFile(out) as tif:
            np.testing.assert_array_equal(tif.asarray(), expected)
            assert tif.asarray().dtype == ("uint32" if name == "labels" else "uint8")
            about = tif.imagej_metadata
            assert (about["unit"], about["spacing"], about["slices"]) == ("nm", 30, 7)
            assert about["zorigin"] == -INSIDE[0] / 30
            tags = tif.pages[0].tags
            assert tags["XResolution"].value == tags["YResolution"].value == (1, 6)
        # Our own import takes it without being told.
        volume = import_volume(
            str(out),
            tmp_path / "again.zarr",
            name,
            None,
            kind="labels" if name == "labels" else "raw",
        )
        assert tuple(volume.voxel_size) == VOXEL_SIZE
        np.testing.assert_array_equal(volume.read((0, 0, 0), volume.shape), expected)


def test_small_labels_are_16_bit_and_large_ones_are_named(source, main, tmp_path):
    labels = stored(source, "labels")
    for name, largest, dtype in (("small", 65_535, "uint16"), ("floats", 2**24 + 1, "uint32")):
        write_volume(source, name, np.where(labels == 7, largest, labels % 2).astype(np.uint64))
        code, _, error = main("export", "tiff", f"{source}::{name}", tmp_path / f"{name}.tif")
        assert code == 0, error
        assert tifffile.imread(tmp_path / f"{name}.tif").dtype == dtype
        assert ("exact up to 16,777,216" in error) == (name == "floats")


def test_labels_that_do_not_fit_are_refused_or_numbered_anew(source, main, tmp_path):
    large = stored(source, "labels")
    large[large == 7] = 2**40 + 5
    write_volume(source, "large", large)
    out = tmp_path / "large.tif"
    code, _, error = main("export", "tiff", f"{source}::large", out)
    assert code == 2
    assert f"label {2**40 + 5} does not fit the 32 bits" in error
    assert "--relabel" in error
    assert not out.exists()
    code, said, error = main("export", "tiff", f"{source}::large", out, "--relabel")
    assert code == 0, error
    table = tmp_path / "large.tif.labels.csv"
    assert str(table) in said
    with table.open() as file:
        segment = {int(row["label"]): int(row["segment"]) for row in csv.DictReader(file)}
    assert list(segment) == [0, 1, 2, 3]
    back = np.vectorize(segment.__getitem__, otypes=[np.uint64])(tifffile.imread(out))
    np.testing.assert_array_equal(back, large)
    negative = large.astype(np.int64)
    negative[0, 0, 0] = -3
    write_volume(source, "negative", negative)
    code, _, error = main("export", "zarr", f"{source}::negative", tmp_path / "n.zarr")
    assert code == 2
    assert "label -3 is below 0" in error


def test_hdf5_says_its_voxel_size_in_both_ways(source, main, tmp_path):
    out = tmp_path / "labels.h5"
    code, _, error = main("export", "h5", f"{source}::labels", out, "--roi", ROI)
    assert code == 0, error
    with h5py.File(out) as file:
        array = file["segmentation"]
        np.testing.assert_array_equal(array[:], stored(source, "labels")[BOX])
        assert array.chunks is not None
        np.testing.assert_allclose(array.attrs["element_size_um"], [0.03, 0.006, 0.006])
        assert array.attrs["resolution"].tolist() == list(VOXEL_SIZE)
        assert array.attrs["offset"].tolist() == INSIDE
    volume = import_volume(str(out), tmp_path / "again.zarr", "labels", None, kind="labels")
    assert (list(volume.voxel_size), list(volume.offset)) == (list(VOXEL_SIZE), INSIDE)


def test_ome_zarr_is_valid_and_at_its_place(source, main, tmp_path):
    out = tmp_path / "labels.ome.zarr"
    code, _, error = main("export", "zarr", f"{source}::labels", out, "--roi", ROI)
    assert code == 0, error
    image = Image.from_zarr(zarr.open_group(str(out), mode="r"))
    (dataset,) = image.attributes.ome.multiscales[0].datasets
    scale, translation = dataset.coordinateTransformations
    assert list(scale.scale) == [30, 6, 6]
    assert list(translation.translation) == INSIDE
    volume = open_volume(out, kind="labels")
    assert list(volume.offset) == INSIDE
    np.testing.assert_array_equal(
        volume.read((0, 0, 0), volume.shape), stored(source, "labels")[BOX]
    )


@pytest.mark.parametrize("kind", ["tiff", "h5", "zarr"])
def test_what_is_there_is_left_alone(source, main, tmp_path, kind):
    out = tmp_path / "there"
    out.write_text("mine")
    code, _, error = main("export", kind, f"{source}::labels", out)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "exists already" in error
    assert out.read_text() == "mine"
    code, _, error = main("export", kind, f"{source}::labels", tmp_path / "no" / "out")
    assert (code, len(error.splitlines())) == (2, 1)
    for option, message in (
        (("--roi", "0:12,0:1,0:1"), "outside the volume"),
        (("--level", "1"), "has 1 levels"),
        (("--layer", "raw", "--relabel"), "cannot be used"),
    ):
        code, _, error = main("export", kind, f"{source}::labels", tmp_path / "out", *option)
        assert (code, len(error.splitlines())) == (2, 1), error
        assert message in error
    assert not (tmp_path / "out").exists()


WRITERS = {"tiff": files.write_tiff, "h5": files.write_hdf5, "zarr": files.write_zarr}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_fails_or_is_killed_leaves_nothing_under_its_name(source, tmp_path, kind):
    part = with_labels(
        open_part(f"{source}::labels"), widest=32, relabel=False, on_progress=lambda *_: None
    )
    out = tmp_path / "exported"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        WRITERS[kind](part, out, stop)
    assert sorted(tmp_path.iterdir()) == before
    # A killed one can remove nothing; the next does.
    code = f"""
import os, signal
from agq.pipeline.export import files
from agq.pipeline.export.part import open_part, with_labels
part = with_labels(open_part("{source}::labels"), widest=32, relabel=False, on_progress=print)
files.{WRITERS[kind].__name__}(
    part, files.Path("{out}"), lambda n, _: n and os.kill(os.getpid(), signal.SIGKILL)
)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == len(before) + 1
    files.require_new(out)
    assert sorted(tmp_path.iterdir()) == before
    WRITERS[kind](part, out, lambda *_: None)
    assert os.path.lexists(out)


@pytest.mark.parametrize("kind", WRITERS)
def test_memory_is_bounded_by_a_few_chunks(tmp_path, kind):
    """256 MiB of labels, of which nothing is stored, in a few sections or chunks at a time."""
    container = tmp_path / "large.zarr"
    array = zarr.create_array(
        str(container), shape=(512, 256, 256), chunks=(16, 256, 256), dtype=np.uint64
    )
    array.attrs.update({"voxel_size": [30, 6, 6], "offset": [0, 0, 0], "units": ["nm"] * 3})
    part = open_part(str(container), roi=((0, 0, 0), (256, 256, 256)))
    part = with_labels(part, widest=32, relabel=False, on_progress=lambda *_: None)
    tracemalloc.start()
    try:
        WRITERS[kind](part, tmp_path / "out", lambda *_: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 128 * 2**20 * 0.75
    assert part.dtype == "uint16"


def test_a_large_tiff_is_a_bigtiff(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CLASSIC_BYTES", 1000)
    part = open_part(f"{source}::raw", layer="raw")
    files.write_tiff(part, tmp_path / "big.tif", lambda *_: None)
    with tifffile.TiffFile(tmp_path / "big.tif") as tif:
        assert tif.is_bigtiff
        assert tif.imagej_metadata["spacing"] == 30
        np.testing.assert_array_equal(tif.asarray(), stored(source, "raw"))
