"""Scores from blockwise tables: scikit-image is the oracle, the block size changes nothing."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import ndimage
from skimage.metrics import adapted_rand_error, variation_of_information

from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.volumes.boxes import unordered
from agq.errors import InputError
from agq.pipeline.evaluate.contingency import BorderRule, Contingency
from agq.pipeline.evaluate.evaluate import evaluate
from agq.pipeline.evaluate.scores import EvaluationReport, Scores
from tests.helpers.runs import VOXEL_SIZE as SIZE
from tests.helpers.runs import stored


def blobs(seed: int, n: int, shape: Any = (9, 40, 44), zeros: float = 0.0) -> npt.NDArray[Any]:
    """Voronoi cells of n random points, with walls of about the given share of voxels."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, shape, (n, 3))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    d = np.sort(np.linalg.norm(grid[..., None, :] - points, axis=-1), -1)
    labels = np.argmin(np.linalg.norm(grid[..., None, :] - points, axis=-1), -1) + 1
    walls = d[..., 1] - d[..., 0]
    return np.where(walls >= np.quantile(walls, zeros), labels, 0).astype(np.uint64)


def text_of(report: EvaluationReport) -> str:
    console = Console(width=200, file=io.StringIO(), soft_wrap=True)
    console.print(report.table())
    return console.file.getvalue()


def assert_like_skimage(scores: Scores | None, truth: Any, segmentation: Any) -> None:
    assert scores is not None
    t, s = (np.unique(a, return_inverse=True) for a in (truth, segmentation))
    # Consecutive, with 0 still 0 in the truth: scikit-image makes a dense axis of the labels.
    real = t[1].reshape(-1) + (t[0][0] != 0)
    split, merge = variation_of_information(real, s[1].reshape(-1), ignore_labels=[0])
    assert scores.voi_split == pytest.approx(split, abs=1e-12)
    assert scores.voi_merge == pytest.approx(merge, abs=1e-12)
    error, first, second = adapted_rand_error(real, s[1].reshape(-1), ignore_labels=[0])
    assert scores.adapted_rand_error == pytest.approx(error, abs=1e-12)
    # scikit-image divides its "precision" by the pairs of the truth; see the next test.
    assert scores.rand_recall == pytest.approx(first, abs=1e-12)
    assert scores.rand_precision == pytest.approx(second, abs=1e-12)


def test_mergers_lower_precision_and_splits_recall(tmp_path: Path) -> None:
    truth = np.ones((2, 4, 4), np.uint32)
    truth[:, 2:] = 2
    merged = np.full_like(truth, 7)
    report = evaluate(stored(tmp_path / "m", merged), stored(tmp_path / "t", truth))
    assert report.as_is == Scores(0.0, 1.0, report.as_is.adapted_rand_error, 15 / 31, 1.0)
    report = evaluate(stored(tmp_path / "t", truth), stored(tmp_path / "m", merged))
    assert report.as_is == Scores(1.0, 0.0, report.as_is.adapted_rand_error, 1.0, 15 / 31)


@pytest.mark.parametrize("block", [(9, 40, 44), (4, 16, 16), (5, 7, 50)])
def test_equals_skimage_for_any_block(tmp_path: Path, block: Any) -> None:
    truth = blobs(0, 12, zeros=0.1)
    # Ids above 2**53, as fragments have, must not pass through floats.
    labels = blobs(1, 15, zeros=0.2)
    big = np.where(labels > 0, labels + np.uint64(2**60), np.uint64(0))
    a, b = stored(tmp_path / "s", big), stored(tmp_path / "t", truth.astype(np.uint16))
    report = evaluate(a, b, block=block, fill_distance=300)
    assert_like_skimage(report.as_is, truth, labels)
    known = labels > 0
    assert_like_skimage(report.background_ignored, truth[known], labels[known])
    assert report.unfilled == 0
    assert report.background == pytest.approx(np.mean(labels[truth > 0] == 0))
    assert report.voxels == np.count_nonzero(truth)
    assert report.truth_objects == len(np.unique(truth[truth > 0]))
    whole = evaluate(a, b, block=(9, 40, 44), fill_distance=300)
    assert report.scores() == whole.scores()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_equals_skimage_on_random_labels(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(3))
    most = data.draw(st.integers(1, 6))
    truth = rng.integers(0, most + 1, shape).astype(np.uint8)
    truth.flat[0] = 1
    labels = rng.integers(0, data.draw(st.integers(0, 6)) + 1, shape).astype(np.int64)
    folder = tmp_path_factory.mktemp("random")
    report = evaluate(
        stored(folder / "s", labels), stored(folder / "t", truth), block=(2, 3, 2), workers=1
    )
    if np.count_nonzero(truth) > 1:
        split, merge = variation_of_information(truth, labels, ignore_labels=[0])
        assert report.as_is.voi_split == pytest.approx(split, abs=1e-12)
        assert report.as_is.voi_merge == pytest.approx(merge, abs=1e-12)


