"""`agq suspects` on a small run: what it lists, the tables, and fitting to a truth."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.suspects.candidates import FEATURES, MERGE, SPLIT, Candidates, distinct, gains
from agq.pipeline.suspects.coefficients import DEFAULT
from agq.pipeline.suspects.model import Logistic, Model
from agq.pipeline.view.marks import run_marks
from tests.helpers.runs import agq, blobs, make_config


@pytest.fixture(scope="module")
def stitched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small stitched run."""
    folder = tmp_path_factory.mktemp("suspects")
    done = agq(
        "run", make_config(folder, blobs((16, 66, 66)), stitch={"across": 0.8, "within": 0.5})
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_suspects_are_listed_where_they_are(stitched: Path) -> None:
    done = agq("suspects", stitched, "--least", 10, "--top", 30, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["suspects"]
    assert rows
    table = pq.read_table(stitched / "suspects" / "suspects.parquet").to_pylist()
    assert table == rows
    with (stitched / "suspects" / "suspects.csv").open() as file:
        assert [row["segment"] for row in csv.DictReader(file)] == [str(r["segment"]) for r in rows]
    with (stitched / "suspects" / "webknossos.csv").open() as file:
        tasks = [row[4:7] for row in csv.reader(file)]
    assert tasks == [[str(row[axis]) for axis in "xyz"] for row in rows]
    values = [row["probability"] ** 4 * row["bits"] for row in rows]
    assert values == sorted(values, reverse=True) or np.allclose(
        values, sorted(values, reverse=True), rtol=1e-2
    )
    container = RunFolder(stitched).container
    fragments, segments = (
        open_volume(container, name, level=0, kind="labels", unit=None)
        for name in ("fragments", "segmentation")
    )
    for row in rows:
        at = [row[axis] for axis in "zyx"]
        past = [n + 1 for n in at]
        assert int(fragments.read(at, past)[0, 0, 0]) == row["fragment"]
        assert int(segments.read(at, past)[0, 0, 0]) in (row["segment"], row["other_segment"])
        assert (row["segment"] == row["other_segment"]) == (row["kind"] == MERGE)
    marks = {mark.name: mark for mark in run_marks(RunFolder(stitched), "nm")}
    shown = [marks[f"suspect {kind}s"].items for kind in {row["kind"] for row in rows}]
    assert sum(map(len, shown)) == len(rows)
    first = marks[f"suspect {rows[0]['kind']}s"].items[0]
    assert first[1] == (tuple(rows[0][axis] + 0.5 for axis in "zyx"),)
    pairs = [(row["segment"], row["other_segment"]) for row in rows if row["kind"] == SPLIT]
    assert len(set(pairs)) == len(pairs), "one pair of segments is listed once"


def test_input_that_cannot_be_used_is_one_line(stitched: Path, tmp_path: Path) -> None:
    for words, message in (
        (("--least", 10**9), "give a smaller --least"),
        (("--model", tmp_path / "none.json"), "no coefficients of this release"),
        (("--calibrate",), "names no truth"),
    ):
        done = agq("suspects", stitched, *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    done = agq("suspects", tmp_path)
    assert (done.returncode, "not a run folder" in done.stderr) == (2, True)


def test_a_fit_finds_the_odds(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    features = random.normal(size=(4000, len(FEATURES[MERGE])))
    wrong = random.random(4000) < 1 / (1 + np.exp(-(2 * features[:, 0] - 1)))
    fitted = Logistic.fit(features, wrong, np.ones(4000))
    probability = fitted.probability(features)
    likely = probability > 0.5
    assert abs(probability[likely].mean() - wrong[likely].mean()) < 0.05
    assert abs(probability[~likely].mean() - wrong[~likely].mean()) < 0.05
    model = Model({MERGE: fitted, SPLIT: DEFAULT.kinds[SPLIT]}, "test")
    model.save(tmp_path / "model.json")
    assert Model.load(tmp_path / "model.json") == model
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(InputError, match="no coefficients"):
        Model.load(tmp_path / "model.json")


def test_cuts_that_part_alike_are_one() -> None:
    spans = [(0, 40), (0, 45), (42, 100), (0, 95), (60, 70)]
    rows = np.zeros(len(spans), np.dtype([("a", np.uint64), ("span", int, 2), ("sides", int, 2)]))
    rows["span"] = spans
    rows["sides"] = [(e - b, 100 - (e - b)) for b, e in spans]
    cuts = Candidates(MERGE, rows, np.zeros((5, 0)), np.zeros(5))
    assert distinct(cuts, np.array([3.0, 5.0, 4.0, 2.0, 1.0])).tolist() == [1, 3, 4]


def test_gains_are_those_of_the_entropy() -> None:
    gain = gains(np.array([[100, 300], [1, 1]]), 1000)
    share = np.array([0.25, 0.75])
    assert np.isclose(gain[0], 0.4 * -(share * np.log2(share)).sum())
    assert np.isclose(gain[1], 0.002)
