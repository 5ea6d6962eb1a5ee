"""What `import agq` gives: a run from Python, arrays in and out, reports in a notebook."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from funlib.geometry import Coordinate, Roi

import agq
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch import workers
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_volume
from agq.pipeline.api import BlocksFailedError
from agq.pipeline.data.arrays import array_of, store_array
from tests.helpers.runs import FAKE, VOXEL_SIZE, blobs, environment, make_config, results

BLOCKS = {"read_shape": [9, 17, 17], "before": [1, 1, 1], "after": [1, 1, 1]}
SMALL = {
    "model": FAKE,
    "blocks": BLOCKS,
    "workers": {"count": 2},
}
FACE = {
    *("load_config", "Run", "segment", "stitch_fragments", "open_volume", "Predictor"),
    *("Prediction", "InputError", "RunStoppedError", "__version__"),
}


def test_the_face_is_what_is_promised():
    assert set(agq.__all__) == set(dir(agq)) == FACE
    assert all(getattr(agq, name) is not None for name in FACE)
    with pytest.raises(AttributeError, match="'agq' has no attribute 'Runn'"):
        agq.Runn  # noqa: B018


def test_import_agq_imports_nothing():
    code = "import sys; before = set(sys.modules); import agq; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["agq", "agq.caches"]


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return blobs((20, 50, 70))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def run(folder: Path, data: np.ndarray) -> Iterator[agq.Run]:
    """A finished run of an array, with its truth and an offset."""
    truth = (data > 120).astype(np.int64)
    return agq.segment(data, VOXEL_SIZE, folder / "run", truth=truth, **SMALL)


def test_an_array_is_segmented_in_one_call(run, folder, data):
    raw, fragments, labels = run.raw(), run.fragments(), run.segmentation()
    for array in (raw, fragments, labels):
        assert array.shape == data.shape
        assert array.voxel_size == Coordinate(VOXEL_SIZE)
        assert array.units == ["nm"] * 3
        assert array.axis_names == ["z", "y", "x"]
        assert array.roi == Roi((0, 0, 0), Coordinate(VOXEL_SIZE) * Coordinate(data.shape))
    np.testing.assert_array_equal(raw[:], data)
    inside = Roi((60, 12, 18), (90, 120, 60))
    np.testing.assert_array_equal(labels[inside], labels[2:5, 2:22, 3:13])
    assert labels[inside].any()
    assert run.segmentation(level=1).voxel_size != labels.voxel_size
    assert (folder / "run" / "evaluation.json").is_file()


def test_it_is_what_the_command_makes(run, folder, data, main):
    config = make_config(folder, data, run_dir=str(folder / "by command"))
    assert main("run", config)[0] == 0
    assert results(folder / "by command") == results(run.path)


def test_called_again_nothing_is_done_again(run, folder, data):
    before = (run.path / "run.json").read_text()
    steps: list[tuple[str, int, int]] = []
    again = agq.segment(
        *(data, VOXEL_SIZE, folder / "run"),
        truth=(data > 120).astype(np.int64),
        on_progress=lambda *step: steps.append(step),
        **SMALL,
    )
    assert ("predict", 60, 60) in steps
    assert len(list((run.path / "imported").iterdir())) == 2
    assert again.status().stages[0].done == 60
    assert json.loads(before)["id"] == again.status().id
    with pytest.raises(agq.InputError, match="has changed since the run began"):
        agq.segment(data[::-1], VOXEL_SIZE, folder / "run", **SMALL)


def test_a_run_is_opened_by_its_folder(run):
    opened = agq.Run(run.path)
    assert opened.config.stitch.across == 0.7
    report = opened.stitch(across=0.9)
    assert report.fragments > 1
    assert agq.Run(run.path).config.stitch.across == 0.9
    assert opened.evaluate().as_is is not None
    assert opened.status().state == "done"
    opened.stitch(across=0.7)
    with pytest.raises(agq.InputError, match=r"acros.*did you mean 'stitch.across'"):
        opened.stitch(acros=0.7)
    with pytest.raises(agq.InputError, match="is not a run folder"):
        agq.Run(run.path.parent)


def test_a_small_run_is_stitched_here_and_a_larger_one_by_workers(run, monkeypatch):
    def pid(across: float) -> int:
        agq.Run(run.path).stitch(across=across)
        (worker,) = Journal(run.path / "journal" / "relabel").workers.values()
        return worker.info.pid

    assert pid(0.8) == os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_FEW_BLOCKS", 59)
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert pid(0.9) != os.getpid()
    assert pid(0.7) == os.getpid()


def test_stages_of_a_file_tell_how_far_they_are(tmp_path, data):
    config = agq.load_config(make_config(tmp_path, data))
    told: list[tuple[str, int, int]] = []
    run = agq.Run(config, on_progress=lambda *step: told.append(step), workers={"count": 1})
    assert run.config.workers.count == 1
    assert run.predict().done == 60
    assert told[0] == ("predict", 0, 60)
    assert told[-1] == ("predict", 60, 60)
    run.stitch()
    assert {"contacts", "relabel"} <= {step for step, _, _ in told}
    with pytest.raises(agq.InputError, match=r"evaluate\.truth: no ground truth is named"):
        run.evaluate()


def test_what_a_callback_raises_stops_the_run(tmp_path, data):
    def stop(step: str, done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    run = agq.Run(make_config(tmp_path, data, model={"options": {"delay_s": 0.05}}))
    with pytest.raises(KeyboardInterrupt):
        agq.Run(run.config, on_progress=stop).predict()
    assert run.status().stages[0].state == "stopped"
    assert run.predict().done < 60
    assert run.status().stages[0].done == 60


def test_failed_blocks_are_an_error_with_their_numbers(tmp_path, data):
    marked = data.copy()
    marked[2, 5, 5] = 250
    config = make_config(tmp_path, marked, model={"options": {"marks": True}})
    run = agq.Run(config, workers={"retries": 0})
    with pytest.raises(BlocksFailedError, match=r"1 block of .* failed, the first is 0"):
        run.run()
    assert run.predict(only_failed=True).failed == (0,)
    assert agq.Run(config, stitch={"allow_missing": True}).run().stitch.missing == 1


def test_a_notebook_shows_tables(run):
    for report, words in (
        (run.stitch(), ("fragments", "segments", "largest")),
        (run.evaluate(), ("split", "merge", "Rand")),
        (run.status(), ("predict", "60")),
        (run, ("predict", "done")),
    ):
        html = report._repr_html_()
        assert html.startswith("<pre style=")
        assert all(word in html for word in words), html
    assert repr(run) == f"agq.Run('{run.path}')"


def test_fragments_of_another_model_as_arrays(run, tmp_path, data):
    labels = run.segmentation()[:]
    affinities = np.full((3, *data.shape), 0.8, np.float32)
    options = {"stitch": {"min_size": 1}}
    report = agq.stitch_fragments(labels, affinities, VOXEL_SIZE, tmp_path / "out", **options)
    assert report.blocks > 1
    assert report.segments == len(np.unique(labels[labels > 0])) == report.fragments
    assert "largest" in report._repr_html_()
    volume = agq.open_volume(tmp_path / "out" / "data.zarr", "segmentation", kind="labels")
    assert volume.voxel_size == Coordinate(VOXEL_SIZE)
    joined = volume.read((0, 0, 0), volume.shape)
    np.testing.assert_array_equal(joined > 0, labels > 0)
    again = agq.stitch_fragments(
        labels, affinities, VOXEL_SIZE, tmp_path / "out", threshold=0.9, **options
    )
    assert "contacts" in again.reused
    assert again.segments == report.segments


@pytest.mark.parametrize("size", [None, (30, 4.2, 4.2), (30, 6), (0, 6, 6)])
def test_an_array_needs_a_whole_voxel_size(tmp_path, data, size):
    with pytest.raises(agq.InputError, match="three positive whole numbers"):
        agq.segment(data, size, tmp_path / "run", **SMALL)


def test_an_array_of_other_axes_is_refused(tmp_path):
    with pytest.raises(agq.InputError, match=r"raw: an array of shape \(4, 4\)"):
        agq.segment(np.zeros((4, 4), np.uint8), VOXEL_SIZE, tmp_path / "run", **SMALL)


def test_a_unit_finer_than_nm_stays_exact(tmp_path, data):
    placed = store_array(tmp_path, "raw", data, (300, 42, 42), "angstrom")
    array = array_of(open_volume(placed, "raw", unit="angstrom"))
    assert array.voxel_size == Coordinate(300, 42, 42)
    assert array.units == ["angstrom"] * 3


@pytest.fixture
def array_type() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its own use of pydantic
        from funlib.persistence import Array
    return Array


def test_what_an_array_says_of_its_axes_and_place_counts(tmp_path, array_type):
    values = blobs((4, 5, 6))
    named = array_type(
        values.transpose(2, 1, 0), offset=(12, 6, 60), voxel_size=(6, 6, 30),
        axis_names=["x", "y", "z"], units=["nm"] * 3,
    )  # fmt: skip
    other = zarr.create_array(tmp_path / "o", data=values.T, dimension_names=["x", "y", "z"])
    for data, size, corner in ((named, None, (60, 6, 12)), (other, (30, 6, 6), (0, 0, 0))):
        placed = open_volume(store_array(tmp_path, "raw", data, size), "raw")
        np.testing.assert_array_equal(placed.read((0, 0, 0), placed.shape), values)
        assert (placed.voxel_size, placed.offset) == (Coordinate(30, 6, 6), Coordinate(corner))
    with pytest.raises(agq.InputError, match=r"raw.* \(30, 6, 6\) nm, but voxel_size is given"):
        store_array(tmp_path, "raw", named, (30, 4, 4))
    with pytest.raises(agq.InputError, match="three positive whole numbers"):
        store_array(tmp_path, "raw", values, None)
    channels = np.stack([values, values + 1, values + 2], axis=-1)
    affinities = zarr.create_array(
        tmp_path / "a", data=channels, dimension_names=["z", "y", "x", "c"]
    )
    like = open_volume(store_array(tmp_path, "raw", named, None), "raw")
    stored = store_array(tmp_path, "affinities", affinities, None, like=like)
    array = zarr.open_array(stored / "affinities", mode="r")
    np.testing.assert_array_equal(array[:], np.moveaxis(channels, 3, 0))
    assert (array.attrs["offset"], array.attrs["voxel_size"]) == ([60, 6, 12], [30, 6, 6])


def test_an_array_without_an_offset_begins_where_raw_does(tmp_path, data, array_type):
    raw = array_type(data, offset=(300, 0, 60), voxel_size=(30, 6, 6), axis_names=["z", "y", "x"])
    truth = (data > 120).astype(np.int64)
    run = agq.segment(raw, None, tmp_path / "run", truth=truth, **SMALL)
    assert run.segmentation().offset == Coordinate(300, 0, 60)
    assert run.evaluate().voxels == np.count_nonzero(truth)


def test_an_array_handed_out_reads_what_is_asked_for_only(tmp_path):
    container = tmp_path / "many.zarr"
    create_array(
        container, "raw", shape=(4000, 4000, 4000), chunks=(16, 16, 16), dtype="uint8",
        voxel_size=(4, 4, 4), offset=(40, 0, 8),
    )  # fmt: skip
    begun = time.perf_counter()
    array = array_of(open_volume(container, "raw"))
    assert array.offset == Coordinate(40, 0, 8)
    part = array[Roi((80, 40, 48), (64, 64, 64))]
    assert part.shape == (16, 16, 16)
    assert time.perf_counter() - begun < 2  # 15 million chunks, each looked at, take 10 s


@pytest.mark.parametrize(
    "key",
    [np.s_[3], np.s_[2:9, 4, ::3], np.s_[:, 7:2:-2, -3:], np.s_[..., [1, 5, 2]], np.s_[3:3]],
)
def test_an_array_handed_out_is_indexed_like_numpy(tmp_path, data, key):
    array = array_of(open_volume(store_array(tmp_path, "raw", data, VOXEL_SIZE), "raw"))
    np.testing.assert_array_equal(array[key], data[key])


def test_a_script_without_a_guard_runs(tmp_path, data):
    """Workers of the stitch are processes that would import the script again."""
    make_config(tmp_path, data, stitch={"dask": {"workers": 1}})
    (tmp_path / "script.py").write_text(
        "import agq\n"
        "open('count', 'a').write('.')\n"
        "run = agq.Run('config.yaml')\n"
        "report = run.run()\n"
        "print(report.stitch.segments, 'segments')\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" segments\n")
    assert (tmp_path / "count").read_text() == "."
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["stitch"]["dask"]["workers"] == 1
