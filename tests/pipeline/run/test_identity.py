"""A run goes on with inputs that hold the same, wherever they lie, and with no others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr

from agq.blockwise.journal.reader import Journal
from agq.errors import InputError
from agq.pipeline.api import Run
from agq.pipeline.config.schema import Config, load_config
from agq.pipeline.folder import RunFolder, identity_hash
from agq.pipeline.run.identity import new_makers
from agq.pipeline.run.plan import make_plan
from agq.pipeline.run.prepare import Prepared, prepare, prepare_stitch
from agq.pipeline.run.session import open_session
from tests.helpers.runs import blobs, make_config, write_volume

DATA = blobs((20, 50, 70))


def go_on(config: Config) -> dict:
    """Open the run as a command does, and return its record."""
    prepared = prepare(config)
    with open_session(prepared, on_progress=None):
        return prepared.run.record()


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with a run that has begun."""
    folder = tmp_path / "proj"
    folder.mkdir()
    go_on(load_config(make_config(folder, DATA)))
    return folder


def change(volume: Path, place: tuple = (0, 0, 0)) -> None:
    array = zarr.open_array(volume, mode="r+")
    array[place] = 255 - int(array[place])


def test_a_volume_changed_in_place_is_refused(project):
    config = load_config(project / "config.yaml")
    change(project / "in.zarr" / "raw", (3, 40, 60))
    with pytest.raises(InputError, match=r"input\.raw: .*in\.zarr:raw has changed.*voxels \(0, 32"):
        go_on(config)
    with pytest.raises(InputError, match=r"input\.raw"):
        make_plan(prepare(config), time_block=False)
    change(project / "in.zarr" / "raw", (3, 40, 60))
    go_on(config)


def test_a_moved_project_goes_on_also_through_a_link_at_its_old_place(project):
    moved = project.rename(project.with_name("proj2"))
    project.symlink_to(moved)
    go_on(load_config(project / "config.yaml"))
    values = yaml.safe_load((moved / "config.yaml").read_text().replace("/proj/", "/proj2/"))
    go_on(Config.model_validate(values))
    project.unlink()
    record = go_on(Config.model_validate(values))
    assert record["config"]["input"]["raw"]["path"] == str(moved / "in.zarr")
    # A copy of the array alone, under another name.
    shutil.copytree(moved / "in.zarr" / "raw", moved / "em.zarr")
    values["input"]["raw"] = {"path": str(moved / "em.zarr")}
    go_on(Config.model_validate(values))


def test_a_run_of_an_earlier_release_goes_on_and_records_what_its_inputs_hold(project):
    run = RunFolder(project / "run")
    record = json.loads(run.record_path.read_text())
    contents = record.pop("contents")
    for later in ("files", "made_with"):
        record.pop(later, None)
    # Where the earlier release found its input.
    record["identity"]["raw"]["path"] = "/data/of/then.zarr"
    record["identity_hash"] = identity_hash(record["identity"])
    run.record_path.write_text(json.dumps(record))
    assert go_on(load_config(project / "config.yaml"))["contents"] == contents
    change(project / "in.zarr" / "raw")
    with pytest.raises(InputError, match=r"input\.raw"):
        go_on(load_config(project / "config.yaml"))


def test_what_lies_in_the_run_folder_moves_with_it(tmp_path):
    run = tmp_path / "run"
    write_volume(run / "imported" / "mine.zarr", "raw", DATA)
    raw = {"path": str(run / "imported" / "mine.zarr"), "dataset": "raw"}
    go_on(load_config(make_config(tmp_path, DATA, input={"raw": raw})))
    assert '"path": "{run_dir}/imported/mine.zarr"' in (run / "run.json").read_text()
    moved = run.rename(tmp_path / "elsewhere")
    again = Run(moved)
    assert again.config.input.raw.path == str(moved / "imported" / "mine.zarr")
    go_on(again.config)


def test_a_stitch_opens_no_input(project):
    shutil.rmtree(project / "in.zarr")
    for config in (Run(project / "run").config, load_config(project / "config.yaml")):
        prepared = prepare_stitch(config)
        assert prepared.raw is None
        assert prepared.selected.size == prepared.grid.n_blocks
        with open_session(prepared, on_progress=None):
            pass
    other = load_config(project / "config.yaml", ["blocks.read_shape=[9,33,33]"])
    with pytest.raises(InputError, match=r"input\.raw.*no such file"):
        prepare_stitch(other)


