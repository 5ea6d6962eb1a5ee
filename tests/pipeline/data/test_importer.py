"""Importing image stacks."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr

from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError
from agq.pipeline.config.schema import VolumeSettings
from agq.pipeline.data import importer, section_files, sections
from agq.pipeline.data.importer import import_volume, is_importable
from agq.pipeline.data.inputs import open_input
from agq.pipeline.folder import RunFolder

SHAPE = (11, 20, 30)
SIZE = (30, 6, 6)


def stack(dtype: str = "uint8", shape: Any = SHAPE) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 250, shape).astype(dtype)


def run(folder: Path, source: Any, **options: Any) -> Volume:
    return import_volume(
        source, folder / "out.zarr", "raw", SIZE, **({"chunks": (4, 8, 16)} | options)
    )


def check(volume: Volume, data: np.ndarray) -> None:
    assert volume.dtype == data.dtype
    np.testing.assert_array_equal(volume.read((0, 0, 0), volume.shape), data)
    assert tuple(volume.voxel_size) == SIZE


def save_sections(folder: Path, data: np.ndarray, name: str = "s{}.tif") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for z, section in enumerate(data):
        if name.endswith(".png"):
            (folder / name.format(z)).write_bytes(imagecodecs.png_encode(section))
        else:
            tifffile.imwrite(folder / name.format(z), section)


def save_jpegxl(file: Path, data: np.ndarray, **others: Any) -> None:
    encoded = [imagecodecs.jpegxl_encode(section, lossless=True) for section in data]
    np.savez(
        file,
        em_jxl=np.frombuffer(b"".join(encoded), np.uint8),
        em_ends=np.cumsum([len(e) for e in encoded]),
        **others,
    )


# ----------------------------------------------------------------- formats


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib"}, {"bigtiff": True, "byteorder": ">"}, {"imagej": True}]
)
def test_tif_of_many_pages(tmp_path: Path, dtype: str, options: Any) -> None:
    data = stack(dtype)
    axes: Any = {"metadata": {"axes": "ZYX"}} if "imagej" in options else {}
    tifffile.imwrite(tmp_path / "s.tif", data, **options, **axes)
    check(run(tmp_path, tmp_path / "s.tif"), data)


def test_tif_written_page_by_page(tmp_path: Path) -> None:
    data = stack()
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        for section in data:
            writer.write(section, contiguous=False)
    check(run(tmp_path, tmp_path / "s.tif"), data)


def test_tif_of_one_section(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", stack()[0])
    check(run(tmp_path, tmp_path / "s.tif"), stack()[:1])


@pytest.mark.parametrize("name", ["s{}.tif", "z{}_em.TIFF", "{}.png"])
def test_folder_in_natural_order(tmp_path: Path, name: str) -> None:
    data = stack("uint16")
    save_sections(tmp_path / "em", data, name)
    (tmp_path / "em" / "notes.txt").write_text("not a section")
    (tmp_path / "em" / f".{name.format(0)}").write_text("nor this")
    check(run(tmp_path, tmp_path / "em"), data)


def test_glob(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack())
    save_sections(tmp_path / "em", stack()[::-1], "other{}.tif")
    check(run(tmp_path, str(tmp_path / "em" / "s*.tif")), stack())


@pytest.mark.parametrize("chunks", [None, (3, 20, 30), (11, 5, 5)])
def test_hdf5(tmp_path: Path, chunks: Any) -> None:
    data = stack("uint16")
    with h5py.File(tmp_path / "a.h5", "w") as store:
        store.create_dataset("volumes/raw", data=data, chunks=chunks)
        store.create_dataset("volumes/labels", data=data.astype("uint64"))
        store.create_dataset("note", data=[1, 2])
    check(run(tmp_path, tmp_path / "a.h5", key="/volumes/raw"), data)
    with pytest.raises(InputError, match=r"say which .* volumes/labels .*, volumes/raw \(11, 20"):
        sections.open_sections(tmp_path / "a.h5")
    with pytest.raises(InputError, match=r"no array 'raw'; it holds: volumes/labels"):
        sections.open_sections(tmp_path / "a.h5", "raw")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("packer", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, order: Any, packer: Any) -> None:
    data = np.array(stack(">u2"), order=order)
    packer(tmp_path / "a.npz", raw=data, voxel_nm=[30, 6, 6])
    check(run(tmp_path, tmp_path / "a.npz"), stack("uint16"))


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, order: Any) -> None:
    np.save(tmp_path / "a.npy", np.array(stack("float32"), order=order))
    check(run(tmp_path, tmp_path / "a.npy"), stack("float32"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_sections_packed_as_jpegxl(tmp_path: Path, dtype: str) -> None:
    save_jpegxl(tmp_path / "a.npz", stack(dtype), labels=stack("uint32"), voxel_nm=[30, 6, 6])
    check(run(tmp_path, tmp_path / "a.npz", key="em"), stack(dtype))
    check(
        import_volume(tmp_path / "a.npz", tmp_path / "out.zarr", "labels", SIZE, key="labels"),
        stack("uint32"),
    )
    with pytest.raises(InputError, match=r"it holds: em 11 JPEG XL sections, labels \(11, 20, 30"):
        sections.open_sections(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("stored", "imported"), [("int64", "uint64"), ("bool", "uint8"), ("uint32", "uint32")]
)
def test_labels(tmp_path: Path, stored: str, imported: str) -> None:
    data = stack(stored)
    np.save(tmp_path / "a.npy", data)
    volume = run(tmp_path, tmp_path / "a.npy", kind="mask" if stored == "bool" else "labels")
    check(volume, data.astype(imported))


# ----------------------------------------------------------------- which paths


def test_is_importable(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack()[:2])
    (tmp_path / "empty").mkdir()
    zarr.create_array(tmp_path / "a.zarr", shape=(2, 2, 2), dtype="uint8")
    (tmp_path / "tif_inside.n5").mkdir()
    (tmp_path / "tif_inside.n5" / "attributes.json").write_text("{}")
    (tmp_path / "tif_inside.n5" / "a.tif").write_bytes(b"")
    for name, expected in {
        "em": True,
        "em/s*": True,
        "em/s*.tif": True,
        "em/s0.tif": True,
        "missing.h5": True,
        "x.npz": True,
        "empty": False,
        "a.zarr": False,
        "tif_inside.n5": False,
        "missing": False,
        "missing*": False,
    }.items():
        assert is_importable(tmp_path / name) is expected, name
    assert not is_importable("s3://bucket/a.h5")


# ----------------------------------------------------------------- bad input


def test_bad_sections_are_named(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack())
    tifffile.imwrite(tmp_path / "em" / "s7.tif", stack()[0, :19])
    with pytest.raises(InputError, match=r"s7\.tif is \(19, 30\) uint8, but s0\.tif is \(20, 30\)"):
        run(tmp_path, tmp_path / "em")
    tifffile.imwrite(tmp_path / "em" / "s7.tif", stack("uint16")[0])
    with pytest.raises(InputError, match=r"s7\.tif is \(20, 30\) uint16, but"):
        run(tmp_path, tmp_path / "em")
    (tmp_path / "em" / "s7.tif").write_bytes(b"not a tif")
    with pytest.raises(InputError, match=r"s7\.tif: cannot be read \(not a TIFF"):
        run(tmp_path, tmp_path / "em")
    tifffile.imwrite(tmp_path / "em" / "s7.tif", np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(InputError, match=r"s7\.tif is a colour image \(20, 30, 3\)"):
        run(tmp_path, tmp_path / "em")
    assert not (tmp_path / "out.zarr" / "raw").exists()
    tifffile.imwrite(tmp_path / "em" / "s7.tif", stack()[7])
    check(run(tmp_path, tmp_path / "em"), stack())
    (tmp_path / "em" / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"em mixes \.png and tif files"):
        run(tmp_path, tmp_path / "em")


def test_unusable_files(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((5, 20, 30, 3), np.uint8), photometric="rgb")
    with tifffile.TiffWriter(tmp_path / "unlike.tif") as writer:
        writer.write(stack()[0])
        writer.write(stack()[0, :10])
    np.save(tmp_path / "flat.npy", stack()[0])
    np.save(tmp_path / "double.npy", stack("float64"))
    np.save(tmp_path / "negative.npy", stack("int32") - 3)
    np.savez(tmp_path / "objects.npz", a=np.array([{}, 1], dtype=object))
    for name in ("broken.tif", "broken.h5", "broken.npy", "broken.npz", "other.jpg"):
        (tmp_path / name).write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "colour.tif": "is a colour image",
        "unlike.tif": "holds images that are not alike",
        "flat.npy": r"is 2-D with shape \(20, 30\); it must be \(z, y, x\)",
        "double.npy": "data of type float64 cannot be used; convert it to one of",
        "negative.npy": "holds negative values",
        "objects.npz": "Python objects, which are never loaded",
        "broken.tif": r"broken\.tif: cannot be read",
        "broken.h5": r"broken\.h5: cannot be read",
        "broken.npy": r"broken\.npy: cannot be read",
        "broken.npz": r"broken\.npz: cannot be read",
        "other.jpg": "files of this kind cannot be imported",
        "missing.tif": "no such file",
        "missing*.tif": "no tif or png sections found",
        "empty": "no tif or png sections found",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            run(tmp_path, tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zarr" / "raw").exists()


def test_truncated_files_name_the_section(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack(), compression="zlib")
    damaged = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        page = tif.pages[6]
        begin = page.dataoffsets[0]  # type: ignore[union-attr]
    damaged[begin : begin + 40] = b"\xff" * 40
    (tmp_path / "a.tif").write_bytes(damaged)
    with pytest.raises(InputError, match=r"a\.tif: section 6 cannot be read"):
        run(tmp_path, tmp_path / "a.tif")

    np.savez(tmp_path / "b.npz", raw=stack())
    with zipfile.ZipFile(tmp_path / "b.npz") as archive:
        content = archive.read("raw.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("raw.npy", content[:-100])
    with pytest.raises(InputError, match=r"b\.npz:raw: section 10 cannot be read .*ends too early"):
        run(tmp_path, tmp_path / "b.npz")

    save_jpegxl(tmp_path / "c.npz", stack())
    with np.load(tmp_path / "c.npz") as arrays:
        packed, ends = arrays["em_jxl"].copy(), arrays["em_ends"]
    packed[ends[3] : ends[4]] = 0
    np.savez(tmp_path / "c.npz", em_jxl=packed, em_ends=ends)
    with pytest.raises(InputError, match=r"c\.npz:em: section 4 cannot be read"):
        run(tmp_path, tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", em_jxl=packed, em_ends=ends + 1)
    with pytest.raises(InputError, match="em_ends does not fit em_jxl"):
        run(tmp_path, tmp_path / "c.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": (0, 4, 4)}, "chunks: every value must be at least 1"),
        ({"offset": (0.5, 0, 0)}, "offset: expected three whole numbers"),
        ({"kind": "raw"}, "raw of type uint32 cannot be used"),
    ],
)
def test_settings(tmp_path: Path, change: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", stack("uint32"))
    with pytest.raises(InputError, match=message):
        run(tmp_path, tmp_path / "a.npy", **change)
    with pytest.raises(InputError, match="voxel_size: expected three whole numbers"):
        import_volume(tmp_path / "a.npy", tmp_path / "out.zarr", "raw", (30, 4))


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stack())
    (tmp_path / "out.zarr").mkdir()
    full = OSError(28, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:

        def no_room(*_: Any) -> None:
            raise full

        patch.setattr(importer, "write_chunk", no_room)
        with pytest.raises(InputError, match=r"raw: cannot be written \(No space left on device"):
            run(tmp_path, tmp_path / "a.npy")
    check(run(tmp_path, tmp_path / "a.npy"), stack())


# ----------------------------------------------------------------- as the input of a run


def test_a_run_imports_its_input_once(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack())
    run_folder = RunFolder(tmp_path / "run")
    for path, unit in (
        (tmp_path / "em", "nm"),
        (tmp_path / "em" / "s*.tif", "nm"),
        (tmp_path / "em", "pm"),
    ):
        section = VolumeSettings(path=str(path), voxel_size=SIZE, offset=(30, 0, 6), unit=unit)
        first = open_input(section, run_folder, "raw", "input.raw")
        check(first, stack())
        assert tuple(first.offset) == (30, 0, 6)
        assert first.unit == unit
        file = Path(first.path) / "raw" / "zarr.json"
        before = file.stat().st_mtime_ns
        again = open_input(section, run_folder, "raw", "input.raw")
        assert again.describe() == first.describe()
        assert file.stat().st_mtime_ns == before
    # A folder and a glob of it name the same files.
    assert len(list((tmp_path / "run" / "imported").iterdir())) == 2
    save_sections(tmp_path / "em", stack()[::-1])
    with pytest.raises(InputError, match=r"input\.raw: .*raw already exists .* another import"):
        open_input(section, run_folder, "raw", "input.raw")


def test_touched_and_moved_files_go_on(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack())
    run_folder = RunFolder(tmp_path / "run")

    def opened(folder: str = "em") -> Volume:
        section = VolumeSettings(path=str(tmp_path / folder), voxel_size=SIZE)
        return open_input(section, run_folder, "raw", "input.raw")

    first = opened()
    os.utime(tmp_path / "em" / "s3.tif")
    tifffile.imwrite(tmp_path / "em" / "s5.tif", stack()[5], compression="zlib")
    assert opened().describe() == first.describe()
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        decode = section_files._image
        patch.setattr(section_files, "_image", lambda f: read.append(f.name) or decode(f))
        assert opened().describe() == first.describe()
    assert set(read) == {"s0.tif"}, "what was compared once is known"
    (tmp_path / "em").rename(tmp_path / "other")
    assert opened("other").describe() == first.describe()
    (tmp_path / "link").symlink_to("other")
    assert opened("link").describe() == first.describe()
    assert opened().describe() == first.describe(), "the files are not needed any more"
    (tmp_path / "other").rename(tmp_path / "em")
    tifffile.imwrite(tmp_path / "em" / "s6.tif", stack()[7])
    with pytest.raises(InputError, match=r"section 6 \(.*s6\.tif\) has changed\): restore the"):
        opened()


def test_a_file_that_holds_all_sections_is_compared_too(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stack("float32") / 3)
    first = run(tmp_path, tmp_path / "a.npy")
    os.utime(tmp_path / "a.npy")
    assert run(tmp_path, tmp_path / "a.npy").describe() == first.describe()
    changed = stack("float32") / 3
    changed[9, 3, 3] = 0
    np.save(tmp_path / "a.npy", changed)
    with pytest.raises(InputError, match="section 9 has changed"):
        run(tmp_path, tmp_path / "a.npy")


def test_an_import_of_an_earlier_release_is_known_again(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack())
    run(tmp_path, tmp_path / "em")
    (tmp_path / "out.zarr" / "raw" / "files.json").unlink()
    run(tmp_path, tmp_path / "em")
    os.utime(tmp_path / "em" / "s3.tif")
    run(tmp_path, tmp_path / "em")
    assert (tmp_path / "out.zarr" / "raw" / "files.json").exists()


def test_imports_at_once_wait_for_each_other(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack(shape=(40, 64, 64)))
    code = (
        "import sys; from agq.pipeline.data.importer import import_volume\n"
        "v = import_volume(sys.argv[1], sys.argv[2], 'raw', (30, 6, 6), chunks=(1, 16, 16))\n"
        "print(int(v.read((0, 0, 0), v.shape).sum()))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "em"), str(tmp_path / "o.zarr")]
    jobs = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    ends = [job.communicate(timeout=60) for job in jobs]
    total = f"{stack(shape=(40, 64, 64)).sum(dtype=int)}\n"
    assert ends == [(total, "")] * 3


def test_minus_one_means_unlabelled(tmp_path: Path) -> None:
    data = stack("int32")
    data[2, 3] = -1
    np.save(tmp_path / "a.npy", data)
    volume = run(tmp_path, tmp_path / "a.npy", kind="labels")
    np.testing.assert_array_equal(volume.read((0, 0, 0), SHAPE), data.astype("uint32"))
    np.save(tmp_path / "b.npy", data - 1)
    with pytest.raises(InputError, match="negative values other than -1"):
        import_volume(tmp_path / "b.npy", tmp_path / "b.zarr", "labels", SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "missing.tif"}, r"input\.raw: missing\.tif: no such file or folder"),
        ({"voxel_size": None}, r"input\.raw: .* declares no voxel size; give voxel_size"),
    ],
)
def test_input_of_a_run_that_cannot_be_imported(tmp_path: Path, change: Any, message: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", stack())
    section = VolumeSettings(**({"path": str(tmp_path / "a.tif"), "voxel_size": SIZE} | change))
    with pytest.raises(InputError, match=message):
        open_input(section, RunFolder(tmp_path / "run"), "raw", "input.raw")


# ----------------------------------------------------------------- once, whole, and again


def test_the_same_import_is_done_once(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stack())
    seen: list[tuple[int, int]] = []
    run(tmp_path, tmp_path / "a.npy", on_progress=lambda *p: seen.append(p))
    assert seen == [(0, 11), (4, 11), (8, 11), (11, 11)]
    file = tmp_path / "out.zarr" / "raw" / "zarr.json"
    before = file.stat().st_mtime_ns
    check(run(tmp_path, tmp_path / "a.npy", on_progress=lambda *p: seen.append(p)), stack())
    assert file.stat().st_mtime_ns == before
    assert len(seen) == 4
    left = [p.name for p in (tmp_path / "out.zarr").iterdir() if p.name.startswith(".")]
    assert left == [".raw.lock"]


def test_another_source_never_replaces_a_volume(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", stack())
    run(tmp_path, tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", stack() + 1)
    with pytest.raises(InputError, match=r"raw already exists \(imported from .*a\.npy\)"):
        run(tmp_path, tmp_path / "b.npy")
    with pytest.raises(InputError, match="already exists"):
        run(tmp_path, tmp_path / "a.npy", offset=(30, 0, 0))
    (tmp_path / "out.zarr" / "labels").mkdir()
    with pytest.raises(InputError, match=r"labels already exists \(in the way\)"):
        import_volume(tmp_path / "a.npy", tmp_path / "out.zarr", "labels", SIZE)


def test_an_interrupted_import_goes_on(tmp_path: Path) -> None:
    save_sections(tmp_path / "em", stack())
    good = (tmp_path / "em" / "s9.tif").read_bytes()
    state = (tmp_path / "em" / "s9.tif").stat()

    def put(data: bytes) -> None:  # same size and time, so that it is the same import
        (tmp_path / "em" / "s9.tif").write_bytes(data)
        os.utime(tmp_path / "em" / "s9.tif", ns=(state.st_atime_ns, state.st_mtime_ns))

    seen: list[int] = []
    put(b"\0" * len(good))
    with pytest.raises(InputError, match=r"s9\.tif"):
        run(tmp_path, tmp_path / "em", on_progress=lambda done, _: seen.append(done))
    put(good)
    assert not (tmp_path / "out.zarr" / "raw").exists()
    check(run(tmp_path, tmp_path / "em", on_progress=lambda done, _: seen.append(done)), stack())
    # What the second one says first was there before it.
    assert seen == [0, 4, 8, 8, 11]


def test_an_unfinished_import_of_something_else_is_dropped(tmp_path: Path) -> None:
    hidden = tmp_path / "out.zarr" / ".raw.importing"
    hidden.mkdir(parents=True)
    (hidden / "zarr.json").write_text("{")
    np.save(tmp_path / "a.npy", stack())
    check(run(tmp_path, tmp_path / "a.npy"), stack())
    assert not hidden.exists()


def test_killed_imports_end_whole(tmp_path: Path) -> None:
    data = stack(shape=(60, 64, 64))
    np.save(tmp_path / "a.npy", data)
    code = (
        "import sys; from agq.pipeline.data.importer import import_volume\n"
        "import_volume(sys.argv[1], sys.argv[2], 'v/raw', (30, 6, 6), chunks=(1, 16, 16))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.npy"), str(tmp_path / "o.zarr")]
    hidden = tmp_path / "o.zarr" / "v" / ".raw.importing"
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(command)
        until = time.monotonic() + 60
        while process.poll() is None and not (hidden / "zarr.json").exists():
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += not (tmp_path / "o.zarr" / "v" / "raw").exists()
    assert kills > 0
    options: Any = {"chunks": (1, 16, 16)}
    check(import_volume(tmp_path / "a.npy", tmp_path / "o.zarr", "v/raw", SIZE, **options), data)


def test_memory_is_bounded_by_a_slab(tmp_path: Path) -> None:
    data = np.zeros((64, 256, 256), np.uint16)
    data[::7] = 3
    np.savez_compressed(tmp_path / "a.npz", raw=data)
    tracemalloc.start()
    run(tmp_path, tmp_path / "a.npz", chunks=(4, 128, 128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.nbytes / 3


def test_default_chunks() -> None:
    assert importer.default_chunks((100, 1000, 1000), 1) == (32, 128, 128)
    assert importer.default_chunks((20, 100, 1000), 1) == (20, 100, 128)
    wide = importer.default_chunks((1000, 20000, 20000), 1)
    assert wide == (2, 512, 512)
    assert wide[0] * 20000 * 20000 <= importer.SLAB_BYTES


def test_real_em(tmp_path: Path, shared_dir: Path) -> None:
    source = shared_dir / "data" / "ac4_z80-99.npz"
    with np.load(source) as arrays:
        packed, ends, labels = arrays["raw_jxl"], arrays["raw_ends"], arrays["labels"]
    for key in ("raw", "labels"):
        import_volume(source, tmp_path / "ac4.zarr", key, SIZE, key=key)
    check(open_volume(tmp_path / "ac4.zarr", "labels", kind="labels"), labels)
    volume = open_volume(tmp_path / "ac4.zarr", "raw")
    assert volume.shape == labels.shape
    for z in (0, 7, 19):
        section = imagecodecs.jpegxl_decode(packed[ends[z - 1] if z else 0 : ends[z]].tobytes())
        read = volume.read((z, 0, 0), (z + 1, *labels.shape[1:]))
        np.testing.assert_array_equal(read[0], section)
