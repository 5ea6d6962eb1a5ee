"""Export as neuroglancer precomputed: read back by tensorstore, and by a plain reader."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr

from agq.blockwise.export import volume as volume_module
from agq.blockwise.export.target import Target
from agq.blockwise.export.volume import ExportError, export_precomputed, plan_export
from agq.blockwise.stitch.output.pyramid import Pyramid, plan_levels
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.volumes.create import create_array, open_array
from agq.blockwise.volumes.open import open_levels
from agq.errors import InputError
from tests.helpers.browser import CHROMIUM, file_server, screenshot
from tests.helpers.fragments import GRID, folder_bytes, make_run, write_run
from tests.helpers.readers import read_with
from tests.helpers.runs import agq

CHUNK = (8, 16, 8)


@pytest.fixture(scope="module")
def stitched(client, tmp_path_factory) -> Path:
    """Return a stitched run whose pyramid has several levels."""
    run_dir = tmp_path_factory.mktemp("stitched")
    run = make_run(GRID, seed=5)
    write_run(run, run_dir)
    assert run_stitch(run.spec(run_dir), client).levels > 2
    return run_dir


def labels(run_dir: Path, level: int) -> np.ndarray:
    return open_array(run_dir / "data.zarr", f"segmentation/s{level}", "r")[:]


def by_tensorstore(out: Path, scale: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return a scale as (z, y, x), and its origin in voxels."""
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{out}/"},
        "scale_index": scale,
    }
    store = ts.open(spec, open=True, read=True).result()
    return store.read().result()[..., 0].transpose(), store.domain.origin[2::-1]


