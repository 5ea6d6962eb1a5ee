"""`agq stitch`: edits and ids that outlast it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

import agq
from agq.pipeline.folder import RunFolder
from tests.helpers.runs import environment, write_volume

SHAPE = (18, 40, 50)  # two blocks
CORNERS = {1: "0 60 60", 2: "0 180 60", 3: "0 60 240", 4: "510 180 240"}
"""A point of each fragment, in nm."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four fragments, of which 1 and 2, and 3 and 4, are one object."""
    folder = tmp_path_factory.mktemp("finished")
    fragments = np.ones(SHAPE, np.uint32)
    fragments[:, 20:] = 2
    fragments[:, :, 25:] += 2
    write_volume(folder / "in.zarr", "fragments", fragments)
    affinities = np.full((3, *SHAPE), 255, np.uint8)
    affinities[:, :, :, 25] = 0
    array = zarr.create_array(str(folder / "in.zarr" / "affinities"), data=affinities)
    array.attrs.update({"voxel_size": [30, 6, 6], "offset": [0, 0, 0], "units": ["nm"] * 3})
    where = folder / "in.zarr"
    agq.stitch_fragments(f"{where}::fragments", f"{where}::affinities", None, folder / "run")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def segments(run) -> list[int]:
    """Return the segments of the four fragments."""
    data = zarr.open_group(str(run / "data.zarr"))["segmentation/s0"][:]
    corners = [data[0, 10, 10], data[0, 30, 10], data[0, 10, 40], data[17, 30, 40]]
    return [int(value) for value in corners]


def edits_of(tmp_path, *rows):
    file = tmp_path / "my edits: first.csv"
    lines = [f"{kind},{CORNERS[a]},{CORNERS[b]}" for kind, a, b in rows]
    file.write_text("\n".join(["kind,a,b", *lines]))
    return file


def test_edits_stay_until_they_are_dropped(run, tmp_path, main):
    assert segments(run) == [1, 1, 2, 2]
    file = edits_of(tmp_path, ("split", 1, 2), ("merge", 4, 1))
    code, text, _ = main("stitch", run, "--edits", file)
    assert code == 0
    assert "1 merge, 1 split" in text
    # 3 likes 4 as before, and 2 may not follow 1.
    assert segments(run) == [1, 2, 1, 1]
    assert (run / "edits.csv").read_bytes() == file.read_bytes()
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["stitch"]["edits"] == "{run_dir}/edits.csv"
    assert len(record["stages"]["stitch"]["report"]["edits"]["sha256"]) == 64
    file.unlink()
    moved = run.rename(tmp_path / "moved")
    for again in ((), ("--margin", "0.02"), ("--set", "stitch.min_size=5")):
        assert main("stitch", moved, *again)[0] == 0
        assert segments(moved) == [1, 2, 1, 1]
    assert main("stitch", moved, "--no-edits")[0] == 0
    assert segments(moved) == [1, 1, 2, 2]
    assert RunFolder(moved).config()["stitch"]["edits"] is None
    assert main("stitch", moved)[0] == 0
    assert segments(moved) == [1, 1, 2, 2]


def test_edits_that_cannot_be_applied_are_one_line(run, tmp_path, main):
    file = edits_of(tmp_path, ("split", 1, 2), ("merge", 1, 2))
    for options, message in (
        (("--edits", file), "line 2: the split of fragments 1 and 2 contradicts"),
        (("--edits", file, "--no-edits"), "--edits and --no-edits exclude each other"),
        (("--edits", tmp_path / "none.csv"), "none.csv: no such file"),
    ):
        code, _, error = main("stitch", run, *options)
        assert code == 2
        assert message in error
        assert "Traceback" not in error
    assert main("stitch", run, "--no-edits")[0] == 0
    assert segments(run) == [1, 1, 2, 2]


def test_ids_stay(run, tmp_path, main):
    file = edits_of(tmp_path, ("split", 1, 2))
    code, text, _ = main("stitch", run, "--edits", file, "--ids", "keep")
    assert code == 0
    assert segments(run) == [3, 4, 2, 2]
    assert "1 as before, 2 new" in text
    assert "1 -> 3, 4" in text
    # It is a setting of the run from then on.
    assert main("stitch", run, "--no-edits")[0] == 0
    assert segments(run) == [5, 5, 2, 2]
    assert main("verify", run)[0] == 0
    assert main("stitch", run, "--ids", "consecutive")[0] == 0
    assert segments(run) == [1, 1, 2, 2]


def test_a_stitch_that_has_nothing_to_do_starts_no_process_and_loads_little(run):
    code = """
import sys
from agq.pipeline.cli.main import app
try:
    app(["stitch", sys.argv[1], "--set", "stitch.dask.workers=1"])
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", *sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, run],
        env={**environment(), "AGQ_MONGO_URI": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "contacts, agglomerate, lut, relabel, pyramid" in done.stdout
    words = done.stdout.splitlines()[-1].split()
    assert words[0] == "loaded:"
    heavy = {"torch", "pandas", "pymongo", "matplotlib", "daisy", "neuroglancer", "sklearn"}
    heavy |= {"h5py", "skimage"}
    # Without which no process of a worker is started.
    heavy |= {"dask", "distributed"}
    assert not {word.partition(".")[0] for word in words} & heavy
