"""The folder of a stitch of another model's fragments is a run to every command."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import neuroglancer
import numpy as np
import pytest
import zarr

import agq
from agq.blockwise.journal.reader import Journal
from agq.pipeline.cli.main import COMMANDS
from agq.pipeline.folder import RunFolder
from tests.helpers.fragments import folder_bytes
from tests.helpers.runs import blobs, write_volume

SHAPE = (18, 40, 50)  # two blocks


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stitch of two slabs that are one object, and nothing of raw."""
    folder = tmp_path_factory.mktemp("joined")
    fragments = np.ones(SHAPE, np.uint32)
    fragments[:, 20:] = 2
    fragments[:, :, 25:] += 2
    write_volume(folder / "in.zarr", "fragments", fragments)
    write_volume(folder / "in.zarr", "raw", blobs(SHAPE))
    write_volume(folder / "in.zarr", "truth", 1 + (fragments > 2))
    affinities = np.full((3, *SHAPE), 255, np.uint8)
    affinities[:, :, :, 25] = 0
    array = zarr.create_array(str(folder / "in.zarr" / "affinities"), data=affinities)
    array.attrs.update({"voxel_size": [30, 6, 6], "offset": [0, 0, 0], "units": ["nm"] * 3})
    report = agq.stitch_fragments(
        f"{folder / 'in.zarr'}::fragments",
        f"{folder / 'in.zarr'}::affinities",
        None,
        folder / "run",
        evaluate={"truth": {"path": str(folder / "in.zarr"), "dataset": "truth"}},
    )
    assert report.segments == 2
    return folder / "run"


RUN = "RUN"
WORK = {
    "status": ((RUN,), "done"),
    "watch": ((RUN,), "done"),
    "metrics": ((RUN,), 'agq_blocks{run="run"'),
    "verify": ((RUN,), "missing or different  0"),
    "view": ((RUN, "--print-state", "--base-url", "https://host/run"), "segmentation"),
    "snapshot": ((RUN, "--out", "OUT/small.png"), "wrote"),
    "report": ((RUN, "--out", "OUT/small.html"), "wrote"),
    "evaluate": ((RUN,), "adapted Rand error"),
    "sweep": ((RUN, "--across", "0.5", "--within", "0.5"), "0.5"),
    "stitch": ((RUN, "--threshold", "0.6"), "2"),
    "export": (("precomputed", RUN, "OUT/precomputed"), "wrote"),
    "suspects": ((RUN,), "the first 3 of 3 suspects"),
    "calibrate": ((RUN,), "held"),
    "pack": ((RUN,), "packed"),
    "ledger": (("sync", RUN), "delivered"),
}
"""Commands, their arguments, and a word of what they say."""

REFUSE = {
    "predict": ("CONFIG", "agq stitch joins them"),
    "run": ("CONFIG", "agq stitch joins them"),
    "plan": ("CONFIG", "agq stitch joins them"),
    "baseline": (("watershed", RUN), "keeps no affinities"),
    "notify": (RUN, "notify names neither a command nor a webhook"),
    "attach": (RUN, "not submitted"),
    "scale": ((RUN, "1"), "not submitted"),
    "cancel": (RUN, "not submitted"),
    "resume": (RUN, "not submitted"),
}
"""Commands of predictions and of jobs, and what they say in one line."""

ELSEWHERE = {
    # No run is their argument.
    *("skeletons", "import", "synthetic", "train", "checkpoint", "config"),
    "dashboard",  # below: it serves
    "submit",  # asks SLURM first
    "worker",  # waits for a coordinator
    "logs",  # a run that nobody submitted has those of local workers, if any
}


def test_every_command_is_tried() -> None:
    assert {*WORK, *REFUSE, *ELSEWHERE} == set(COMMANDS)


@pytest.mark.parametrize("name", WORK)
def test_commands_work(name, joined, main, tmp_path, request) -> None:
    if name == "ledger":
        request.getfixturevalue("monkeypatch").setenv(
            "AGQ_MONGO_URI", request.getfixturevalue("mongo_uri")
        )
    arguments, word = WORK[name]
    places = {RUN: str(joined), "OUT": str(tmp_path)}
    words = [places.get(w) or w.replace("OUT", str(tmp_path)) for w in arguments]
    code, said, error = main(name, *words)
    assert code == 0, error
    assert word in said, said


@pytest.mark.parametrize("name", REFUSE)
def test_commands_of_predictions_and_jobs_refuse(name, joined, main, tmp_path) -> None:
    arguments, message = REFUSE[name]
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(RunFolder(joined).record()["config"]))
    places = {RUN: str(joined), "CONFIG": str(config)}
    words = [arguments] if isinstance(arguments, str) else arguments
    code, _, error = main(name, *(places.get(w, w) for w in words))
    assert code == 2, error
    assert message in error.splitlines()[-1]


