"""Skeletons, expected run length, scores of blocks and plots."""

import json
import os
from pathlib import Path

import cc3d
import numpy as np
import pytest
from skimage.metrics import adapted_rand_error, variation_of_information

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.evaluate.block_scores import score_blocks
from agq.pipeline.evaluate.evaluate import evaluate
from agq.pipeline.evaluate.plot import plot_curves, plot_report
from agq.pipeline.evaluate.skeletons import (
    Skeletons,
    expected_run_length,
    read_skeletons,
    segments_at,
    skeletonize,
)
from agq.pipeline.evaluate.sweep import Point
from agq.pipeline.folder import RunFolder
from tests.helpers.fragments import GRID, box, make_run, write_run
from tests.helpers.fuzz import attack, odd_text, require_one_line
from tests.helpers.runs import stored, write_volume


def line(owner: int, nodes: int, step: float, y: float) -> Skeletons:
    """A straight skeleton along x."""
    places = np.array([[0.0, y, k * step] for k in range(nodes)])
    edges = np.array([[k, k + 1] for k in range(nodes - 1)])
    return Skeletons(places, edges, np.full(nodes, owner, np.uint64))


def test_run_length_by_hand() -> None:
    """Three neurites of length 10, 10 and 5: one cut in two, two joined."""
    three = Skeletons.merge([line(1, 11, 1.0, 0), line(2, 11, 1.0, 9), line(3, 6, 1.0, 20)])
    perfect = expected_run_length(three, three.owner)
    assert perfect.expected == perfect.possible == pytest.approx((100 + 100 + 25) / 25)
    assert (perfect.correct, perfect.mergers, perfect.skeletons) == (1.0, 0, 3)
    segments = three.owner.copy()
    segments[:5] = 7  # nodes 0-4 of the first: edges 0-3 are in 7, 4-5 is cut, 5-9 are in 1
    report = expected_run_length(three, segments)
    assert report.expected == pytest.approx((4**2 + 5**2 + 100 + 25) / 25)
    assert (report.split, report.merged, report.omitted) == (1 / 25, 0, 0)
    segments[22:] = 2  # the third joins the second: both count nothing
    segments[7] = 0  # a node in background: two edges of the first
    report = expected_run_length(three, segments)
    # A run is what a segment holds of a skeleton, as published: the gap does not cut it.
    assert report.expected == pytest.approx((4**2 + 3**2) / 25)
    assert report.mergers == 1
    assert report.merged == 15 / 25
    assert report.omitted == 2 / 25
    assert report.correct + report.split + report.merged + report.omitted == pytest.approx(1)
    json.dumps(report.to_dict())
    assert "60.0% in 1 mergers" in report.line("nm")


def test_a_few_nodes_of_another_skeleton_are_tolerated_if_asked() -> None:
    two = Skeletons.merge([line(1, 11, 1.0, 0), line(2, 11, 1.0, 9)])
    segments = two.owner.copy()
    segments[10] = 2
    assert expected_run_length(two, segments).mergers == 1
    report = expected_run_length(two, segments, tolerance=1)
    assert report.mergers == 0
    assert report.expected == pytest.approx((81 + 100) / 20)


def test_skeletons_of_labels_are_trees_inside_their_objects(tmp_path: Path) -> None:
    labels = np.zeros((10, 40, 44), np.uint64)
    labels[2:7, 5:10, 4:40] = 2**60  # a bar along x
    labels[1:9, 20:35, 20:35] = 5  # a ring
    labels[1:9, 25:30, 25:30] = 0
    labels[0, 0, 0] = 9
    truth = stored(tmp_path / "t", labels, (60, 12, 18))
    found = skeletonize(truth)
    assert set(found.owner.tolist()) == {2**60, 5}
    assert (segments_at(truth, found.nodes, (4, 16, 16)) == found.owner).all()
    for owner in np.unique(found.owner):
        nodes, edges = np.count_nonzero(found.owner == owner), found.owner[found.edges[:, 0]]
        assert np.count_nonzero(edges == owner) == nodes - 1
    bar = found.lengths[found.owner[found.edges[:, 0]] == 2**60].sum()
    assert 25 * 6 <= bar <= 45 * 6
    found.save(tmp_path / "s.npz")
    again = read_skeletons(tmp_path / "s.npz")
    assert all(np.array_equal(getattr(again, k), v) for k, v in vars(found).items())
    assert (segments_at(truth, np.array([[0.0, 0, 0], [1e9, 0, 0]])) == 0).all()


