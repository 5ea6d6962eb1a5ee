"""Image files on the command line: stacks with gaps, and truth in files of other programs."""

import json

import h5py
import numpy as np
import tifffile

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.open import open_volume
from agq.pipeline.folder import RunFolder
from tests.helpers.runs import write_volume


def test_a_gap_is_named_and_filled_when_allowed(main, tmp_path):
    sections = np.random.default_rng(0).integers(1, 250, (5, 16, 16)).astype(np.uint8)
    (tmp_path / "stack").mkdir()
    for number in (1, 2, 9, 10):
        tifffile.imwrite(tmp_path / "stack" / f"z{number}.tif", sections[number // 3])
    command = ("import", tmp_path / "stack", tmp_path / "o.zarr", "--voxel-size", "30,6,6")
    code, _, err = main(*command)
    assert code == 2
    assert "--allow-gaps" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "o.zarr" / "raw").exists()
    code, _, err = main(*command, "--allow-gaps", "--gap-value", "7")
    assert code == 0, err
    raw = open_volume(tmp_path / "o.zarr", "raw")
    read = raw.read((0, 0, 0), raw.shape)
    assert read.shape == (10, 16, 16)
    assert (read[2:8] == 7).all()
    assert (read[[0, 1, 8, 9]] == sections[[0, 0, 3, 3]]).all()


def test_an_import_is_complete_leaves_nothing_or_leads_to_the_unit(main, tmp_path):
    stack = tmp_path / "stack"
    stack.mkdir()
    for number in range(3):
        tifffile.imwrite(stack / f"z{number}.tif", np.full((64, 64), 9, np.uint8))
    command = ("import", stack, tmp_path / "o.zarr", "--voxel-size")
    whole = (stack / "z1.tif").read_bytes()
    (stack / "z1.tif").write_bytes(whole[:2000])
    assert main(*command, "30,6,6")[0] == 2
    assert not (tmp_path / "o.zarr").exists()
    (stack / "z1.tif").write_bytes(whole)
    _, _, err = main(*command, "30,4.2,4.2")
    assert "write --voxel-size 300,42,42 --unit angstrom" in err
    finer = (*command, "300,42,42", "--unit", "angstrom")
    assert main(*finer)[1].startswith("wrote ")
    assert main(*finer)[1].startswith("complete already: ")


def test_a_run_is_scored_with_a_truth_in_a_file(main, tmp_path):
    truth = np.arange(1, 9, dtype=np.uint32).reshape(2, 2, 2).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    labels = truth.copy()
    labels[:, :2, :2] = 9
    run = RunFolder(tmp_path / "run")
    grid = BlockGrid((8, 8, 8), (30, 6, 6), (4, 4, 4))
    run.create(
        {"run_dir": str(run.path), "input": {"raw": {"path": "raw.zarr"}}}, {"grid": grid.to_dict()}
    )
    write_volume(run.container, "segmentation", labels)
    marked = truth.astype(np.int64)
    marked[:, :2, :2] = -1
    with h5py.File(tmp_path / "truth.h5", "w") as file:
        file["labels"] = marked
        file["labels"].attrs["resolution"] = (30, 6, 6)
    command = ("evaluate", run.path, f"{tmp_path}/truth.h5::labels", "--json")
    code, text, err = main(*command)
    assert code == 0, err
    assert json.loads(text)["scores"]["as_is"]["voi_sum"] == 0
    code, text, err = main(*command, "--ignore-labels", "-1")
    assert code == 0, err
    assert json.loads(text)["voxels"] == 8 * 8 * 8 - 8 * 2 * 2
    code, _, err = main(*command, "--ignore-labels", "all")
    assert (code, "--ignore-labels" in err) == (2, True)
