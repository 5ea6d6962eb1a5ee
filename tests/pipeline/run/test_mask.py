"""A mask hides voxels: what is shown is the same whatever the blocks are."""

import json
from dataclasses import replace
from pathlib import Path

import cc3d
import numpy as np
import pytest
import zarr

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.block_threads import BlockFiles
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.volumes.create import open_array
from agq.errors import InputError
from agq.pipeline.api import Run, stitch_fragments
from agq.pipeline.config.recorded import read_target
from agq.pipeline.config.schema import load_config
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.prepare import prepare
from agq.pipeline.run.session import open_session
from tests.helpers import fakes
from tests.helpers.fragments import same_partition
from tests.helpers.predict_runs import OFFSET, SHAPE, make_grid, make_run, raw_volume
from tests.helpers.runs import agq, blobs, make_config, results, write_volume

BLOCKS = [(4, 16, 16), (11, 37, 40), (5, 9, 20)]


@pytest.fixture(scope="module")
def client():
    with dask_client(DaskSettings(workers=1), processes=False) as made:
        yield made


def run_blocks(folder: Path, raw: np.ndarray, mask: dict, write, client) -> Path:
    """Predict every block with the mask, in this process, and stitch."""
    grid = make_grid(raw.shape, write_shape=write, before=(1, 1, 1))
    spec = make_run(folder, raw, grid).model_copy(update={"mask": mask})
    run_dir = Path(spec.run_dir)
    files = BlockFiles.open(spec, run_dir)
    with JournalWriter(run_dir / "journal" / "predict", this_worker("here")) as journal:
        for number in range(grid.n_blocks):
            (prediction,) = fakes.threshold().predict([files.read(number)])
            sums = files.write(number, prediction, files.tissue(number))
            journal.finish(BlockRecord(number, "done", sums=sums))
    run_stitch(StitchSpec(run_dir=run_dir, grid=grid.to_dict()), client)
    return run_dir


