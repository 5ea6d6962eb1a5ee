"""Whole runs: damaged in every kind of file, found, taken back, and the same bytes again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.errors import InputError
from agq.pipeline.api import Run, stitch_fragments
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.verify import verify_run
from agq.pipeline.status.monitor import load_status
from tests.helpers.runs import agq, make_config, results
from tests.helpers.sidecars import unpack_sidecars

DAMAGED = {
    "fragments": "data.zarr/fragments/c/0/0/1",
    "affinities": "data.zarr/affinities/c/0/1/1/1",
    "sidecars": "sidecars/0000000/5.agqs",
    "segmentation": "data.zarr/segmentation/s0/c/0/1/2",
    "pyramid": "data.zarr/segmentation/s1/c/0/0/0",
    "tables": "lut/segments.parquet",
    "metadata": "data.zarr/segmentation/s1/zarr.json",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    Run(make_config(folder, output={"affinities": True})).run()
    done = Journal(folder / "run/journal/predict").rows
    unpack_sidecars(folder / "run", done["block"][done["rank"] == BlockState.DONE].tolist())
    return folder


@pytest.fixture
def place(finished, tmp_path) -> Path:
    """Return a copy; its run folder is another one, so its inputs are the same."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "in.zarr").symlink_to(finished / "in.zarr")
    return tmp_path


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "delete":
        file.unlink()
    elif how == "flip":
        data[len(data) * 2 // 3] ^= 4
        file.write_bytes(data)
    else:
        file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("how", ["delete", "flip", "cut"])
def test_damage_is_named_taken_back_and_made_again(place, how):
    run = place / "run"
    before = results(run)
    for path in DAMAGED.values():
        damage(run / path, how)
    failed = agq("verify", run, "--json")
    assert failed.returncode == 1, failed.stderr
    found = json.loads(failed.stdout)
    assert {p["kind"]: p["path"] for p in found["problems"]} == DAMAGED
    assert found["taken_back"] == {}
    assert verify_run(run, repair=True).taken_back["blocks"] == 3
    done = Journal(run / "journal" / "predict").counts()["done"]
    stages = {stage.name: stage for stage in load_status(run).stages}
    assert (stages["predict"].done, stages["predict"].state) == (done, "stopped")
    report = Run(make_config(place, output={"affinities": True})).run()
    assert report.predict.blocks == 3
    assert Journal(run / "journal" / "predict").counts()["done"] == done + 3
    assert results(run) == before
    assert {"contacts", "agglomerate"} <= set(report.stitch.reused)
    whole = agq("verify", run)
    assert whole.returncode == 0, whole.stdout


def test_metadata_of_the_blocks_is_made_again(place):
    run = place / "run"
    before = results(run)
    damage(run / "data.zarr/fragments/zarr.json", "cut")
    damage(run / "data.zarr/affinities/zarr.json", "delete")
    damage(run / "data.zarr/zarr.json", "flip")
    job = Run(make_config(place, output={"affinities": True}))
    with pytest.raises(InputError, match="--repair"):
        job.run()
    assert verify_run(run, repair=True).taken_back == {"files": 3}
    job.run()
    assert results(run) == before
    assert verify_run(run).problems == []


def test_a_repair_waits_for_nobody_and_a_check_needs_no_lock(place):
    with RunFolder(place / "run").lock():
        assert verify_run(place / "run", sample=0.5).problems == []
        with pytest.raises(InputError, match="another agq process"):
            verify_run(place / "run", repair=True)


def test_an_export_refuses_a_segmentation_with_a_hole(place):
    (place / "run" / DAMAGED["segmentation"]).unlink()
    refused = agq("export", "precomputed", place / "run", place / "out")
    assert refused.returncode == 2
    assert "--repair" in refused.stderr
    assert not (place / "out").exists()


def test_a_stitch_of_fragments_of_another_model_too(tmp_path):
    rng = np.random.default_rng(0)
    fragments = rng.integers(0, 9, (4, 16, 20)).repeat(4, 2).astype(np.uint32)
    affinities = rng.integers(0, 255, (3, *fragments.shape)).astype(np.uint8)
    out = tmp_path / "out"

    def stitch() -> None:
        stitch_fragments(fragments, affinities, (30, 6, 6), out)

    stitch()
    before = results(out)
    for path in ("data.zarr/fragments/c/0/0/0", "sidecars/0000000.agqp", "lut/smallest.npy"):
        damage(out / path, "cut")
    report = verify_run(out, repair=True)
    assert {p.kind for p in report.problems} == {"fragments", "sidecars", "tables"}
    stitch()
    assert results(out) == before
    assert verify_run(out).problems == []


def test_a_packed_run_goes_on_and_refuses_blocks(place):
    run, before = place / "run", results(place / "run")
    job = Run(make_config(place, output={"affinities": True}))
    with RunFolder(run).lock():
        assert "another agq process" in agq("pack", run).stderr
    packed = agq("pack", run)
    assert packed.returncode == 0, packed.stderr
    for name in ("fragments", "affinities"):
        assert not (run / "data.zarr" / name / "c").exists()
    for journal in (run / "journal").iterdir():
        assert {file.name for file in journal.iterdir()} == {"packed.jsonl", "compact.npz"}
    assert verify_run(run).problems == []
    report = job.run()
    assert report.predict.blocks == 0
    blocks = ("data.zarr/fragments", "data.zarr/affinities")
    after = results(run)
    same = {name for name in before if not name.startswith(blocks)}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}

    damage(run / "data.zarr/fragments/0/0/0", "cut")
    assert verify_run(run, repair=True).taken_back["blocks"] > 0
    with pytest.raises(InputError, match="--undo"):
        job.run()
    undone = agq("pack", run, "--undo")
    assert undone.returncode == 0, undone.stderr
    job.run()
    assert results(run) == before
    RunFolder(run).update_stage("stitch", state="stopped")
    assert "not finished" in agq("pack", run).stderr


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        verify_run(tmp_path)
    with pytest.raises(InputError, match="--sample"):
        verify_run(tmp_path, sample=0.0)