def test_another_configuration_is_compared_before_a_stitch(project):
    other = load_config(project / "config.yaml", ["blocks.read_shape=[9,33,33]"])
    with (
        pytest.raises(InputError, match=r"grid\.write_shape"),
        open_session(prepare_stitch(other), on_progress=None),
    ):
        pass


def test_files_that_options_name_count_by_their_content(tmp_path):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")
    model = {"options": {"state": str(weights), "threshold": 130}}
    config = make_config(tmp_path, DATA, model=model)
    go_on(load_config(config))
    moved = weights.rename(tmp_path / "moved.bin")
    other = load_config(config, [f"model.options.state={moved}"])
    go_on(other)
    moved.write_bytes(b"two")
    with pytest.raises(InputError, match=r"model\.options: state .*moved\.bin has changed"):
        go_on(other)
    with pytest.raises(InputError, match=r"model\.options\.threshold: 130 -> 131"):
        go_on(load_config(config, ["model.options.threshold=131"]))


def test_a_changed_truth_is_told_and_scored_anew(tmp_path):
    write_volume(tmp_path / "in.zarr", "labels", np.digitize(DATA, (60, 120)).astype(np.uint32))
    truth = {"path": str(tmp_path / "in.zarr"), "dataset": "labels"}
    config = load_config(make_config(tmp_path, DATA, evaluate={"truth": truth}))
    go_on(config)
    change(tmp_path / "in.zarr" / "labels")
    go_on(config)


def test_other_software_is_told_once_and_recorded(project, monkeypatch):
    prepared = prepare(load_config(project / "config.yaml"))

    def makers(prepared: Prepared, device: str | None, **versions: str) -> list[str]:
        monkeypatch.setattr("agq.pipeline.run.identity.versions", lambda _: versions)
        return new_makers(prepared, device)

    # On a cluster the device is known afterwards.
    assert makers(prepared, None, torch="2.5.1", scipy="1") == []
    assert makers(prepared, "cuda", torch="2.5.1", scipy="1") == []
    assert makers(prepared, None, torch="2.5.1", scipy="1") == []
    changed = makers(prepared, "cpu", torch="2.6.0", scipy="1")
    assert changed == ["torch 2.5.1 -> 2.6.0", "device cuda -> cpu"]
    assert makers(prepared, "cpu", torch="2.6.0", scipy="1") == []
    kept = prepared.run.record()["made_with"]
    assert [(entry["torch"], entry["device"]) for entry in kept] == [
        ("2.5.1", "cuda"),
        ("2.6.0", "cpu"),
    ]


def test_a_worker_that_finds_other_voxels_or_weights_ends_the_run_with_one_line(tmp_path):
    weights = tmp_path / "weights.bin"
    weights.write_bytes(b"one")
    model = {"options": {"weights": str(weights)}, "factory": "tests.helpers.fakes:reading"}
    file = make_config(tmp_path, DATA, model=model, workers={"count": 1})
    job = Run(file)
    with job._open():
        change(tmp_path / "in.zarr" / "raw")
        with pytest.raises(InputError, match=r"input\.raw: .* has changed"):
            job.predict()
        log = (tmp_path / "run" / "logs" / "predict" / "worker-0.log").read_text()
        assert "cannot start: input.raw: " in log.splitlines()[-1]
        assert "Traceback" not in log
        change(tmp_path / "in.zarr" / "raw")
        weights.write_bytes(b"two")
        with pytest.raises(
            InputError, match=r"weights .*weights\.bin is not the file that the run"
        ):
            job.predict()


def test_blocks_of_a_session_whose_input_changed_are_taken_back(tmp_path):
    """A worker that has opened the volume reads what is there: the end of the prediction tells."""
    roi = {"offset": [0, 0, 0], "shape": [10, 10, 40]}
    raw = {"path": str(tmp_path / "in.zarr"), "dataset": "raw"}
    file = make_config(tmp_path, DATA, input={"raw": raw, "roi": roi}, workers={"count": 1})
    changed = []

    def tell(step: str, done: int, total: int) -> None:
        if done and not changed:
            changed.append(change(tmp_path / "in.zarr" / "raw", (19, 49, 69)))

    with pytest.raises(InputError, match=r"input\.raw: .* has changed since the run began"):
        Run(file, on_progress=tell).predict()
    assert Journal(tmp_path / "run" / "journal" / "predict").counts()["done"] == 0
