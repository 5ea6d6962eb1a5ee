"""The neuroglancer viewer of a run."""

import importlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.volumes.create import chunk_file, create_affinities, create_array, open_array
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.config.schema import load_config
from agq.pipeline.folder import RunFolder
from agq.pipeline.view import state as view_state
from agq.pipeline.view import viewer as view
from agq.pipeline.view.layers import Layer, LazyVolume, config_layers, run_layers, volume_layer
from agq.pipeline.view.marks import run_marks
from agq.pipeline.view.viewer import build_viewer
from tests.helpers.browser import CHROMIUM, file_server, screenshot

neuroglancer = pytest.importorskip("neuroglancer", reason="the extra `view` is not installed")

AGQ = [sys.executable, "-u", "-c", "from agq.pipeline.cli.main import main; main()"]
SHAPE = (8, 60, 70)
PLACE: dict[str, Any] = {"voxel_size": (30, 6, 6), "offset": (60, 12, -5)}


def fill(array: Any, data: np.ndarray) -> None:
    array[...] = data


@pytest.fixture
def raw() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    data = np.zeros(SHAPE, np.uint64)
    data[:, :30] = 5
    data[:, 30:, 35:] = 2**40 + 7
    return data


@pytest.fixture
def folder(tmp_path: Path, raw: np.ndarray, labels: np.ndarray) -> Path:
    options: Any = {"shape": SHAPE, "chunks": (4, 16, 16), **PLACE}
    fill(create_array(tmp_path / "in.zarr", "raw", dtype=np.uint8, **options), raw)
    truth = labels.astype(np.int32)
    fill(create_array(tmp_path / "in.zarr", "labels", dtype=np.int32, **options), truth)
    for name in ("fragments", "segmentation/s0"):
        fill(create_array(tmp_path / "data.zarr", name, dtype=np.uint64, **options), labels)
    affinities = create_affinities(tmp_path / "data.zarr", "affinities", **options)
    fill(affinities, np.stack([raw // 2, raw // 3, raw // 4]))
    return tmp_path


@pytest.fixture
def layers(folder: Path) -> list[Layer]:
    truth = open_volume(folder / "in.zarr", "labels", kind="labels")
    return [
        volume_layer("raw", open_volume(folder / "in.zarr", "raw"), "image"),
        *run_layers(folder / "data.zarr"),
        volume_layer("truth", truth, "segmentation", visible=False),
    ]


@pytest.fixture(autouse=True)
def _server_stops() -> Iterator[None]:
    yield
    neuroglancer.stop()


def get(url: str) -> bytes:
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


def test_state_has_the_layers_in_place(layers: list[Layer]) -> None:
    state = build_viewer(layers, at=(1, 2, 3)).state.to_json()
    shown = {layer["name"]: layer for layer in state["layers"]}
    assert list(shown) == ["raw", "affinities", "fragments", "segmentation", "truth"]
    assert [layer["type"] for layer in state["layers"]] == ["image"] * 2 + ["segmentation"] * 3
    visible = [name for name, layer in shown.items() if layer.get("visible", True)]
    assert visible == ["raw", "segmentation"]
    scales = {"z": [3e-8, "m"], "y": [6e-9, "m"], "x": [6e-9, "m"]}
    assert state["dimensions"] == scales
    assert list(state["dimensions"]) == ["x", "y", "z"]
    assert state["position"] == pytest.approx([-5 / 6 + 3.5, 12 / 6 + 2.5, 60 / 30 + 1.5])
    for name, layer in shown.items():
        transform = layer["source"][0]["transform"]
        dimensions = dict(transform["outputDimensions"])
        dimensions.pop("c^", None)
        assert dimensions == scales
        moved = [row[-1] for row in transform["matrix"]]
        assert moved[-3:] == pytest.approx([2, 2, -5 / 6])
        assert len(moved) == (4 if name == "affinities" else 3)


def test_browser_gets_the_page_and_the_voxels(
    layers: list[Layer], raw: np.ndarray, labels: np.ndarray
) -> None:
    viewer = build_viewer(layers)
    base = str(viewer).split("/v/")[0]
    assert b"<html" in get(str(viewer)).lower()
    for layer in viewer.state.to_json()["layers"]:
        token = layer["source"][0]["url"].removeprefix("python://volume/")
        info = json.loads(get(f"{base}/neuroglancer/info/{token}"))
        four = layer["name"] == "affinities"
        box = "0,1,30,20/3,5,50,60" if four else "1,30,20/5,50,60"
        scale = "1,1,1,1" if four else "1,1,1"
        data = get(f"{base}/neuroglancer/npz/{token}/{scale}/{box}")
        voxels = np.load(io.BytesIO(zlib.decompress(data)))
        expected = {
            "raw": raw,
            "affinities": np.stack([raw // 2, raw // 3, raw // 4]),
            "truth": labels.astype(np.int32).astype(np.uint32),
        }.get(layer["name"], labels)
        assert info["shape"] == list(expected.shape)
        assert info["dataType"] == expected.dtype.name
        assert info["volumeType"] == layer["type"]
        np.testing.assert_array_equal(voxels, expected[..., 1:5, 30:50, 20:60])


def test_only_what_is_looked_at_is_read(folder: Path, labels: np.ndarray) -> None:
    array = open_array(folder / "data.zarr", "fragments")
    for index in np.ndindex(2, 4, 5):
        if index != (0, 0, 0):
            chunk_file(array, index).write_bytes(b"damaged")
    volume = open_volume(folder / "data.zarr", "fragments", kind="labels")
    viewer = build_viewer([volume_layer("fragments", volume, "segmentation")])
    lazy = LazyVolume(volume)
    np.testing.assert_array_equal(lazy[0:4, 0:16, 0:16], labels[:4, :16, :16])
    with pytest.raises(Exception, match=r"[Zz]std|decompress"):
        lazy[0:4, 0:16, 0:17]
    assert get(str(viewer))


def test_large_volumes_refuse_meshes_before_reading(
    layers: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = build_viewer(layers)
    base = str(viewer).split("/v/")[0]
    url = viewer.state.to_json()["layers"][3]["source"][0]["url"]
    address = f"{base}/neuroglancer/mesh/{url.removeprefix('python://volume/')}/5"
    assert len(get(address)) > 100
    monkeypatch.setattr(view, "MESH_VOXELS", 10)
    with pytest.raises(urllib.error.HTTPError, match="405"):
        get(address)


def test_meshes_are_served_to_those_who_know_the_viewer(layers: list[Layer], tmp_path) -> None:
    folder = tmp_path / "mesh"
    folder.mkdir()
    (folder / "info").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("no")
    viewer = build_viewer([layers[0], replace(layers[3], meshes=folder, shown=(5,))])
    layer = viewer.state.to_json()["layers"][1]
    volume, meshes = layer["source"]
    assert volume["subsources"] == {"meshes": {"enabled": False}}
    assert layer["segments"] == ["5"]
    address = meshes["url"].removeprefix("precomputed://")
    assert get(f"{address}/info") == b"0123456789"
    part = urllib.request.Request(f"{address}/info", headers={"Range": "bytes=2-4"})
    with urllib.request.urlopen(part, timeout=20) as answer:
        assert answer.read() == b"234"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
    token = address.rsplit("/", 1)[1]
    for wrong in (
        f"{address}/../secret",
        f"{address}/%2e%2e/secret",
        address.replace(token, "x") + "/info",
    ):
        with pytest.raises(urllib.error.HTTPError, match="40"):
            get(wrong)


def test_a_run_that_has_only_begun(folder: Path) -> None:
    shutil.rmtree(folder / "data.zarr" / "segmentation")
    shutil.rmtree(folder / "data.zarr" / "affinities")
    (fragments,) = run_layers(folder / "data.zarr")
    assert fragments.name == "fragments"
    assert fragments.visible
    assert run_layers(folder / "nothing.zarr") == []
    with pytest.raises(InputError, match="no volume to show"):
        build_viewer([])


@pytest.mark.parametrize("unit", ["nm", "angstrom", "pm"])
def test_units(folder: Path, unit: str) -> None:
    volume = open_volume(folder / "in.zarr", "raw", unit=unit)
    state = build_viewer([volume_layer("raw", volume, "image")]).state.to_json()
    assert [v[0] for v in state["dimensions"].values()] == pytest.approx([6e-9, 6e-9, 3e-8])


def test_contrast_of_deep_images(tmp_path: Path) -> None:
    array = create_array(
        tmp_path / "in.zarr", "raw", shape=SHAPE, chunks=(4, 16, 16), dtype=np.uint16, **PLACE
    )
    fill(array, np.random.default_rng(0).integers(3000, 4000, SHAPE).astype(np.uint16))
    layer = volume_layer("raw", open_volume(tmp_path / "in.zarr", "raw"), "image")
    state = build_viewer([layer]).state.to_json()
    low, high = state["layers"][0]["shaderControls"]["normalized"]["range"]
    assert 3000 <= low < 3050
    assert 3950 < high <= 4000


def test_lower_resolutions_are_read_where_the_browser_is_zoomed_out(
    folder: Path, labels: np.ndarray
) -> None:
    # Contents that a shrunk full resolution would not give.
    size, offset = (30, 12, 12), PLACE["offset"]
    array = create_array(
        folder / "data.zarr",
        "segmentation/s1",
        shape=(8, 30, 35),
        chunks=(4, 16, 16),
        dtype=np.uint64,
        voxel_size=size,
        offset=offset,
    )
    fill(array, np.full((8, 30, 35), 99, np.uint64))
    (layer,) = [y for y in run_layers(folder / "data.zarr") if y.name == "segmentation"]
    assert [f.tolist() for f, _ in layer.data.coarser] == [[1, 2, 2]]
    viewer = build_viewer([layer])
    base = str(viewer).split("/v/")[0]
    token = viewer.state.to_json()["layers"][0]["source"][0]["url"].removeprefix("python://volume/")
    for scale, stop, value in (
        ("1,1,1", "2,4,4", 5),
        ("1,2,2", "2,4,4", 99),
        ("2,4,4", "2,4,4", 99),
    ):
        data = get(f"{base}/neuroglancer/npz/{token}/{scale}/0,0,0/{stop}")
        voxels = np.load(io.BytesIO(zlib.decompress(data)))
        assert voxels.shape == (2, 4, 4)
        assert (voxels == value).all()


def test_marks_of_a_run(folder: Path, layers: list[Layer]) -> None:
    grid = BlockGrid(SHAPE, (30, 6, 6), (4, 16, 16), offset=(60, 12, -6))
    run = RunFolder(folder / "marked")
    with run.lock():
        run.create({}, {"grid": grid.to_dict()})
    assert run_marks(RunFolder(folder / "none"), "nm") == []
    journal = JournalWriter(run.journal("predict"), WorkerInfo("worker-0", "node", 1))
    journal.finish(BlockRecord(21, "failed", error="ValueError: bad"))
    worst = {"label": 5, "bits": 0.5, "largest": [{"label": 1, "voxels": 9, "at": [120, 60, 60]}]}
    report = {"worst_mergers": [worst], "worst_splits": []}
    run.update_stage("evaluate", state="done", report=report)
    marks = run_marks(run, "nm")
    assert [m.name for m in marks] == ["blocks", "failed blocks", "mergers"]
    assert len(marks[0].items) == grid.n_blocks == 40
    assert marks[0].items[21] == ("block 21", ((6.0, 2.0, 15.0), (10.0, 18.0, 31.0)))
    assert marks[1].items == (("block 21: ValueError: bad", ((8.0, 10.0, 23.0),)),)
    assert marks[2].items == (
        ("merger 5 (0.5000 bits): 1, voxel 2,8,11 (135,63,63 nm)", ((4.5, 10.5, 10.5),)),
    )
    state = build_viewer(layers, marks=marks).state.to_json()
    assert [y["type"] for y in state["layers"][-3:]] == ["annotation"] * 3
    assert state["layers"][-2]["annotations"][0]["point"] == [8, 10, 23]


def test_borders_of_the_nearest_blocks_of_a_million(tmp_path: Path) -> None:
    grid = BlockGrid((400, 400, 400), (1, 1, 1), (4, 4, 4))
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({}, {"grid": grid.to_dict()})
    (blocks,) = run_marks(run, "nm", at=(399, 0, 200))
    assert 200 < len(blocks.items) <= 2000
    assert f"block {grid.number((99, 0, 50))}" in [text for text, _ in blocks.items]
    assert blocks.name == f"blocks (nearest {len(blocks.items)})"
    # A record may name a grid that is smaller than its volume, and an address any voxel.
    for at in ((2**70, 0, 0), (0, -(2**70), 10**11)):
        assert run_marks(run, "nm", at=at)[0].items


def test_position_outside(layers: list[Layer]) -> None:
    with pytest.raises(InputError, match=r"--at 8,0,0 is outside .* 8,60,70 voxels"):
        build_viewer(layers, at=(8, 0, 0))


def test_port(layers: list[Layer]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} cannot be used"):
            build_viewer(layers, port=port)
    assert str(build_viewer(layers, port=port)).startswith(f"http://127.0.0.1:{port}/")


def test_without_neuroglancer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuroglancer", None)
    monkeypatch.delitem(sys.modules, view.__name__)
    with pytest.raises(InputError, match=r"pip install 'agq-pipeline\[view\]'"):
        importlib.import_module(view.__name__)


@pytest.fixture
def config_file(folder: Path) -> Path:
    """Configuration of a run whose folder holds the results of `folder`."""
    (folder / "run").mkdir()
    (folder / "data.zarr").rename(folder / "run" / "data.zarr")
    file = folder / "run.yaml"
    file.write_text(
        f"run_dir: {folder}/run\n"
        f"input: {{raw: {{path: {folder}/in.zarr, dataset: raw}}}}\n"
        f"evaluate: {{truth: {{path: {folder}/in.zarr, dataset: labels}}}}\n"
    )
    return file


def test_layers_of_a_configuration(config_file: Path) -> None:
    layers = config_layers(load_config(config_file))
    names = ["raw", "affinities", "fragments", "segmentation", "truth"]
    assert [layer.name for layer in layers] == names


def test_a_run_whose_inputs_are_gone_is_shown_without_them(config_file: Path) -> None:
    config = load_config(config_file)
    shutil.rmtree(config_file.parent / "in.zarr")
    names = [layer.name for layer in config_layers(config)]
    assert names == ["affinities", "fragments", "segmentation"]
    [state] = view_state.portable_states(config, "http://host/run", [(None, ())])
    assert [layer["name"] for layer in state["layers"]] == names
    shutil.rmtree(Path(config.run_dir) / "data.zarr")
    with pytest.raises(InputError, match=r"input\.raw: "):
        config_layers(config)


def test_command_prints_the_state_and_ends(config_file: Path) -> None:
    command = [*AGQ, "view", str(config_file), "--print-state"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "--base-url" in done.stderr) == (2, True)
    command += ["--base-url", "https://lab.example/run", "--raw-url", "s3://bucket/raw"]
    wrong = [*command, "--segmentation-url", "www/seg"]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "--segmentation-url" in done.stderr) == (2, True)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sources = {layer["name"]: layer["source"] for layer in json.loads(done.stdout)["layers"]}
    assert {name: source[0]["url"] for name, source in sources.items()} == {
        "raw": "zarr3://s3://bucket/raw",
        "affinities": "zarr3://https://lab.example/run/data.zarr/affinities/",
        "fragments": "zarr3://https://lab.example/run/data.zarr/fragments/",
        "segmentation": "zarr3://https://lab.example/run/data.zarr/segmentation/s0/",
    }


def test_command_serves_until_interrupted(config_file: Path) -> None:
    command = [*AGQ, "view", str(config_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert b"<html" in get(address).lower()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
@pytest.mark.parametrize("exported", [False, True])
def test_a_printed_state_shows_the_segments_by_their_address(
    tmp_path: Path, config_file: Path, exported: bool
) -> None:
    if exported:
        # The format wants whole voxels; this volume begins a sixth of one further on.
        made = open_array(tmp_path / "run" / "data.zarr", "segmentation/s0", "r")
        placed = {"voxel_size": (30, 6, 6), "offset": (60, 12, -6)}
        shape = tuple(made.shape)
        plain = create_array(
            tmp_path / "plain.zarr", "s", shape=shape, chunks=shape, dtype="uint64", **placed
        )
        plain[:] = made[:]
        export = ["export", "precomputed", f"{tmp_path / 'plain.zarr'}::s", str(tmp_path / "www")]
        subprocess.run([*AGQ, *export], check=True, timeout=120, capture_output=True)
    with file_server(tmp_path) as base:
        [state] = view_state.portable_states(
            load_config(config_file),
            f"{base}/run",
            [(None, ())],
            raw_url=f"{base}/in.zarr/raw/",
            segmentation_url=f"precomputed://{base}/www" if exported else None,
        )
        assert "python://" not in json.dumps(state)
        assert (f"precomputed://{base}/www" in json.dumps(state)) == exported
        viewer = neuroglancer.Viewer()
        viewer.set_state(state)
        pixels = screenshot(viewer, tmp_path)
    first = pixels[122:148, 170:230].mean(axis=(0, 1))
    second = pixels[152:178, 203:230].mean(axis=(0, 1))
    assert np.ptp(first) > 30
    assert np.ptp(second) > 30
    assert np.abs(first - second).max() > 30


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_a_real_browser_shows_the_segments(tmp_path: Path, layers: list[Layer]) -> None:
    pixels = screenshot(build_viewer([layers[0], layers[3]]), tmp_path)
    # The x-y panel is the upper left one; one voxel is one pixel, the middle is in the middle.
    first = pixels[122:148, 170:230].mean(axis=(0, 1))
    second = pixels[152:178, 203:230].mean(axis=(0, 1))
    background = pixels[152:178, 170:197].mean(axis=(0, 1))
    assert np.ptp(background) < 10
    assert np.ptp(first) > 30
    assert np.ptp(second) > 30
    assert np.abs(first - second).max() > 30


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_a_real_browser_shows_meshes(tmp_path: Path, layers: list[Layer]) -> None:
    # Another test of this process may have started a server of neuroglancer's.
    neuroglancer.server.stop()
    # The format wants whole voxels; this volume begins a sixth of one further on.
    placed: Any = {"shape": SHAPE, "chunks": SHAPE, **PLACE, "offset": (60, 12, -6)}
    plain = create_array(tmp_path / "plain.zarr", "s", dtype=np.uint64, **placed)
    fill(plain, open_array(tmp_path / "data.zarr", "segmentation/s0", "r")[:])
    export = ["export", "precomputed", f"{tmp_path / 'plain.zarr'}::s", str(tmp_path / "www")]
    subprocess.run([*AGQ, *export, "--meshes"], check=True, timeout=120, capture_output=True)
    meshes = tmp_path / "www" / "mesh"
    viewer = build_viewer([replace(layers[3], meshes=meshes, shown=(5,))])
    with viewer.txn() as state:
        state.show_slices = False
        state.layers[0].layer.segment_colors = {5: "#ff0000"}
    lower_left = screenshot(viewer, tmp_path)[300:, :400]
    red, green, blue = lower_left.transpose(2, 0, 1)
    # Lines of axes and borders are thin.
    assert ((red > 60) & (red > 2 * green) & (red > 2 * blue)).mean() > 0.02