def test_swc_files_are_read_in_their_order_of_axes(tmp_path: Path) -> None:
    (tmp_path / "a.swc").write_text("# made by hand\n1 2 10 20 30 1 -1\n5 2 13 24 30 1 1\n")
    found = read_skeletons(tmp_path)
    assert found.nodes.tolist() == [[30, 20, 10], [30, 24, 13]]
    assert found.lengths.tolist() == [5]
    for name, text, message in (
        ("b.swc", "1 2 x y z\n", "not an npz or SWC file"),
        ("c.swc", "1 2 10 20 30 1 -1\n", "no edges"),
        ("d.npz", "no", "cannot be read|not an npz|damaged"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            read_skeletons(tmp_path / name)
    with pytest.raises(InputError, match="No such file"):
        read_skeletons(tmp_path / "none.swc")


def test_blocks_are_scored_alone_against_pieces(tmp_path: Path) -> None:
    made = make_run(GRID, seed=3, absent=[4])
    run = RunFolder(tmp_path / "run")
    run.create({}, {"grid": GRID.to_dict()})
    # Fragments that are wrong in places: every block joins some and has background.
    wrong = made.fragments.copy()
    wrong[wrong % 5 == 1] = 0
    wrong[wrong % 5 == 2] -= 1
    made.fragments[:] = wrong
    write_run(made, run.path)
    truth = stored(tmp_path / "t", made.truth + 1, GRID.offset)
    report = score_blocks(run, truth)
    assert [b.number for b in report.blocks] == [n for n in range(GRID.n_blocks) if n != 4]
    for block in report.blocks:
        where = box(*GRID.write_box(block.number))
        pieces = cc3d.connected_components((made.truth + 1)[where], connectivity=26)
        labels = np.unique(made.fragments[where], return_inverse=True)[1].reshape(pieces.shape)
        split, merge = variation_of_information(pieces, labels)
        assert block.as_is.voi_split == pytest.approx(split, abs=1e-12)
        assert block.as_is.voi_merge == pytest.approx(merge, abs=1e-12)
        error = adapted_rand_error(pieces, labels)[0]
        assert block.as_is.adapted_rand_error == pytest.approx(error, abs=1e-12)
        assert block.at == GRID.write_box(block.number)[0]
    mean = report.mean()["as_is"]["voi_sum"]
    assert mean == pytest.approx(np.mean([b.as_is.voi_sum for b in report.blocks]))
    assert report.worst(1)[0].filled.voi_sum == max(b.filled.voi_sum for b in report.blocks)
    json.dumps(report.to_dict())
    assert report.table()
    scores = evaluate(open_volume(run.container, "fragments", kind="labels"), truth)
    plot_report(tmp_path / "plots" / "a.png", scores, report)
    curve = [Point("m", {"affinity": t}, 3, scores.scores()) for t in (0.1, 0.2)]
    plot_curves(tmp_path / "b.png", curve, curve[:1])
    for file in (tmp_path / "plots" / "a.png", tmp_path / "b.png"):
        assert file.read_bytes()[:4] == b"\x89PNG"


def test_skeletons_and_filling_count_in_nanometres_in_any_unit(tmp_path: Path) -> None:
    truth = np.zeros((6, 24, 40), np.uint32)
    truth[1:4, 3:8, 2:38], truth[2:5, 14:19, 2:38] = 3, 4
    labels = truth.copy()
    labels[:, :, 20:22] = 0  # is filled within 150 nm
    lines, figures = set(), set()
    for unit, scale in (("nm", 1), ("pm", 1000)):
        place = {"voxel_size": [30 * scale, 6 * scale, 6 * scale], "unit": unit}
        place["offset"] = [60 * scale, 0, 12 * scale]
        write_volume(tmp_path / unit, "truth", truth, **place)
        write_volume(tmp_path / unit, "labels", labels, **place)
        made, segments = (
            open_volume(tmp_path / unit, name, kind="labels", unit=unit)
            for name in ("truth", "labels")
        )
        report = expected_run_length(trees := skeletonize(made), segments_at(made, trees.nodes))
        lines.add(report.line())
        scores = evaluate(segments, made)
        figures.add((scores.background_filled.voi_sum, scores.unfilled))
    assert lines.pop().startswith("expected run length 198 of 198 nm")
    assert not lines
    assert figures == {(0, 0)}


SWC = "# nodes\n1 2 10 20 30 1 -1\n2 2 11 20 30 1 1\n3 2 12 21 30 1 2\n"


@pytest.mark.fuzz
def test_damaged_skeletons(tmp_path):
    path = tmp_path / "a.swc"

    def look(data):
        path.write_bytes(data)
        read_skeletons(path)

    assert attack(look, lambda rng: odd_text(rng, SWC.encode()), 150)


@pytest.mark.parametrize(
    "row",
    ["1 2 inf 0 0 1 -1", "1 2 nan 0 0 1 -1", "1 2 1e300 0 0 1 -1", "1 2 0 0 0 1 1" + "0" * 40],
)
def test_skeletons_that_lie_nowhere(tmp_path, row):
    path = tmp_path / "a.swc"
    path.write_text(f"{SWC}{row.replace('1', '4', 1)}\n")
    assert str(path) in require_one_line(lambda: read_skeletons(path))


def test_skeletons_of_other_shapes(tmp_path):
    path = tmp_path / "a.npz"
    good = {"nodes": np.zeros((3, 3)), "edges": np.array([[0, 1]]), "owner": np.ones(3)}
    for name, value in (
        ("nodes", np.zeros(3)), ("nodes", np.zeros((3, 2))), ("edges", np.zeros((1, 3))),
        ("owner", np.ones(2)), ("owner", np.ones((3, 3))), ("edges", np.array([[0, 3]])),
        ("nodes", np.full((3, 3), np.nan)),
    ):  # fmt: skip
        np.savez(path, **good | {name: value})
        assert str(path) in require_one_line(lambda: read_skeletons(path))


@pytest.mark.parametrize("name", ["a.swc", "a.npz"])
def test_what_is_no_skeleton_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert name in require_one_line(lambda: read_skeletons(tmp_path / name))