def decode(data: bytes, shape, block) -> np.ndarray:
    """Decode compressed_segmentation, as the format's description says; shape is (x, y, z)."""
    words = np.frombuffer(data, "<u4")
    words = words[words[0] :]
    grid = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    out = np.zeros(shape, np.uint64)
    for z, y, x in np.ndindex(*grid[::-1]):
        head = 2 * (x + grid[0] * (y + grid[1] * z))
        table, bits, values = words[head] & 0xFFFFFF, int(words[head]) >> 24, words[head + 1]
        for k, j, i in np.ndindex(*block[::-1]):
            place = (x * block[0] + i, y * block[1] + j, z * block[2] + k)
            if any(p >= n for p, n in zip(place, shape, strict=True)):
                continue
            at = bits * (i + block[0] * (j + block[1] * k))
            index = 0
            if bits:
                index = int(words[values + at // 32]) >> (at % 32) & ((1 << bits) - 1)
            low, high = words[table + 2 * index : table + 2 * index + 2].tolist()
            out[place] = low | high << 32
    return out


def by_hand(out: Path, scale: dict) -> np.ndarray:
    """Read a scale from info and chunk files alone; no other file may lie beside them."""
    size, offset, (chunk,) = scale["size"], scale["voxel_offset"], scale["chunk_sizes"]
    volume = np.zeros(size, np.uint64)
    seen = set()
    for index in np.ndindex(*(-(-n // c) for n, c in zip(size, chunk, strict=True))):
        start = [i * c for i, c in zip(index, chunk, strict=True)]
        stop = [min(a + c, n) for a, c, n in zip(start, chunk, size, strict=True)]
        name = "_".join(f"{o + a}-{o + b}" for o, a, b in zip(offset, start, stop, strict=True))
        file = out / scale["key"] / name
        if not file.exists():
            continue
        seen.add(name)
        extent = [b - a for a, b in zip(start, stop, strict=True)]
        part = decode(file.read_bytes(), extent, scale["compressed_segmentation_block_size"])
        volume[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = part
    assert seen == {file.name for file in (out / scale["key"]).iterdir()}
    return volume.transpose()


def test_reads_back_equal_at_every_level(stitched, tmp_path, client):
    levels = open_levels(stitched / "data.zarr", "segmentation", kind="labels")
    scales = plan_export(levels, chunk=CHUNK, sharded=False)
    seen: dict[str, int] = {}
    out = tmp_path / "out"
    written = export_precomputed(
        levels, scales, out, client, on_progress=lambda name, done, _: seen.update({name: done})
    )
    assert written == sum(seen.values()) > len(levels)
    info = json.loads((out / "info").read_text())
    assert info["@type"] == "neuroglancer_multiscale_volume"
    assert (info["type"], info["data_type"], info["num_channels"]) == ("segmentation", "uint64", 1)
    assert len(info["scales"]) == len(levels)
    for i, (volume, scale) in enumerate(zip(levels, info["scales"], strict=True)):
        assert scale["size"] == list(volume.shape[::-1])
        assert scale["resolution"] == list(volume.voxel_size[::-1])
        assert scale["encoding"] == "compressed_segmentation"
        assert scale["chunk_sizes"] == [[8, 16, 8]]
        expected = labels(stitched, i)
        found, origin = by_tensorstore(out, i)
        assert np.array_equal(found, expected)
        assert list(origin) == scale["voxel_offset"][::-1]
        assert np.array_equal(by_hand(out, scale), expected)
        corner = np.array(origin) * volume.voxel_size + scales[i].shift
        assert corner.tolist() == list(GRID.offset)
    assert scales[0].shift == (0, 0, 0)
    assert scales[0].voxel_offset == (2, 2, 3)

    # Complete: nothing is written again, and the bytes stay.
    before = folder_bytes(out)
    assert export_precomputed(levels, scales, out, client) == 0
    assert folder_bytes(out) == before


BY_CLOUD_VOLUME = """
import numpy as np
from cloudvolume import CloudVolume
result = []
for mip in range(arguments["levels"]):
    volume = CloudVolume(f"precomputed://file://{arguments['out']}", mip=mip, progress=False)
    np.save(f"{arguments['to']}/{mip}.npy", np.asarray(volume[:, :, :])[..., 0].transpose())
    result.append(volume.voxel_offset.tolist()[::-1])
"""


@pytest.mark.parametrize(
    ("most", "chunk"), [(2**13, CHUNK), (2**11, (4, 8, 4)), (2**24, (4, 4, 4))]
)
def test_shards_read_back_voxel_for_voxel(stitched, tmp_path, client, monkeypatch, most, chunk):
    monkeypatch.setattr(volume_module, "_MOST_IN_SHARD", most)
    levels = open_levels(stitched / "data.zarr", "segmentation", kind="labels")
    scales, out = plan_export(levels, chunk=chunk), tmp_path / "out"
    written = export_precomputed(levels, scales, out, client)
    assert written == sum(np.prod(scale.grid) for scale in scales)
    places = read_with(BY_CLOUD_VOLUME, {"out": str(out), "to": str(tmp_path), "levels": 3})
    for i, (scale, place) in enumerate(zip(scales, places, strict=False)):
        found, origin = by_tensorstore(out, i)
        assert np.array_equal(found, labels(stitched, i))
        assert list(origin) == place
        assert np.array_equal(np.load(tmp_path / f"{i}.npy"), labels(stitched, i))
        # One box is what tensorstore writes at once, and one file.
        store = volume_module._open(scale, Target.of(out))
        whole = [c * -(-n // c) for n, c in zip(scale.shape, scale.chunk, strict=True)]
        box = tuple(min(b, w) for b, w in zip(scale.box, whole, strict=True))
        assert store.chunk_layout.write_chunk.shape[2::-1] == box
        files = [path for path in (out / scale.key).iterdir() if path.suffix != ".lock"]
        assert {path.suffix for path in files} == {".shard"}
        assert len(files) <= np.prod(scale.grid)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("sharded", [True, False])
def test_stopped_and_continued(stitched, tmp_path, client, monkeypatch, sharded):
    monkeypatch.setattr(volume_module, "_MOST_IN_SHARD", 2**11)
    levels = open_levels(stitched / "data.zarr", "segmentation", kind="labels")
    scales = plan_export(levels, chunk=(4, 8, 8), sharded=sharded)
    whole = export_precomputed(levels, scales, tmp_path / "whole", client)

    def stop(name: str, done: int, total: int) -> None:
        if 0 < done < total:
            raise StopHereError

    with pytest.raises(StopHereError):
        export_precomputed(levels, scales, tmp_path / "cut", client, on_progress=stop)
    assert 0 < export_precomputed(levels, scales, tmp_path / "cut", client) < whole
    kept = [
        {name: data for name, data in folder_bytes(tmp_path / folder).items() if name[0] != "."}
        for folder in ("whole", "cut")
    ]
    assert kept[0] == kept[1]


def test_damaged_source_is_one_error_and_continues(stitched, tmp_path, client):
    shutil.copytree(stitched, tmp_path / "run")
    levels = open_levels(tmp_path / "run" / "data.zarr", "segmentation", kind="labels")
    scales = plan_export(levels, chunk=CHUNK)
    chunk = tmp_path / "run" / "data.zarr" / "segmentation" / "s0" / "c" / "1" / "1" / "1"
    good = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    with pytest.raises(ExportError, match=r"boxes failed, first: .*tracebacks in"):
        export_precomputed(levels, scales, tmp_path / "out", client)
    chunk.write_bytes(good)
    assert export_precomputed(levels, scales, tmp_path / "out", client) > 0
    assert np.array_equal(by_tensorstore(tmp_path / "out", 0)[0], labels(tmp_path / "run", 0))


def test_other_contents_are_refused_and_replaced_when_asked(stitched, tmp_path, client):
    levels = open_levels(stitched / "data.zarr", "segmentation", kind="labels")
    scales, out = plan_export(levels, chunk=CHUNK), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="is not empty; choose another"):
        export_precomputed(levels, scales, out, client)
    with pytest.raises(InputError, match="it is left alone"):
        export_precomputed(levels, scales, out, client, overwrite=True)
    (out / "mine.txt").unlink()
    export_precomputed(levels, scales, out, client, version="first")
    with pytest.raises(InputError, match="another volume or version"):
        export_precomputed(levels, scales, out, client, version="second")
    with pytest.raises(InputError, match="another volume or version"):
        export_precomputed(levels[:1], scales[:1], out, client, version="first")
    export_precomputed(levels[:1], scales[:1], out, client, version="second", overwrite=True)
    # An array may lie elsewhere, but must hold the same.
    shutil.copytree(stitched / "data.zarr" / "segmentation" / "s0", tmp_path / "a.zarr")
    assert export_precomputed(levels[:1], scales[:1], tmp_path / "array", client) > 0
    copied = open_levels(tmp_path / "a.zarr", kind="labels")
    assert export_precomputed(copied, scales[:1], tmp_path / "array", client) == 0
    zarr.open_array(tmp_path / "a.zarr", mode="r+")[:2] = 7
    with pytest.raises(InputError, match=r"another volume or version \(.*a\.zarr: its voxels"):
        export_precomputed(copied, scales[:1], tmp_path / "array", client)
    assert len(json.loads((out / "info").read_text())["scales"]) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        export_precomputed(levels, scales, tmp_path / "file", client)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_overwrite_stopped_anywhere_is_no_complete_export(
    stitched, tmp_path, client, monkeypatch, call
):
    levels = open_levels(stitched / "data.zarr", "segmentation", kind="labels")
    scales, out = plan_export(levels, chunk=CHUNK), tmp_path / "out"
    export_precomputed(levels, scales, out, client)
    folders, rmtree = [], shutil.rmtree

    def stopped(folder, **options):
        folders.append(folder)
        if len(folders) == call:
            raise KeyboardInterrupt
        rmtree(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_precomputed(levels, scales, out, client, overwrite=True)
    monkeypatch.undo()
    # With or without asking again: all of it is there in the end.
    export_precomputed(levels, scales, out, client, overwrite=call % 2 == 0)
    assert np.array_equal(by_tensorstore(out, 0)[0], labels(stitched, 0))
    assert export_precomputed(levels, scales, out, client) == 0


def write_array(folder: Path, data: np.ndarray, **placed) -> None:
    array = create_array(
        folder, "a", shape=data.shape, chunks=(4, 8, 8), dtype=data.dtype,
        **{"voxel_size": (30, 6, 6), **placed},
    )  # fmt: skip
    array[:] = data


def test_fractions_of_a_nanometre_and_places(tmp_path, client):
    data = np.random.default_rng(0).integers(0, 9, (9, 10, 11)).astype(np.int32)
    write_array(
        tmp_path / "in", data, voxel_size=(400, 42, 42), offset=(-800, 84, 0), unit="angstrom"
    )
    levels = open_levels(tmp_path / "in", "a", kind="labels", unit="angstrom")
    (scale,) = plan_export(levels, chunk=CHUNK)
    assert (scale.key, scale.voxel_offset) == ("4.2_4.2_40", (-2, 2, 0))
    export_precomputed(levels, [scale], tmp_path / "out", client)
    (described,) = json.loads((tmp_path / "out" / "info").read_text())["scales"]
    assert described["resolution"] == [4.2, 4.2, 40]
    found, origin = by_tensorstore(tmp_path / "out", 0)
    assert np.array_equal(found, data)
    assert tuple(origin) == (-2, 2, 0)

    write_array(tmp_path / "odd", data, offset=(10, 0, 0))
    with pytest.raises(InputError, match=r"offset \(10, 0, 0\) is not a whole number of voxels"):
        plan_export(open_levels(tmp_path / "odd", "a", kind="labels"))


def test_coarse_scales_that_start_between_voxels_say_so(tmp_path, client):
    shape, chunks, size, offset = (8, 16, 16), (4, 8, 8), (30, 6, 6), (30, 6, 0)
    planned = plan_levels(shape, chunks, size)
    for level in planned:
        create_array(
            tmp_path / "in", f"seg/{level.name}", shape=level.shape, chunks=chunks, dtype="uint64",
            voxel_size=level.voxel_size, offset=offset,
        )[:] = 7  # fmt: skip
    Pyramid(tmp_path / "in", "seg", planned, chunks, offset).write_metadata()
    scales = plan_export(open_levels(tmp_path / "in", "seg", kind="labels"))
    assert [scale.voxel_offset for scale in scales][:2] == [(1, 1, 0), (1, 0, 0)]
    assert [scale.shift for scale in scales][:2] == [(0, 0, 0), (0, 6, 0)]


def test_labels_that_do_not_fit(tmp_path, client):
    data = np.zeros((4, 8, 8), np.int16)
    data[1, 1, 1] = -1
    write_array(tmp_path / "in", data)
    levels = open_levels(tmp_path / "in", "a", kind="labels")
    with pytest.raises(ExportError, match="labels below 0"):
        export_precomputed(levels, plan_export(levels), tmp_path / "out", client)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_images(tmp_path, client, dtype):
    data = np.random.default_rng(0).integers(0, 200, (9, 20, 11)).astype(dtype)
    write_array(tmp_path / "in", data)
    levels = open_levels(tmp_path / "in", "a")
    export_precomputed(levels, plan_export(levels, image=True, chunk=CHUNK), tmp_path / "o", client)
    info = json.loads((tmp_path / "o" / "info").read_text())
    assert (info["type"], info["data_type"]) == ("image", dtype)
    assert np.array_equal(by_tensorstore(tmp_path / "o", 0)[0], data)


@pytest.mark.slow
def test_command_line(stitched, tmp_path):
    out = tmp_path / "out"
    location = f"{stitched / 'data.zarr'}::segmentation"
    plan = agq("export", "precomputed", location, out, "--dry-run", "--chunk", "8,16,8")
    assert plan.returncode == 0, plan.stderr
    assert "6_6_30: 11 x 33 x 26 voxels of 30 x 6 x 6 nm at voxel 2 x 2 x 3" in plan.stdout
    assert not out.exists()
    arguments = ("export", "precomputed", location, out, "--chunk", "8,16,8", "--workers", "1")
    done = agq(*arguments)
    assert done.returncode == 0, done.stderr
    assert "precomputed://" in done.stdout
    assert np.array_equal(by_tensorstore(out, 0)[0], labels(stitched, 0))
    assert "complete already" in agq(*arguments).stdout
    bare = zarr.create_array(str(tmp_path / "bare.zarr"), data=np.ones((4, 4, 4), np.uint32))
    assert bare.shape == (4, 4, 4)
    for arguments, message in (
        ((tmp_path / "bare.zarr", tmp_path / "x"), "voxel_size"),
        ((tmp_path / "none", tmp_path / "x"), "no such file"),
        ((location, out, "--image"), "of type"),
    ):
        refused = agq("export", "precomputed", *arguments, "--workers", "1")
        assert refused.returncode == 2, refused.stdout
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_neuroglancer_shows_the_export_in_place(tmp_path, client):
    """A real browser reads info and chunks over http; one voxel is one pixel of the picture."""
    neuroglancer = pytest.importorskip("neuroglancer", reason="the extra `view` is not installed")
    data = np.zeros((8, 200, 200), np.uint64)
    data[:, :100, :100], data[:, 100:, 100:] = 5, 2**40 + 7
    write_array(tmp_path / "in", data, offset=(60, 12, -6))
    levels = open_levels(tmp_path / "in", "a", kind="labels")
    export_precomputed(levels, plan_export(levels), tmp_path / "out", client)
    with file_server(tmp_path) as address:
        viewer = neuroglancer.Viewer()
        with viewer.txn() as state:
            state.dimensions = neuroglancer.CoordinateSpace(
                names=["x", "y", "z"], units="nm", scales=[6, 6, 30]
            )
            state.position = [-1 + 100, 2 + 100, 2 + 4.5]
            state.cross_section_scale = 1
            state.layout = "xy"
            state.show_axis_lines = False
            state.layers["export"] = neuroglancer.SegmentationLayer(
                source=f"precomputed://{address}/out",
                segment_colors={5: "#ff0000", 2**40 + 7: "#0000ff"},
                selected_alpha=1,
            )
        pixels = screenshot(viewer, tmp_path)
    height, width = (n // 2 for n in pixels.shape[:2])
    for y, x, colour in ((-50, -50, "red"), (50, 50, "blue"), (-50, 50, ""), (50, -50, "")):
        red, _, blue = pixels[height + y - 5 : height + y + 5, width + x - 5 : width + x + 5].mean(
            axis=(0, 1)
        )
        assert (red - blue > 100) == (colour == "red"), (y, x, red, blue)
        assert (blue - red > 100) == (colour == "blue"), (y, x, red, blue)
