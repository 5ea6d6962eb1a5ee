"""The whole job from the command line: one result, whatever happens on the way."""

import json
import os
import random
import signal
import subprocess
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from agq.blockwise.volumes.open import open_volume
from agq.pipeline.config.schema import load_config
from agq.pipeline.run.plan import make_plan
from agq.pipeline.run.prepare import prepare
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.text import measure
from tests.helpers.fakes import RAISE, threshold
from tests.helpers.runs import agq, blobs, command, environment, make_config, results, write_volume


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = make_config(folder)
    make_plan(prepare(load_config(config)))  # times a block, of which the run's forecast is made
    done = agq("run", config)
    assert done.returncode == 0, done.stderr + done.stdout
    (folder / "said").write_text(done.stdout)
    return folder


def test_run_writes_everything_the_readme_lists(undisturbed):
    run = undisturbed / "run"
    record = json.loads((run / "run.json").read_text())
    for stage in ("predict", "stitch"):
        assert record["stages"][stage]["state"] == "done"
        assert record["stages"][stage]["report"]
    assert record["stages"]["predict"]["device"] == "cpu"
    assert record["made_with"][-1]["device"] == "cpu"
    segmentation = open_volume(run / "data.zarr", "segmentation", level=0, kind="labels")
    raw = open_volume(undisturbed / "in.zarr", "raw")
    assert segmentation.shape == raw.shape
    assert tuple(segmentation.voxel_size) == (30, 6, 6)
    assert (run / "run.png").stat().st_size > 1000


def test_the_forecast_of_files_and_disk_is_near_the_fact(undisturbed):
    said = (undisturbed / "said").read_text()
    assert "forecast" in said
    status = load_status(undisturbed / "run")
    rows = {row.name: row for row in status.forecast}
    assert {"worker_hours", "predict_s", "stitch_s", "disk_bytes", "files"} == rows.keys()
    for name in ("files", "disk_bytes"):
        assert rows[name].forecast == pytest.approx(rows[name].fact, rel=0.2), name
        assert measure(name, rows[name].fact) in said
    files = [f for f in (undisturbed / "run").rglob("*") if f.is_file()]
    assert len(files) - 3 <= rows["files"].fact <= len(files)  # the picture, for one, comes later
    assert rows["worker_hours"].fact > 0
    shown = StringIO()
    Console(file=shown, width=80).print(status.table())
    assert "worker hours" in shown.getvalue()


def test_stitched_blocks_equal_the_whole_volume_labelled_at_once(undisturbed):
    """The fake predictor thresholds; stitched, that is the components of the whole volume."""
    run = undisturbed / "run"
    segmentation = open_volume(run / "data.zarr", "segmentation", level=0, kind="labels")
    found = segmentation.read((0, 0, 0), segmentation.shape)
    raw = open_volume(undisturbed / "in.zarr", "raw")
    whole = threshold().predict([raw.read((0, 0, 0), raw.shape)])[0].labels
    assert ((found > 0) == (whole > 0)).all()
    pairs = np.unique(np.stack([found[found > 0], whole[found > 0]]), axis=1)
    assert pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


