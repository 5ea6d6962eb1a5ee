"""Image files that are damaged, or made to do harm."""

import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile

from agq.pipeline.data.sections import open_sections
from tests.helpers.fuzz import attack, odd_bytes, require_one_line

VOXELS = np.random.default_rng(3).integers(0, 250, (4, 20, 30)).astype(np.uint8)


def read(path: Path) -> None:
    stack = open_sections(path)
    for _ in zip(stack.read(0), range(5), strict=False):
        pass


def write(folder: Path, name: str) -> Path:
    file = folder / name
    if name.endswith(".h5"):
        with h5py.File(file, "w") as store:
            store.create_dataset("raw", data=VOXELS, chunks=(1, 20, 30), compression="gzip")
    elif name == "jxl.npz":
        packed = [np.frombuffer(imagecodecs.jpegxl_encode(s), np.uint8) for s in VOXELS]
        ends = np.cumsum([len(p) for p in packed])
        np.savez(file, raw_jxl=np.concatenate(packed), raw_ends=ends)
    elif name.endswith(".npz"):
        np.savez_compressed(file, raw=VOXELS)
    elif name.endswith(".npy"):
        np.save(file, VOXELS)
    elif name == "png":
        file.mkdir()
        for number, section in enumerate(VOXELS):
            (file / f"z{number}.png").write_bytes(imagecodecs.png_encode(section))
    else:
        kind = {"plain.tif": {"metadata": None}, "ij.tif": {"imagej": True}}.get(name, {})
        options = {"metadata": {"axes": "ZYX"}, "photometric": "minisblack", **kind}
        tifffile.imwrite(file, VOXELS, **options)
    return file


NAMES = ("plain.tif", "ij.tif", "a.ome.tif", "a.h5", "a.npz", "jxl.npz", "a.npy", "png")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", NAMES)
def test_damaged_image_files(tmp_path: Path, name: str) -> None:
    place = write(tmp_path, name)
    file = place / "z2.png" if name == "png" else place
    whole = file.read_bytes()

    def look(data: bytes) -> None:
        file.write_bytes(data)
        read(place)

    def case(rng: random.Random) -> bytes:
        return odd_bytes(rng, whole, rng.choice((None, 300, 3000)))

    assert attack(look, case, 40)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "png"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_image_file(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert str(path) in require_one_line(lambda: read(path))


def test_a_section_of_10_to_the_12_voxels(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", raw=VOXELS)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9, 1000000, 1000000), }"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("raw.npy", head + bytes(1000))
    with h5py.File(tmp_path / "a.h5", "w") as store:
        store.create_dataset("raw", (9, 10**6, 10**6), np.uint8, chunks=(1, 100, 100))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    (tmp_path / "png").mkdir()
    shape = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 0, 0, 0, 0)
    (tmp_path / "png" / "z0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", shape) + chunk(b"IDAT", zlib.compress(bytes(9999)))
    )
    for name in ("a.npz", "a.h5", "png"):
        line = require_one_line(lambda name=name: read(tmp_path / name))  # type: ignore[misc]
        assert name in line
        assert "cut them into parts" in line


def test_planes_that_ome_metadata_claim(tmp_path: Path) -> None:
    with tifffile.TiffFile(write(tmp_path, "a.ome.tif")) as tif:
        said = str(tif.ome_metadata)
    for planes in (10**8, 10**12, 10**40):
        changed = said.replace('SizeZ="4"', f'SizeZ="{planes}"')
        tifffile.imwrite(
            tmp_path / "b.ome.tif",
            VOXELS,
            description=changed,
            metadata=None,
            photometric="minisblack",
        )
        assert f"{planes} planes" in require_one_line(lambda: read(tmp_path / "b.ome.tif"))


def test_groups_of_hdf5_that_lead_to_each_other(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as store:
        group = store
        for _ in range(40):
            below = group.create_group("a")
            group["b"] = below
            below["up"] = h5py.SoftLink("/")
            group = below
        group["raw"] = VOXELS
    assert require_one_line(lambda: read(tmp_path / "a.h5")) == ""


def test_links_of_hdf5_to_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.h5")
    with h5py.File(tmp_path / "a.h5", "w") as store:
        store["link"] = h5py.ExternalLink("fifo.h5", "/raw")
    assert "nothing 3-D" in require_one_line(lambda: read(tmp_path / "a.h5"))
    line = require_one_line(lambda: open_sections(tmp_path / "a.h5", "link"))
    assert "fifo.h5:/raw, and that cannot be opened" in line
