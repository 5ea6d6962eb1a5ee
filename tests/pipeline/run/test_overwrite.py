"""`--overwrite` deletes what a run makes, and refuses before a byte is gone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.errors import InputError
from agq.pipeline.api import Run
from agq.pipeline.folder import KEPT, RunFolder
from agq.pipeline.run.overwrite import clear
from tests.helpers.fragments import folder_bytes
from tests.helpers.runs import make_config, write_volume


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Return a folder with a whole run, with all that commands add to it."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run(make_config(folder, output={"affinities": True}))
    run.run()
    return folder


@pytest.fixture
def place(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def config_of(place: Path, **sections):
    return Run(make_config(place, **sections)).config


def test_a_run_is_deleted_but_not_what_comes_before_it(place):
    run = RunFolder(place / "run")
    for kept in ("imported/raw-1.zarr/c/0", "slurm/jobs.json"):
        (run.path / kept).parent.mkdir(parents=True, exist_ok=True)
        (run.path / kept).write_bytes(b"x")
    for made in (
        "sweep.json", "baseline.json", "baseline.png", "report.html", "retries/predict/3",
        "logs/predict/worker-0.log.1", "lut/cut/0/0-0-0.npz", "journal/predict/compact.npz",
        "data.zarr/fragments/c/0/0/0.0123456789abcdef0123456789abcdef.partial",
        "sidecars/0000000/.7.agqs.0123456789abcdef.tmp",
        "baselines/watershed-0a1b2c3d/data.zarr/fragments/c/0/0/0",
    ):  # fmt: skip
        (run.path / made).parent.mkdir(parents=True, exist_ok=True)
        (run.path / made).write_bytes(b"x")
    clear(run, config_of(place))
    assert {entry.name for entry in run.path.iterdir()} <= set(KEPT)
    assert (run.path / "imported/raw-1.zarr/c/0").exists()
    run.create({}, {"other": 1})


FOREIGN = [
    "thesis.tex", "raw.zarr/zarr.json", "data.zarr/raw/zarr.json", "data.zarr/raw/c/0/0/0",
    "data.zarr/fragments/notes.txt", "sidecars/mask.tif", "logs/data.h5", "weights.safetensors",
    "journal/predict/copy/raw.npy", "lut/segments.csv", "stitch/raw.json", "runs/other/run.json",
    "contacts/0/0-0-0.npz.bak", "baselines/raw.zarr/0/0", "other.png",
]  # fmt: skip


@pytest.mark.parametrize("path", FOREIGN)
def test_what_the_run_did_not_make_is_refused_and_all_stays(place, path):
    file = place / "run" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"precious")
    before = folder_bytes(place / "run")
    with pytest.raises(InputError, match="was not made by the run"):
        clear(RunFolder(place / "run"), config_of(place))
    assert folder_bytes(place / "run") == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abcz019.-_", min_size=1, max_size=9), min_size=1, max_size=4))
def test_no_other_name_passes(finished, parts):
    """Whatever a user may call a file, only the names of the list are deleted."""
    if any(part in (".", "..") for part in parts) or parts[0] in KEPT:
        return
    file = finished / "run" / "/".join(parts)
    if file.exists() or any(parent.is_file() for parent in file.parents):
        return
    new = next(p for p in reversed([file, *file.parents]) if not p.exists())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"precious")
    try:
        with pytest.raises(InputError, match="was not made by the run"):
            clear(RunFolder(finished / "run"), config_of(finished))
        assert file.read_bytes() == b"precious"
    finally:
        file.unlink()
        if new.is_dir():
            shutil.rmtree(new)


@pytest.mark.parametrize("path", ["data.zarr", "data.zarr/fragments/c/0", "logs/here", "sidecars"])
def test_links_are_refused_and_what_they_name_stays(place, path):
    link, away = place / "run" / path, place / "elsewhere"
    if link.exists():
        link.rename(away)
    else:
        away.mkdir()
        (away / "file.log").write_bytes(b"precious")
    link.symlink_to(away)
    before = folder_bytes(away)
    with pytest.raises(InputError, match="is a link"):
        clear(RunFolder(place / "run"), config_of(place))
    assert folder_bytes(away) == before
    assert link.is_symlink()


def test_inputs_that_the_run_made_are_refused(place):
    """A segmentation of this run as mask, and a checkpoint among the logs."""
    before = folder_bytes(place / "run")
    run = RunFolder(place / "run")
    for sections in (
        {"input": {"mask": {"path": str(run.container), "dataset": "segmentation"}}},
        {"evaluate": {"truth": {"path": str(run.container), "dataset": "fragments"}}},
    ):
        with pytest.raises(InputError, match="is named by"):
            clear(run, config_of(place, **sections))
    (place / "same").symlink_to(run.path)
    mask = {"mask": {"path": str(place / "same" / "data.zarr"), "dataset": "segmentation"}}
    with pytest.raises(InputError, match="is named by"):
        clear(run, config_of(place, input=mask))
    assert folder_bytes(run.path) == before


def test_a_folder_that_holds_more_than_the_run_is_refused(tmp_path):
    """The folder of the raw as run folder, or a parent of runs: refused by the first command."""
    write_volume(tmp_path / "in.zarr", "raw", np.zeros((4, 8, 8), np.uint8))
    run = RunFolder(tmp_path)
    run.path.joinpath("run.json").write_text('{"format": 1, "name": "x"}')
    before = folder_bytes(tmp_path / "in.zarr")
    with pytest.raises(InputError, match=r"in\.zarr is named by input\.raw\.path"):
        clear(run, config_of(tmp_path, run_dir=str(tmp_path)))
    assert folder_bytes(tmp_path / "in.zarr") == before