def test_second_run_does_nothing_and_changes_nothing(undisturbed):
    before = results(undisturbed / "run")
    lines = (undisturbed / "run" / "journal").rglob("*.jsonl")
    journal = {file: file.stat().st_size for file in lines if "predict" in str(file)}
    done = agq("run", undisturbed / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert results(undisturbed / "run") == before
    assert all(file.stat().st_size == size for file, size in journal.items())


def test_other_settings_are_refused_then_overwritten(undisturbed, tmp_path):
    config = make_config(tmp_path)
    assert agq("predict", config).returncode == 0
    refused = agq("predict", config, "--set", "blocks.read_shape=[9,33,33]")
    assert refused.returncode == 2
    assert "grid.write_shape" in refused.stderr
    assert "--overwrite" in refused.stderr
    again = agq("predict", config, "--overwrite", "--set", "blocks.read_shape=[9,33,33]")
    assert again.returncode == 0, again.stderr


def test_workers_batches_and_stitch_partition_do_not_change_a_byte(undisturbed, tmp_path):
    config = make_config(
        tmp_path,
        model={"factory": "tests.helpers.fakes:threshold", "options": {"batch_size": 3}},
        workers={"count": 1, "prefetch": 5},
        stitch={"dask": {"workers": 2}},
    )
    # Batch size is an option of a foreign factory here, so it is part of the identity, not of
    # the bytes.
    assert agq("run", config).returncode == 0
    assert results(tmp_path / "run") == results(undisturbed / "run")


def kill_randomly(config: Path, chance: random.Random, *, coordinator: bool) -> None:
    """Start a run and SIGKILL its process group, or one of its children, at a random moment."""
    with subprocess.Popen(
        command("run", config),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + chance.uniform(1.5, 7.0)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            return
        if coordinator:
            os.kill(process.pid, signal.SIGKILL)
        else:
            children = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
            ).stdout.split()
            for child in children:
                if chance.random() < 0.6:
                    try:
                        os.kill(int(child), signal.SIGKILL)
                    except ProcessLookupError:
                        continue
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("coordinator", [True, False], ids=["coordinator", "workers"])
def test_killed_runs_end_with_the_same_bytes(undisturbed, tmp_path, seed, coordinator):
    # The stitch has a worker to kill, or is done by the coordinator itself.
    config = make_config(tmp_path, stitch={"dask": {"workers": int(not coordinator)}})
    chance = random.Random(1000 * coordinator + seed)
    for _ in range(3):
        kill_randomly(config, chance, coordinator=coordinator)
    done = agq("run", config)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == results(undisturbed / "run")


def test_interrupt_stops_soon_and_resumes(undisturbed, tmp_path):
    config = make_config(tmp_path, model={"options": {"delay_s": 0.2}})
    with subprocess.Popen(
        command("run", config), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        time.sleep(6)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "Traceback" not in stderr
    assert agq("run", config).returncode == 0
    assert results(tmp_path / "run") == results(undisturbed / "run")


def test_a_roi_is_done_whole_blocks_and_extended_later(undisturbed, tmp_path):
    roi = {"offset": [2, 3, 20], "shape": [3, 20, 20], "units": "voxels"}
    raw = {"path": str(tmp_path / "in.zarr"), "dataset": "raw"}
    config = make_config(tmp_path, input={"raw": raw, "roi": roi})
    assert agq("predict", config).returncode == 0
    partial = results(tmp_path / "run")
    chunks = [name for name in partial if "fragments/c" in name]
    whole = results(undisturbed / "run")
    assert 0 < len(chunks) < len([name for name in whole if "fragments/c" in name])
    assert all(partial[name] == whole[name] for name in chunks)
    assert agq("run", config).returncode == 0
    config = make_config(tmp_path)
    assert agq("run", config).returncode == 0
    assert results(tmp_path / "run") == whole


def test_only_the_roi_is_scored(tmp_path):
    data = blobs((20, 50, 70))
    truth = np.digitize(data, (60, 120)).astype(np.uint32) * (blobs(data.shape, 3) > 90)
    write_volume(tmp_path / "in.zarr", "labels", truth)
    container = str(tmp_path / "in.zarr")
    sections = {
        "input": {
            "raw": {"path": container, "dataset": "raw"},
            "roi": {"offset": [60, 18, 120], "shape": [150, 120, 180], "units": "world"},
        },
        "evaluate": {"truth": {"path": container, "dataset": "labels"}},
    }
    config = make_config(tmp_path, data, **sections)
    done = agq("run", config)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    inside = truth[2:7, 3:23, 20:50]
    assert (report["offset"], report["shape"]) == ([60, 18, 120], [5, 20, 30])
    assert report["voxels"] == np.count_nonzero(inside)
    labels = open_volume(tmp_path / "run/data.zarr", "segmentation", level=0, kind="labels")
    found = labels.read((2, 3, 20), (7, 23, 50))
    assert report["background"] == pytest.approx(np.mean(found[inside > 0] == 0))
    again = json.loads(agq("evaluate", tmp_path / "run", "--json").stdout)
    assert again == report


def test_failed_block_ends_with_1_and_the_retry_command(tmp_path):
    data = blobs((20, 50, 70))
    # Inside one block and out of every other's window; it fails twice, then works.
    data[3, 7, 7] = RAISE
    config = make_config(
        tmp_path,
        data,
        model={"options": {"marks": True, "times": 2, "state": str(tmp_path)}},
        workers={"count": 1, "retries": 1},
    )
    failed = agq("run", config)
    assert failed.returncode == 1, failed.stderr
    assert "1 block failed" in failed.stderr
    assert "this block cannot be predicted" in failed.stderr
    assert f"agq predict {config} --only-failed" in failed.stderr
    assert "Traceback" not in failed.stderr
    refused = agq("stitch", tmp_path / "run")
    assert refused.returncode == 2
    assert "--allow-missing" in refused.stderr
    assert agq("stitch", tmp_path / "run", "--allow-missing").returncode == 0
    assert agq("predict", config, "--only-failed").returncode == 0
    done = agq("run", config)
    assert done.returncode == 0, done.stderr
