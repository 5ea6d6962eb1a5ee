"""What a plan expects of a run, on this machine and on a cluster."""

import json
import time

import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.pipeline.forecast.forecast import Means, Work, forecast
from agq.pipeline.forecast.timing import Timing, timing_key
from tests.helpers.runs import make_config

GRID = BlockGrid((160, 1600, 1600), (30, 6, 6), (16, 160, 160), (0, 0, 0), (1, 1, 1), (0, 0, 0))


def timing(key: str = "k", **changes: object) -> Timing:
    values = {
        "key": key,
        "seconds": 2.0,
        "load_s": 30.0,
        "worker_bytes": 2**30,
        "device": "NVIDIA H200",
        "host": "gpu1",
        "time": time.time() - 200,
        "file_bytes": {"fragments": 100_000, "sidecars": 60_000},
    }
    return Timing.model_validate(values | changes)


def test_hours_money_and_wall_time_follow_from_blocks_and_workers():
    work = Work(GRID, selected=1000, blocks=900, todo=810, evaluated=True)
    expected = forecast(work, Means(8, gpus=True, cores=4, price=3.0), timing())
    assert expected.worker_hours == pytest.approx((810 * 2 + 8 * 30) / 3600)
    assert expected.cost == pytest.approx(3 * expected.worker_hours)
    assert expected.seconds["predict"] == 102 * 2 + 30  # 810 blocks in rounds of 8
    assert list(expected.seconds) == ["predict", "stitch", "pyramid", "evaluate"]
    assert 90e6 < expected.disk_bytes["fragments"] < 100e6
    assert expected.files["fragments"] == 900 > 20 * expected.files["segmentation"]
    assert "affinities" not in expected.files
    more = forecast(work, Means(8, gpus=True, cores=16), None)
    assert (more.cost, more.worker_hours, "predict" in more.seconds) == (None, None, False)
    assert more.seconds["stitch"] < expected.seconds["stitch"]


def test_a_timing_is_of_the_same_things_only(tmp_path):
    assert Timing.load(tmp_path, "k") is None
    timing().save(tmp_path)
    found = Timing.load(tmp_path, "k")
    assert found is not None
    assert (found.seconds, found.where) == (2.0, "NVIDIA H200 (gpu1)")
    assert Timing.load(tmp_path, timing_key({"precision": "bf16"})) is None
    timing(time=time.time() + 9999).save(tmp_path)
    assert Timing.load(tmp_path, "k") is None, "from the future"
    (tmp_path / "timing.json").write_text("{")
    assert Timing.load(tmp_path, "k") is None


def test_a_plan_times_a_block_once_and_says_when_and_where(main, tmp_path):
    config = make_config(tmp_path, output={"affinities": True})
    code, text, err = main("plan", config)
    assert code == 0, err
    assert "timed now on" in text
    assert "in.zarr::raw" in text
    kept = json.loads((tmp_path / "run" / "timing.json").read_text())
    (tmp_path / "run" / "timing.json").write_text(json.dumps(kept | {"time": kept["time"] - 7200}))
    code, text, _ = main("plan", config)
    assert "timed 2h 00m ago on" in text
    plan = json.loads(main("plan", config, "--no-time", "--json")[1])
    assert plan["seconds_per_block"] == kept["seconds"] == plan["forecast"]["block_s"]
    assert plan["forecast"]["disk_bytes"]["affinities"] >= 60 * 4096
    other = ("--set", "blocks.read_shape=[9,19,19]")
    assert "not timed" in main("plan", config, "--no-time", *other)[1]
    anew = json.loads(main("plan", config, *other, "--json")[1])
    assert anew["timing"]["key"] != kept["key"]


def test_a_plan_for_a_cluster(main, tmp_path):
    slurm = {"workers": 6, "limit": 4, "gpus": 2, "price_per_gpu_hour": 2.5}
    config = make_config(tmp_path, slurm=slurm)
    code, text, err = main("plan", config)
    assert code == 0, err
    assert "8 with a GPU each" in text
    assert "not timed (agq plan --submit" in text
    text = main("plan", config, "--assume", "1200")[1]
    assert "GPU hours              about 20\n" in text
    assert "cost                   about 50.00\n" in text
    assert "predict                about 2h 40m\n" in text
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert not [line for line in wide if str(tmp_path) not in line]
    assert main("plan", config, "--submit", "--assume", "3")[0] == 2
    code, _, err = main("plan", config, "--submit")
    assert code == 2, "there is no SLURM here, or it lacks what is asked for"
    assert len(err.splitlines()) == 1


def test_a_gpu_is_assumed_where_nothing_was_timed(main, tmp_path):
    model = {"factory": "agq.model.predictor:AGQPredictor", "checkpoint": "demo"}
    config = make_config(tmp_path, model=model, slurm={"workers": 2}, blocks={"read_shape": None})
    text = main("plan", config)[1]
    assert "assumed, not timed: 0.5 s per Mvoxel that a GPU reads" in text
    assert "GPU hours" in text
    for word in ("checkpoint             demo", "\npieces                 "):
        assert word in text
