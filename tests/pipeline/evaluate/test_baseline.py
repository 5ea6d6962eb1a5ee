"""The watershed baseline: fragments by hand, thresholds against real agglomerations, the chain."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.merge.agglomeration import agglomerate
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings, Thresholds
from agq.blockwise.volumes.create import create_affinities, create_array, open_array, write_chunk
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError
from agq.model.decode.supervoxels import section_fragments
from agq.pipeline.evaluate.baseline.compare import MEAN, QUANTILE, Search, compare, fragment_counts
from agq.pipeline.evaluate.baseline.quantile import quantile_segments, write_joined
from agq.pipeline.evaluate.baseline.watershed import (
    WatershedRun,
    WatershedSettings,
    fragments_of,
    make_fragments,
)
from agq.pipeline.evaluate.evaluate import evaluate
from agq.pipeline.evaluate.sweep import one_threshold, point, two_thresholds
from agq.pipeline.folder import RunFolder
from tests.helpers.fragments import GRID, box, make_run, same_partition, write_run
from tests.helpers.whole_volume import contacts_from_volume

SMALL = WatershedSettings(seed_distance=3, context=4)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with dask_client(DaskSettings(workers=2), processes=False) as made:
        yield made


@pytest.fixture(scope="module")
def prepared(client: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Volume]:
    """A stitched run with affinities, and its truth."""
    folder = tmp_path_factory.mktemp("baseline")
    made = make_run(GRID, seed=5)
    run = RunFolder(folder / "run")
    identity = {"grid": GRID.to_dict(), "affinities": True}
    run.create({"stitch": {"across": 0.7, "within": 1.0}}, identity)
    write_run(made, run.path)
    placed = {"voxel_size": GRID.voxel_size, "offset": GRID.offset}
    affinities = create_affinities(
        run.container, "affinities", shape=GRID.volume_shape, chunks=GRID.write_shape, **placed
    )
    for number in range(GRID.n_blocks):
        where = (slice(None), *box(*GRID.write_box(number)))
        own = (made.half_units[where] // 2).astype(np.uint8)
        write_chunk(affinities, (0, *GRID.index(number)), own)
    truth = create_array(
        folder / "truth.zarr",
        "labels",
        shape=GRID.volume_shape,
        chunks=GRID.write_shape,
        dtype=np.uint32,
        **placed,
    )
    truth[:] = made.truth + 1
    run_stitch(made.spec(run.path), client)
    return run, open_volume(folder / "truth.zarr", "labels", kind="labels")


def test_a_section_falls_apart_at_low_affinities() -> None:
    inplane = np.full((20, 31), 500, np.uint16)
    inplane[:, 10] = inplane[:, 20] = 100
    found = section_fragments(inplane, seed_distance=9)
    assert (found[:, [10, 20]] == 0).all()
    parts = [np.unique(found[:, a:b]).tolist() for a, b in ((0, 10), (11, 20), (21, 31))]
    assert all(0 not in part for part in parts)
    assert not set(parts[0]) & set(parts[1])
    assert not set(parts[1]) & set(parts[2])
    grown = section_fragments(inplane, seed_distance=9, grow=True)
    assert (grown > 0).all()
    assert (grown[found > 0] == found[found > 0]).all()
    assert not section_fragments(inplane, boundary=0.99).any()


def test_seeds_are_maxima_of_the_distance() -> None:
    """Two discs with a bridge between them: two basins, cut at the bridge."""
    y, x = np.indices((21, 41))
    inside = ((y - 10) ** 2 + (x - 10) ** 2 <= 64) | ((y - 10) ** 2 + (x - 30) ** 2 <= 64)
    inside |= (abs(y - 10) <= 1) & (x > 10) & (x < 30)
    found = section_fragments(np.where(inside, 510, 0).astype(np.uint16))
    left, right = found[10, 10], found[10, 30]
    assert left != right
    assert ((found > 0) == inside).all()
    assert (found[:, :15][inside[:, :15]] == left).all()
    assert (found[:, 26:][inside[:, 26:]] == right).all()


def test_sections_do_not_share_labels() -> None:
    volume = np.full((3, 4, 8, 8), 255, np.uint8)
    volume[:, 2] = 0
    found = fragments_of(volume, SMALL)
    assert not found[2].any()
    for a, b in ((0, 1), (1, 3), (0, 3)):
        assert not np.intersect1d(found[a], found[b]).size


def test_fragments_follow_from_the_affinities_alone(
    prepared: tuple[RunFolder, Volume], client: Any
) -> None:
    """In threads or on dask, resumed or not: the same bytes, and no block done twice."""
    run, _ = prepared
    folder = make_fragments(run, SMALL).folder
    files = {
        path: path.read_bytes()
        for part in ("data.zarr", "sidecars")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }
    make_fragments(run, SMALL, client=client)
    journal = Journal(folder / "journal" / "predict")
    assert journal.counts()["done"] == GRID.n_blocks
    assert journal.duplicates == []
    for part in ("sidecars", "journal"):
        shutil.rmtree(folder / part)
    make_fragments(run, SMALL, client=client)
    assert files == {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("context", [0, 3])
def test_a_block_looks_as_far_around_it_as_it_is_told(
    prepared: tuple[RunFolder, Volume], context: int
) -> None:
    run, _ = prepared
    settings = WatershedSettings(seed_distance=3, grow=True, context=context)
    folder = make_fragments(run, settings).folder
    found = open_array(folder / "data.zarr", "fragments", "r")[:]
    affinities = open_array(run.container, "affinities", "r")[:]
    for number in range(GRID.n_blocks):
        (z0, y0, x0), (z1, y1, x1) = GRID.read_box(number)
        top, left = max(0, y0 - context), max(0, x0 - context)
        seen = affinities[:, z0:z1, top : y1 + context, left : x1 + context]
        around = fragments_of(seen, settings)[:, y0 - top :, x0 - left :]
        expected = around[:, : y1 - y0, : x1 - x0][GRID.write_in_read(number)]
        ours = found[box(*GRID.write_box(number))]
        # The same division; cropping may have cut a piece in two.
        pairs = {(a, b) for a, b in zip(ours.ravel(), expected.ravel(), strict=True)}
        assert len({a for a, _ in pairs}) == len(pairs)


def test_a_cut_dendrogram_equals_agglomeration_at_that_threshold(
    prepared: tuple[RunFolder, Volume], client: Any
) -> None:
    run, truth = prepared
    made = make_run(GRID, seed=5)
    evidence = contacts_from_volume(made.fragments, made.half_units, made.border)
    counts = fragment_counts(run, truth, client=client)
    thresholds = [0.2, 0.22, 0.23, 0.5, 0.92, 0.93]
    points = one_threshold("mean", counts, evidence, thresholds)
    for threshold, cut in zip(thresholds, points, strict=True):
        result = agglomerate(
            evidence.nodes.ids, evidence.contacts, Thresholds(across=threshold, within=threshold)
        )
        alone = point("mean", cut.setting, counts, result.ids, result.representatives)
        assert cut == alone
    assert len({cut.segments for cut in points}) > 2
    pairs = two_thresholds("AGQ", counts, evidence, [0.5, 0.99], [0.5])
    assert pairs[0].scores == points[3].scores
    assert pairs[0].segments < pairs[1].segments


def test_the_table_scores_what_evaluate_scores(
    prepared: tuple[RunFolder, Volume], client: Any
) -> None:
    """From fragments and thresholds, and from the stitched volumes: the same figures."""
    run, truth = prepared
    report = compare(run, truth, client, Search(SMALL, thresholds=[0.4, 0.6, 0.8]))
    own = evaluate(open_volume(run.container, "segmentation", level=0, kind="labels"), truth)
    assert report.agq.scores == own.scores()
    assert report.agq.segments == own.segments
    stitched = open_volume(report.segmentation, level=0, kind="labels")
    mean, quantile = report.chosen
    assert mean.scores == evaluate(stitched, truth).scores()
    assert [p.scores for p in report.final] == [p.scores for p in (report.agq, *report.chosen)]
    assert (mean.method, quantile.method) == (MEAN, QUANTILE)
    assert len(report.curves) == 6
    assert mean.value("voi_sum") == min(p.value("voi_sum") for p in report.curves[:3])
    kept = json.loads((run.path / "baseline.json").read_text())
    assert kept == json.loads(json.dumps(report.to_dict()))
    assert report.table()
    tuned = compare(run, truth, client, Search(tuned_on=run))
    assert tuned.settings == SMALL
    assert tuned.chosen == report.chosen
    assert tuned.curves == []


def test_quantile_agglomeration_takes_the_upper_quartile(tmp_path: Path) -> None:
    """One contact of eight pairs: two at 0.9, six at 0.2; the mean is 0.375, the quantile high."""
    grid = BlockGrid((1, 8, 2), (30, 6, 6), (1, 8, 2), after=(0, 0, 0))
    labels = np.tile(np.array([1, 2], np.uint64), (1, 8, 1))
    values = np.full((3, 1, 8, 2), 255, np.uint8)
    values[2, 0, :, 1] = [230, 51, 51, 51, 51, 51, 51, 230]
    for name, data in (("fragments", labels), ("affinities", values)):
        array = create_array(
            tmp_path / "data.zarr",
            name,
            shape=data.shape,
            chunks=data.shape,
            dtype=data.dtype,
            voxel_size=(30, 6, 6) if data.ndim == 3 else (1, 30, 6, 6),
        )
        array[:] = data
    job = WatershedRun(tmp_path / "data.zarr", tmp_path, grid.to_dict(), SMALL)
    found = quantile_segments(job, [0.85, 0.15, 0.5, 0.95])
    assert [threshold for threshold, _, _ in found] == [0.15, 0.5, 0.85, 0.95]
    assert [len(np.unique(segments)) for _, _, segments in found] == [1, 1, 1, 2]
    assert all(ids.tolist() == [1, 2] for _, ids, _ in found)


def test_joined_fragments_are_written_without_small_segments(
    prepared: tuple[RunFolder, Volume],
) -> None:
    run, _ = prepared
    job = make_fragments(run, SMALL)
    volume = open_volume(job.folder / "data.zarr", "fragments", kind="labels")
    fragments = volume.read((0, 0, 0), volume.shape)
    ids = np.unique(fragments[fragments > 0])
    segments = ids // 3
    write_joined(job, "joined", ids, segments, 40)
    found = open_volume(job.folder / "data.zarr", "joined", kind="labels").read(
        (0, 0, 0), volume.shape
    )
    sizes = dict(zip(*np.unique(fragments[fragments > 0] // 3, return_counts=True), strict=True))
    kept = np.array([0 if v == 0 or sizes[v // 3] < 40 else v // 3 for v in fragments.flat])
    assert same_partition(found, kept.reshape(found.shape))
    assert 0 < np.count_nonzero(found) < np.count_nonzero(fragments)


def test_what_cannot_be_compared_is_one_clear_line(
    prepared: tuple[RunFolder, Volume], client: Any, tmp_path: Path
) -> None:
    run, truth = prepared
    other = RunFolder(tmp_path / "run")
    other.create({"stitch": {}}, {"grid": GRID.to_dict(), "affinities": False})
    with pytest.raises(InputError, match="is not stitched yet"):
        compare(other, truth, client)
    with pytest.raises(InputError, match=r"has no baseline\.json"):
        compare(run, truth, client, Search(tuned_on=other))
    with pytest.raises(InputError, match="boundary 1"):
        WatershedSettings(boundary=1)
    record = run.record()
    identity = {**record["identity"], "affinities": False}
    run.update(identity=identity)
    with pytest.raises(InputError, match=r"did not keep its affinities.*output\.affinities=true"):
        compare(run, truth, client)
    run.update(identity=record["identity"])