def test_the_page_shows_it(joined) -> None:
    from agq.pipeline.dashboard.runs import Runs

    runs = Runs([joined])
    (line,) = runs.listing()
    assert line["state"] == "done"
    assert runs.view(line["key"]).overview(patience_s=None)["states"][2] == 2


def test_raw_and_a_yaml_file_may_come_later(joined, main, tmp_path) -> None:
    """What was stitched without raw is shown over it once it is named."""
    run = tmp_path / "run"
    shutil.copytree(joined, run)
    code, _, error = main(
        "stitch", run, "--set", f"input.raw.path={joined.parent / 'in.zarr'}",
        "--set", "input.raw.dataset=raw",
    )  # fmt: skip
    assert code == 0, error
    state = main(
        "view", run, "--print-state", "--base-url", "https://h/r", "--raw-url", "https://h/raw"
    )
    assert '"raw"' in state[1]
    assert main("snapshot", run, "--out", tmp_path / "with-raw.png")[0] == 0
    assert main("snapshot", joined, "--out", tmp_path / "without.png")[0] == 0
    sizes = [(tmp_path / f"{name}.png").stat().st_size for name in ("with-raw", "without")]
    assert sizes[0] > sizes[1]
    assert agq.Run(run).raw().shape == SHAPE
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(RunFolder(run).record()["config"]))
    code, _, error = main("stitch", config, "--set", f"run_dir={tmp_path / 'other'}")
    assert code == 0, error
    assert (tmp_path / "other" / "lut" / "segments.parquet").is_file()


def test_a_graph_for_viewers(joined: Path, tmp_path: Path, main: Callable) -> None:
    out, base = tmp_path / "graph", ("--base-url", "https://host/run")
    code, text, _ = main("export", "graph", joined, out, "--webknossos", *base)
    assert code == 0
    assert "neuroglancer.json" in text
    assert "edges inside segments" in text
    state = json.loads((out / "neuroglancer.json").read_text())
    layers = {layer["name"]: layer for layer in state["layers"]}
    source = layers["fragments"]["source"][0]["url"]
    assert source == "zarr3://https://host/run/data.zarr/fragments/"
    assert (layers["fragments"]["visible"], layers["segmentation"]["visible"]) == (True, False)
    pieces = [(block << 21) | label for label in (1, 2, 3, 4) for block in (0, 1)]
    parsed = neuroglancer.ViewerState(state).layers["fragments"].layer.equivalences
    assert {frozenset(group) for group in parsed.to_json()} == {
        frozenset(group) for group in (pieces[:4], pieces[4:])
    }
    attachment = zarr.open_group(str(out / "webknossos" / "fragments" / "agglomerates"))
    of = attachment["segmentation/segment_to_agglomerate"][:]
    assert of.tolist() == [0, 1, 1, 2, 2, 1, 1, 2, 2]
    # Inside a block a contact, and a merge for the second piece of each fragment.
    assert len(attachment["segmentation/agglomerate_to_edges"][:]) == 8
    # Of a region, the fragments in it.
    roi = ("--roi", "0:4,0:40,0:50")
    assert main("export", "graph", joined, tmp_path / "part", *roi, *base)[0] == 0
    state = json.loads((tmp_path / "part" / "neuroglancer.json").read_text())
    layers = {layer["name"]: layer for layer in state["layers"]}
    assert sorted(layers["fragments"]["equivalences"]) == [["1", "2"], ["3", "4"]]
    assert state["position"] == [25.5, 20.5, 2.5]
    for options, message in (
        ((*roi, "--webknossos"), "--webknossos takes the whole run"),
        (("--raw-url", "https://host/raw"), "--raw-url goes with --base-url"),
    ):
        code, _, error = main("export", "graph", joined, tmp_path / "no", *options)
        assert (code, message in error) == (2, True)


def test_a_small_export_is_made_here_unless_workers_are_named(joined, tmp_path, main):
    made, pids = [], []
    for name, options in (("here", ()), ("workers", ("--workers", "1"))):
        out = tmp_path / name
        code, _, said = main("export", "precomputed", joined, out, "--meshes", *options)
        assert code == 0, said
        journals = [Journal(out / ".agq-export/journal" / part) for part in (".", "meshes")]
        (pid,) = {w.info.pid for journal in journals for w in journal.workers.values()}
        pids.append(pid)
        made.append({f: d for f, d in folder_bytes(out).items() if "/journal/" not in f})
    assert made[0] == made[1]
    assert pids[0] == os.getpid() != pids[1]