@pytest.mark.parametrize("block", [(9, 40, 44), (3, 9, 11)])
def test_fill_takes_the_nearest_segment_in_the_world(tmp_path: Path, block: Any) -> None:
    truth, labels = blobs(2, 9), blobs(3, 11, zeros=0.35)
    reach = 31.0
    report = evaluate(
        stored(tmp_path / "s", labels),
        stored(tmp_path / "t", truth),
        block=block,
        fill_distance=reach,
    )
    filled = labels.copy()
    known = np.argwhere(labels > 0)
    for z, y, x in np.argwhere(labels == 0):
        squared = (((known - (z, y, x)) * SIZE) ** 2).sum(1)
        best = squared.min()
        if best <= reach**2:
            # Of equals the first in (z, y, x): argwhere is in this order.
            filled[z, y, x] = labels[tuple(known[np.argmax(squared == best)])]
    assert 0 < np.mean(filled == 0) < np.mean(labels == 0)
    assert report.unfilled == pytest.approx(np.mean(filled == 0))
    assert_like_skimage(report.background_filled, truth, filled)


def test_the_trap_a_perfect_segmentation_with_background(tmp_path: Path) -> None:
    truth = blobs(4, 30, (5, 60, 60))
    size = (1, 3, 3)
    edge = ndimage.maximum_filter(truth, size) != ndimage.minimum_filter(truth, size)
    labels = np.where(edge, np.uint64(0), truth)
    report = evaluate(stored(tmp_path / "s", labels), stored(tmp_path / "t", truth))
    assert report.background > 0.2
    assert report.as_is.adapted_rand_error > 0.3
    assert report.as_is.adapted_rand_error > 10 * report.background_filled.adapted_rand_error
    assert report.background_ignored.voi_sum == 0
    assert report.background_ignored.adapted_rand_error == 0


def test_volumes_of_different_place_are_compared_where_they_overlap(tmp_path: Path) -> None:
    truth = blobs(5, 8)
    labels = blobs(6, 9)[2:, 5:30, 4:]
    a = stored(tmp_path / "s", labels, offset=(60 + 300, 30 - 60, 24 + 12))
    b = stored(tmp_path / "t", truth, offset=(300, -60, 12))
    report = evaluate(a, b, block=(3, 8, 8))
    assert report.offset == (360, -30, 36)
    assert report.shape == labels.shape
    assert_like_skimage(report.as_is, truth[2:, 5:30, 4:], labels)
    turned = evaluate(b, a)
    assert turned.as_is.voi_split == pytest.approx(report.as_is.voi_merge, abs=1e-12)