@pytest.mark.parametrize("step", [(30, 6, 6), (90, 24, 18), (20, 4, 5)])
def test_the_visible_part_is_the_same_for_any_blocks(tmp_path, client, step):
    raw = raw_volume()
    extent = [n * s for n, s in zip(SHAPE, (30, 6, 6), strict=True)]
    rng = np.random.default_rng(1)
    coarse = rng.random([-(-n // s) for n, s in zip(extent, step, strict=True)]) < 0.8
    coarse[:, :, coarse.shape[2] // 2] = False  # a hidden wall right through
    write_volume(tmp_path / "m.zarr", "m", coarse.astype(np.uint8), voxel_size=step, offset=OFFSET)
    centres = [
        ((2 * np.arange(n) + 1) * s) // (2 * t)
        for n, s, t in zip(SHAPE, (30, 6, 6), step, strict=True)
    ]
    shown = coarse[np.ix_(*centres)]
    expected = cc3d.connected_components((raw > 128) & shown, connectivity=6)
    assert not same_partition(
        expected, cc3d.connected_components(raw > 128, connectivity=6) * shown
    )
    kept = []
    for write in BLOCKS:
        mask = {"path": str(tmp_path / "m.zarr"), "dataset": "m"}
        run_dir = run_blocks(tmp_path / str(write), raw, mask, write, client)
        found = open_array(run_dir / "data.zarr", "segmentation/s0", "r")[:]
        assert not found[~shown].any()
        assert same_partition(found, expected)
        affinities = open_array(run_dir / "data.zarr", "affinities", "r")[:]
        assert not affinities[:, ~shown].any()
        # Where a window begins, the fake predictor compares with the window's end.
        kept.append(affinities[:, 1:, 1:, 1:])
    assert all(np.array_equal(kept[0], other) for other in kept[1:])


def _stitch_with_classes(folder: Path, fragments: np.ndarray) -> None:
    """Name classes in a later stitch: blocks are not predicted again."""
    classes = np.ones((1, 10, 1), np.uint8)
    classes[:, 5:] = 2
    write_volume(folder / "in.zarr", "classes", classes, voxel_size=(600, 30, 420))
    named = [
        f"input.classes.{n}={v}" for n, v in (("path", folder / "in.zarr"), ("dataset", "classes"))
    ]
    sets = [part for name in named for part in ("--set", name)]
    done = agq("stitch", folder / "run", *sets)
    assert done.returncode == 0, done.stderr
    report = RunFolder(folder / "run").record()["stages"]["stitch"]["report"]
    assert report["classed"] == report["fragments"]
    assert report["forbidden_contacts"] > 0
    assert "contacts kept apart" in done.stdout
    segments = open_array(folder / "run" / "data.zarr", "segmentation/s0", "r")[:]
    at = np.broadcast_to((np.arange(50) >= 25)[:, None], fragments.shape)
    sides: dict[int, set[bool]] = {}
    for fragment in np.unique(fragments[fragments > 0]):
        voxels = fragments == fragment
        share = at[voxels].mean()
        if share != 0.5:
            sides.setdefault(int(segments[voxels][0]), set()).add(share > 0.5)
    assert all(len(side) == 1 for side in sides.values())
    far = agq("stitch", folder / "run", *sets, "--set", "input.classes.offset=[90000000,0,0]")
    assert far.returncode == 2
    assert "input.classes" in far.stderr


@pytest.mark.slow
def test_a_run_hides_voxels_and_one_of_an_earlier_release_goes_on(tmp_path):
    """At the edge of a coarse mask that cuts blocks; then with the record of an earlier release."""
    data = blobs((20, 50, 70))
    mask = np.zeros((4, 10, 14), np.uint8)
    mask[:, :, :5] = 1
    write_volume(tmp_path / "in.zarr", "raw", data)
    write_volume(tmp_path / "in.zarr", "mask", mask, voxel_size=(150, 30, 30))
    container = str(tmp_path / "in.zarr")
    sections = {
        "raw": {"path": container, "dataset": "raw"},
        "mask": {"path": container, "dataset": "mask"},
    }
    config = make_config(tmp_path, input=sections)
    assert json.loads(agq("plan", config, "--json", "--no-time").stdout)["masked"] > 0
    done = agq("run", config)
    assert done.returncode == 0, done.stderr
    status = json.loads(agq("status", tmp_path / "run", "--json").stdout)
    assert '"skipped":' in json.dumps(status)
    run = RunFolder(tmp_path / "run")
    segments = open_array(run.container, "segmentation/s0", "r")[:]
    fragments = open_array(run.container, "fragments", "r")[:]
    assert segments[:, :, :25].any()
    assert not segments[:, :, 25:].any()
    assert not fragments[:, :, 25:].any()
    identity = run.record()["identity"]
    assert identity["mask"]["hides"] == "voxels"
    _stitch_with_classes(tmp_path, fragments)

    prepared = prepare(load_config(config))
    assert prepared.as_begun() is prepared
    del identity["mask"]["hides"]
    earlier = RunFolder(tmp_path / "earlier")
    with earlier.lock():
        earlier.create({}, identity)
    prepared = replace(prepared, run=earlier)
    with open_session(prepared, on_progress=None) as session:
        assert not session.prepared.hides_voxels
    with open_session(prepared, overwrite=True, on_progress=None) as session:
        assert session.prepared.hides_voxels


@pytest.mark.slow
def test_a_changed_mask_computes_the_blocks_that_it_concerns(tmp_path):
    """Changed in place: the run ends with the bytes of one that had the new mask from the start."""
    mask = np.zeros((10, 17, 90), np.uint8)
    mask[:, :, :20] = mask[:, :, 62:] = 1
    sections = {"stitch": {"superblock": [1, 1, 1]}}
    for name in ("run", "fresh"):
        (tmp_path / name).mkdir()
        write_volume(tmp_path / name / "in.zarr", "raw", blobs(mask.shape))
    write_volume(tmp_path / "run" / "in.zarr", "mask", mask)
    named = [
        {n: {"path": str(tmp_path / name / "in.zarr"), "dataset": n} for n in ("raw", "mask")}
        for name in ("run", "fresh")
    ]
    config = make_config(tmp_path / "run", input=named[0], **sections)
    first = agq("predict", config)
    assert first.returncode == 0, first.stderr

    def ranks():
        return Journal(tmp_path / "run" / "run" / "journal" / "predict").ranks(np.arange(24))

    before = ranks()
    # More tissue than before, tissue where there was none, and in one block none any more.
    mask[:, :, 20:40] = 1
    mask[7:, 15:, :15] = 0
    write_volume(tmp_path / "run" / "in.zarr", "other", mask)
    for name in ("run", "fresh"):
        write_volume(tmp_path / name / "in.zarr", "mask", mask)
    refused = agq("stitch", config, "--set", "input.mask.dataset=other")
    assert refused.returncode == 2
    assert "input.mask has changed since blocks were computed" in refused.stderr
    again = agq("run", config)
    assert again.returncode == 0, again.stderr
    assert "input.mask has changed:" in again.stderr
    assert (ranks() != before).any()
    report = RunFolder(tmp_path / "run" / "run").record()["stages"]["predict"]["report"]
    fresh = agq("run", make_config(tmp_path / "fresh", input=named[1], **sections))
    assert fresh.returncode == 0, fresh.stderr
    whole = RunFolder(tmp_path / "fresh" / "run").record()["stages"]["predict"]["report"]
    assert 0 < report["done"] < whole["done"]
    assert results(tmp_path / "run" / "run") == results(tmp_path / "fresh" / "run")


def test_fragments_of_another_model_with_mask_and_classes(tmp_path):
    """Two fragments that all affinities would join: a wall cuts neither, classes part them."""
    fragments = np.full((4, 20, 300), 7, np.uint64)
    fragments[:, 12:] = 9
    mask = np.ones(fragments.shape, np.uint8)
    mask[:, :, 60:63] = 0
    classes = np.zeros((4, 20, 3), np.uint8)
    classes[:, 13:, 1:] = 2
    classes[:, :10, 2] = 1
    container = tmp_path / "in.zarr"
    write_volume(container, "fragments", fragments)
    write_volume(container, "mask", mask)
    write_volume(container, "classes", classes, voxel_size=(30, 6, 600))
    affinities = np.full((3, *fragments.shape), 255, np.uint8)
    attributes = {"voxel_size": [30, 6, 6], "offset": [0, 0, 0], "units": ["nm"] * 3}
    zarr.create_array(str(container / "affinities"), data=affinities).attrs.update(attributes)

    def stitch(name, **named):
        return stitch_fragments(
            f"{container}::fragments",
            f"{container}::affinities",
            None,
            tmp_path / name,
            input={n: {"path": str(container), "dataset": d} for n, d in named.items()},
        )

    def found(name):
        return open_array(tmp_path / name / "data.zarr", "segmentation/s0", "r")[:]

    stitch("masked", mask="mask")
    assert same_partition(found("masked"), mask)
    report = stitch("both", mask="mask", classes="classes")
    assert report.forbidden_contacts > 0
    assert not found("both")[:, :, 60:63].any()
    at = found("both")[0]
    # A fragment has the class of its voxels wherever they lie, on both sides of the wall.
    assert at[15, 10] == at[15, 100] == at[15, 290]
    assert at[5, 10] == at[5, 100] == at[5, 290] != at[15, 290]
    with pytest.raises(InputError, match=r"made from other volumes \(.*classes: "):
        Run(read_target(tmp_path / "both", ["input.mask.dataset=classes"])).stitch()
