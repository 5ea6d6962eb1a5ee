"""Bad input is one clear line and exit code 2, before any block runs."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

from agq.blockwise.blocks.grid import BlockGrid
from agq.pipeline.cli import main as cli
from agq.pipeline.folder import RunFolder
from tests.helpers import ROOT
from tests.helpers.runs import blobs, command, environment, make_config, write_volume


def refused(main, config: Path, expected: str, command: str = "run") -> str:
    """Assert one line, exit 2, nothing computed; return the line."""
    code, _, err = main(command, config)
    assert code == 2, err
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    run_dir = Path(yaml.safe_load(config.read_text())["run_dir"])
    assert not (run_dir / "journal").exists()
    return err


def test_missing_file(main, tmp_path):
    config = make_config(tmp_path, input={"raw": {"path": "/nowhere/x.zarr", "dataset": "raw"}})
    refused(main, config, "input.raw: ")


def test_wrong_dataset_lists_what_is_there(main, tmp_path):
    raw = {"path": str(tmp_path / "in.zarr"), "dataset": "volumes/raw"}
    line = refused(main, make_config(tmp_path, input={"raw": raw}), "volumes/raw")
    assert "raw" in line.split("volumes/raw", 1)[1]


def test_raw_not_3d(main, tmp_path):
    import zarr

    zarr.create_array(tmp_path / "in.zarr", name="raw", shape=(8, 8), chunks=(8, 8), dtype="uint8")
    refused(main, make_config(tmp_path), "3-D")


def test_unsupported_dtype(main, tmp_path):
    refused(main, make_config(tmp_path, blobs((8, 8, 8)).astype(np.float64)), "float64")


def test_voxel_size_absent(main, tmp_path):
    import zarr

    zarr.create_array(
        tmp_path / "in.zarr", name="raw", shape=(8, 8, 8), chunks=(8, 8, 8), dtype="uint8"
    )
    refused(main, make_config(tmp_path), "voxel_size")


def test_voxel_size_other_than_the_config_says(main, tmp_path):
    raw = {"path": str(tmp_path / "in.zarr"), "dataset": "raw", "voxel_size": [40, 4, 4]}
    line = refused(main, make_config(tmp_path, input={"raw": raw}), "input.raw")
    assert "30" in line
    assert "40" in line


def test_truth_outside_the_roi(main, tmp_path):
    container = str(tmp_path / "in.zarr")
    write_volume(tmp_path / "in.zarr", "labels", blobs((20, 50, 70)), offset=(300, 0, 0))
    roi = {"offset": [0, 0, 0], "shape": [10, 20, 20]}
    sections = {
        "input": {"raw": {"path": container, "dataset": "raw"}, "roi": roi},
        "evaluate": {"truth": {"path": container, "dataset": "labels"}},
    }
    refused(main, make_config(tmp_path, **sections), "evaluate.truth: ")
    sections["input"]["roi"]["shape"] = [11, 20, 20]
    assert main("plan", make_config(tmp_path, **sections), "--no-time")[0] == 0


@pytest.mark.parametrize(
    ("roi", "expected"),
    [
        ({"offset": [0, 0, 0], "shape": [21, 50, 70]}, "outside the volume"),
        ({"offset": [-1, 0, 0], "shape": [5, 5, 5]}, "outside the volume"),
        ({"offset": [0, 0, 3], "shape": [30, 6, 6], "units": "world"}, "not on the voxel grid"),
        ({"offset": [0, 0, 0], "shape": [31, 6, 6], "units": "world"}, "not on the voxel grid"),
    ],
)
def test_roi(main, tmp_path, roi, expected):
    raw = {"path": str(tmp_path / "in.zarr"), "dataset": "raw"}
    refused(main, make_config(tmp_path, input={"raw": raw, "roi": roi}), expected)


def test_checkpoint_missing_corrupt_or_of_another_network(main, tmp_path):
    def config(checkpoint: Path) -> Path:
        return make_config(
            tmp_path,
            model={"factory": "agq.model.predictor:AGQPredictor", "checkpoint": str(checkpoint)},
        )

    refused(main, config(tmp_path / "none.safetensors"), "none.safetensors")
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x10\0\0\0\0\0\0\0{not json}......")
    refused(main, config(corrupt), "corrupt.safetensors")
    import torch

    other = tmp_path / "other.pth.tar"
    torch.save({"state_dict": {"module.fc.weight": torch.zeros(2, 2)}}, other)
    refused(main, config(other), "other.pth.tar")


def test_factory_that_does_not_exist(main, tmp_path):
    refused(main, make_config(tmp_path, model={"factory": "no.such:thing"}), "no.such")


def test_output_below_a_file(main, tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, run_dir=str(tmp_path / "file" / "run"))
    refused(main, config, "run_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_output_not_writable(main, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(main, make_config(tmp_path, run_dir=str(locked / "run")), "run_dir")


def test_disk_without_room(main, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(main, make_config(tmp_path), "free")


def test_disk_that_fills_up_while_writing_is_one_line(main, tmp_path):
    """The file-size limit of the process stands in for a disk that takes no more bytes."""
    config = make_config(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        code, _, err = main("predict", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1


def test_database_unreachable_hides_the_password(main, tmp_path):
    uri = "mongodb://me:hunter2@127.0.0.1:9/?serverSelectionTimeoutMS=300"
    config = make_config(tmp_path, ledger={"uri": uri, "required": True})
    line = refused(main, config, "127.0.0.1:9")
    assert "hunter2" not in line


def test_unknown_key(main, tmp_path):
    line = refused(main, make_config(tmp_path, workers={"cuont": 3}), "workers.cuont")
    assert "did you mean 'workers.count'?" in line


@pytest.mark.parametrize("command", ["predict", "plan", "stitch"])
def test_every_command_checks_the_same(main, tmp_path, command):
    config = make_config(tmp_path, input={"raw": {"path": "/nowhere/x.zarr", "dataset": "raw"}})
    refused(main, config, "input.raw: ", command)


@pytest.mark.parametrize("command", ["plan", "predict", "status", "watch", "metrics", "view"])
def test_a_name_that_is_no_text(main, tmp_path, monkeypatch, command):
    folder = tmp_path / os.fsdecode(b"of a camera \xff")
    folder.mkdir()
    config = yaml.safe_load(make_config(tmp_path).read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"run_dir": "run"}))
    monkeypatch.chdir(folder)
    what = "config.yaml" if command in ("plan", "predict") else "run"
    (folder / "run").mkdir()
    code, _, err = main(command, what)
    assert code == 2
    assert "run_dir" in err
    assert "\\udcff/run: this name is not valid UTF-8" in err
    assert err.count("\n") == 1
    assert not any((folder / "run").iterdir())


def test_an_input_whose_name_is_no_text(main, tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = make_config(tmp_path, input={"raw": {"path": "raw.zarr", "dataset": "raw"}})
    line = refused(main, config, "input.raw: path ", "plan")
    assert "\\udcff/raw.zarr: this name is not valid UTF-8" in line


@pytest.mark.parametrize("field", ["input.raw.path", "model.checkpoint"])
def test_a_home_that_nobody_has(main, tmp_path, field):
    config = make_config(tmp_path, model={"factory": "agq.model.predictor:AGQPredictor"})
    code, _, err = main("plan", config, "--set", f"{field}=~nobody-here/x")
    assert (code, err.count("\n")) == (2, 1)
    assert "~nobody-here/x: there is no such home folder" in err


@pytest.mark.parametrize("command", ["status", "watch", "view", "stitch"])
def test_commands_on_a_folder_that_is_no_run(main, tmp_path, command):
    code, _, err = main(command, tmp_path)
    assert code == 2
    assert "is not a run folder" in err


def test_help_lists_every_command(main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # each in a line
    code, out, _ = main("--help")
    assert code == 0
    for name, place in cli.COMMANDS.items():
        listed = re.search(rf"^\W*{name} +(\w+\W+\w+)", out, re.M)
        assert listed, name
        # The function or group is found under the name it is called by, and says the same itself.
        code, out_of, _ = main(name, "--help")
        assert (code, f"agq {name}" in out_of, listed[1] in out_of) == (0, True, True), place


def test_debug_shows_the_traceback_of_this_command_only(main, tmp_path, monkeypatch):
    from agq.errors import InputError

    environment = dict(os.environ)
    monkeypatch.setattr(sys, "argv", ["agq", "--debug", "status", str(tmp_path)])
    with pytest.raises(InputError):
        cli.main()
    code, _, err = main("status", tmp_path)
    assert code == 2
    assert "Traceback" not in err
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("run", "--foo"), "agq: run: No such option: --foo (see agq run --help)"),
        (("run",), "agq: run: Missing argument 'config' (see agq run --help)"),
        (("statu",), "agq: No such command 'statu'. Did you mean 'status'? (see agq --help)"),
        (("config", "explain", "acros"), "agq: there is no setting acros; did you mean across"),
        (("ledger", "sync"), "agq: ledger sync: Missing argument 'run_dir'"),
    ],
)
def test_usage_errors_are_one_line(main, words, line):
    code, _, err = main(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert line.replace("mean across", "mean stitch.across") in err


def test_warnings_of_libraries_are_for_debug_only(main, tmp_path, monkeypatch):
    from agq.pipeline.cli import config as commands

    def warn(text: str) -> None:
        warnings.showwarning(DeprecationWarning("of a library"), DeprecationWarning, "x.py", 3)

    monkeypatch.setattr(commands, "say", warn)
    assert "of a library" not in main("config", "check", make_config(tmp_path))[2]
    assert "of a library" in main("--debug", "config", "check", make_config(tmp_path))[2]


def test_a_wrong_set_names_the_option(main, tmp_path):
    config = make_config(tmp_path)
    _, _, err = main("config", "check", config, "--set", "stitch.acros=0.5")
    assert err == "agq: --set: unknown key 'stitch.acros' (did you mean 'stitch.across'?)\n"
    raw = '{"path": "x", "voxel_size": [30, 4.2, 4.2]}'
    _, _, err = main("config", "check", config, "--set", f"input.raw={raw}")
    assert err.startswith("agq: --set: input.raw.voxel_size: 4.2 is not a whole number")
    assert "input.raw.unit: angstrom" in err


def test_explain(main):
    code, out, _ = main("config", "explain", "stitch.across")
    assert code == 0
    assert out.startswith("stitch.across: number from 0 to 1; default: 0.7\n")
    _, out, _ = main("config", "explain", "stitch")
    assert "min_size" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "learning_rate" in main("config", "explain", "--train", "optimizer")[1]


def test_schema_and_check(main, tmp_path):
    code, text, _ = main("config", "schema")
    assert code == 0
    assert "run_dir" in json.loads(text)["properties"]
    code, text, _ = main("config", "check", make_config(tmp_path))
    assert code == 0
    assert text.endswith("ok\n")


def test_ctrl_c_in_a_plan_prints_no_traceback(tmp_path):
    """It reaches the process that computes the block too."""
    model = {"options": {"delay_s": 60, "state": str(tmp_path)}}
    with subprocess.Popen(
        command("plan", make_config(tmp_path, model=model)),
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while not (tmp_path / "batches").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_plan_of_a_predictor_that_ends_the_program(main, tmp_path):
    config = make_config(tmp_path, model={"factory": "tests.helpers.fakes:leaving"})
    code, _, err = main("plan", config)
    assert code == 2
    assert "could not be computed: SystemExit: no licence" in err


def test_plan_writes_no_result_and_names_the_cost(main, tmp_path):
    config = make_config(tmp_path)
    code, text, err = main("plan", config, "--json")
    assert code == 0, err
    plan = json.loads(text)
    assert plan["grid_shape"] == [3, 4, 5]
    assert (plan["blocks"], plan["todo"]) == (60, 60)
    assert plan["seconds_per_block"] > 0
    assert plan["worker_bytes"] > 1e7
    assert not (tmp_path / "run" / "data.zarr").exists()
    code, text, _ = main("plan", config, "--no-time")
    assert code == 0
    assert "60 selected" in text


def test_evaluate_locations(main, tmp_path):
    truth = np.arange(1, 9, dtype=np.uint32).reshape(2, 2, 2).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    write_volume(tmp_path / "v.zarr", "truth", truth)
    code, text, err = main(
        "evaluate", f"{tmp_path}/v.zarr::truth", f"{tmp_path}/v.zarr::truth", "--json"
    )
    assert code == 0, err
    assert json.loads(text)
    code, _, err = main("evaluate", f"{tmp_path}/v.zarr::none", f"{tmp_path}/v.zarr::truth")
    assert code == 2
    assert "truth" in err


def test_a_run_is_scored_in_its_own_unit(main, tmp_path):
    """A voxel of 4.2 nm is no whole number of nm."""
    placed = {"voxel_size": (300, 42, 42), "offset": (300, 0, 84), "unit": "angstrom"}
    truth = np.arange(1, 9, dtype=np.uint32).reshape(2, 2, 2).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    labels = truth.copy()
    labels[:2] = 9  # outside the ROI
    write_volume(tmp_path / "t.zarr", "truth", truth, **placed)
    grid = BlockGrid((8, 8, 8), (300, 42, 42), (4, 4, 4), offset=(300, 0, 84))
    run = RunFolder(tmp_path / "run")
    truth_section = {"path": str(tmp_path / "t.zarr"), "dataset": "truth", "unit": "angstrom"}
    config = {
        "run_dir": str(run.path),
        "input": {
            "raw": {"path": "raw.zarr", "unit": "angstrom"},
            "roi": {"offset": [900, 0, 84], "shape": [1800, 336, 336], "units": "world"},
        },
        "evaluate": {"truth": truth_section},
    }
    run.create(config, {"grid": grid.to_dict()})
    write_volume(run.container, "segmentation", labels, **placed)
    for given in ((), (f"{tmp_path}/t.zarr::truth",)):
        code, text, err = main("evaluate", run.path, *given, "--json")
        assert code == 0, err
        report = json.loads(text)
        assert (report["unit"], report["voxels"]) == ("angstrom", 6 * 8 * 8)
        assert report["scores"]["as_is"]["voi_sum"] == 0


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "0,6,6"])
def test_positions_that_are_not(main, tmp_path, text):
    code, _, err = main("import", "x.tif", tmp_path / "o.zarr", "--voxel-size", text)
    assert code == 2
    assert "--voxel-size" in err


def test_the_first_items_of_a_command_were_not_there_before(main, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((70, 8, 8), np.uint8))
    command = ("import", tmp_path / "a.npy", tmp_path / "o.zarr", "--voxel-size", "30,6,6")
    code, _, err = main(*command)
    assert code == 0, err
    assert err.splitlines()[0] == "import: 70 sections"
    assert "done before" not in err
    code, _, err = main("synthetic", tmp_path / "s.zarr", "--shape", "8,64,64")
    assert code == 0, err
    assert "done before" not in err


def test_volumes_of_fractional_nanometres_are_scored_without_being_asked(main, tmp_path):
    truth = np.arange(1, 9, dtype=np.uint32).reshape(2, 2, 2).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    for name, place in (
        ("truth", {"voxel_size": (300, 42, 42), "unit": "angstrom"}),
        ("labels", {"voxel_size": (30000, 4200, 4200), "offset": (0, 0, 4200), "unit": "pm"}),
        ("other", {"voxel_size": (30, 4, 4)}),
    ):
        write_volume(tmp_path / "v.zarr", name, truth, **place)
    labels, other = (f"{tmp_path}/v.zarr::{name}" for name in ("labels", "other"))
    code, text, err = main("evaluate", labels, f"{tmp_path}/v.zarr::truth", "--json")
    assert code == 0, err
    assert json.loads(text)["voxels"] == 8 * 8 * 7
    code, _, err = main("evaluate", other, f"{tmp_path}/v.zarr::truth")
    assert (code, "voxel sizes differ" in err) == (2, True)