def test_worst_errors_are_found_and_their_positions_lie_inside(tmp_path: Path) -> None:
    truth = blobs(7, 10, zeros=0.1)
    labels = truth.copy()
    labels[truth == 3] = 4
    labels[:4][truth[:4] == 6] = 99
    offset = np.array((90, 12, 6))
    a, b = stored(tmp_path / "s", labels, offset), stored(tmp_path / "t", truth, offset)
    report = evaluate(a, b, block=(4, 16, 16), worst=3)
    assert [item.label for item in report.worst_mergers] == [4]
    assert [item.label for item in report.worst_splits] == [6]
    assert {n for n, _, _ in report.worst_mergers[0].largest} == {3, 4}
    assert {n for n, _, _ in report.worst_splits[0].largest} == {6, 99}
    for item, volume in ((report.worst_mergers[0], truth), (report.worst_splits[0], labels)):
        for label, voxels, at in item.largest:
            assert volume[tuple((np.array(at) - offset) // SIZE)] == label
            assert voxels <= np.count_nonzero(volume == label)
    assert report.worst_mergers[0].bits == pytest.approx(report.background_ignored.voi_merge)
    assert report.worst_splits[0].bits == pytest.approx(report.background_ignored.voi_split)


@pytest.mark.parametrize("across_sections", [False, True])
@pytest.mark.parametrize("block", [(9, 40, 44), (3, 9, 11)])
def test_borders_of_the_truth_can_be_left_out(
    tmp_path: Path, block: Any, across_sections: bool
) -> None:
    truth, labels = blobs(20, 6), blobs(21, 8, zeros=0.1)
    far = truth.copy()
    reach = (2 if across_sections else 0, 2, 2)
    for z, y, x in np.ndindex(truth.shape):
        window = tuple(
            slice(max(0, v - r), v + r + 1) for v, r in zip((z, y, x), reach, strict=True)
        )
        if (truth[window] != truth[z, y, x]).any():
            far[z, y, x] = 0
    report = evaluate(
        stored(tmp_path / "s", labels),
        stored(tmp_path / "t", truth),
        block=block,
        ignore=BorderRule(2, across_sections),
    )
    assert 0 < report.voxels == np.count_nonzero(far) < truth.size
    assert_like_skimage(report.as_is, far, labels)
    with pytest.raises(InputError, match="border radius -1"):
        BorderRule(-1)


@pytest.mark.parametrize(
    ("dtype", "value", "name", "given"),
    [
        ("uint64", 2**64 - 1, "18446744073709551615 (2^64-1)", -1),
        ("uint64", 2**64 - 2, "18446744073709551614 (2^64-2)", 2**64 - 2),
        ("uint64", 2**32 - 1, "4294967295 (2^32-1)", 2**32 - 1),
        ("uint32", 2**32 - 1, "4294967295 (2^32-1)", -1),
        ("uint16", 2**16 - 1, "65535 (2^16-1)", 65535),
        ("int64", -1, "-1", -1),
        ("int32", -1, "-1", 2**64 - 1),
    ],
)
@pytest.mark.parametrize("radius", [0, 1])
def test_labels_that_mean_unlabelled(
    tmp_path: Path, dtype: str, value: int, name: str, given: int, radius: int
) -> None:
    truth = blobs(0, 8, zeros=0.1).astype(dtype)
    plain = truth.copy()
    truth[:, :9] = value
    plain[:, :9] = 0
    labels = stored(tmp_path / "s", blobs(1, 9))
    marked, clean = stored(tmp_path / "t", truth), stored(tmp_path / "p", plain)
    report = evaluate(labels, marked, ignore=BorderRule(radius))
    assert report.reserved == {name: pytest.approx(truth[:, :9].size, rel=0.2)}
    said = " ".join(text_of(report).split())
    assert f"voxels of label {name}, which often means unlabelled" in said
    ignored = evaluate(labels, marked, ignore=BorderRule(radius, labels=(given,)))
    assert not ignored.reserved
    assert "labels ignored: " in text_of(ignored)
    wanted = evaluate(labels, clean, ignore=BorderRule(radius))
    assert ignored.scores() == wanted.scores()
    assert wanted.voxels == ignored.voxels < report.voxels


def test_report_is_json_and_a_table(tmp_path: Path) -> None:
    truth, labels = blobs(8, 6), blobs(9, 6, zeros=0.2)
    report = evaluate(stored(tmp_path / "s", labels), stored(tmp_path / "t", truth))
    plain = json.loads(json.dumps(report.to_dict()))
    assert set(plain["scores"]) == {"as_is", "background_filled", "background_ignored"}
    assert "150 nm" in plain["scores"]["background_filled"]["meaning"]
    summary = json.loads(json.dumps(report.summary()))
    assert summary["as_is.voi_sum"] == report.as_is.voi_sum
    text = text_of(report)
    assert "as is, one segment" in text
    assert f"{report.as_is.adapted_rand_error:.4f}" in text


def test_on_dask_workers_the_figures_are_the_same(tmp_path: Path) -> None:
    truth, labels = blobs(10, 12, zeros=0.1), blobs(11, 14, zeros=0.1)
    a, b = stored(tmp_path / "s", labels), stored(tmp_path / "t", truth)
    seen: list[tuple[int, int]] = []
    with dask_client(DaskSettings(workers=2), processes=False) as client:
        report = evaluate(
            a, b, client=client, block=(4, 16, 16), on_progress=lambda *done: seen.append(done)
        )
    assert report == evaluate(a, b, block=(4, 16, 16))
    assert seen == [(n, 27) for n in range(28)]


def test_an_all_background_prediction_has_no_scores_to_ignore_it(tmp_path: Path) -> None:
    truth = blobs(12, 4)
    report = evaluate(stored(tmp_path / "s", truth * 0), stored(tmp_path / "t", truth))
    assert report.background == report.unfilled == 1
    assert report.background_ignored is None
    assert report.as_is == report.background_filled
    json.dumps(report.to_dict())
    assert report.table()


def test_tables_merge_in_any_grouping() -> None:
    rng = np.random.default_rng(0)
    parts = [
        Contingency.of(a, b, number)
        for number, (a, b) in enumerate(rng.integers(0, 5, (6, 2, 2, 6, 6)).astype(np.uint64))
    ]
    whole = Contingency.merge(parts)
    nested = Contingency.merge(
        [Contingency.merge(parts[4:]), Contingency.merge([parts[2], parts[0]]), *parts[1:4:2]]
    )
    for name in ("truth", "segment", "count", "block", "most"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(nested, name))


def test_an_error_in_a_block_stops_the_rest() -> None:
    started = []

    def task(n: int) -> int:
        started.append(n)
        if n == 3:
            raise OSError("block 3")
        return n

    with pytest.raises(OSError, match="block 3"):
        list(unordered(task, range(1000), workers=1))
    assert len(started) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (30, 6, 8)}, "voxel sizes differ"),
        ({"offset": (0, 3, 0)}, "whole number of voxels"),
        ({"offset": (0, 0, 60000)}, "do not overlap"),
    ],
)
def test_volumes_that_cannot_be_compared(tmp_path: Path, change: Any, message: str) -> None:
    labels = blobs(13, 3)
    truth = stored(tmp_path / "t", labels)
    with pytest.raises(InputError, match=message):
        evaluate(stored(tmp_path / "s", labels, **change), truth)


def test_truth_without_labels(tmp_path: Path) -> None:
    labels = blobs(14, 3)
    with pytest.raises(InputError, match="no labelled voxel"):
        evaluate(stored(tmp_path / "s", labels), stored(tmp_path / "t", labels * 0))
