"""`agq suspects` on a small run: what it lists, the tables, and fitting to a truth."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from matplotlib.image import imread

from agq.blockwise.stitch.superblocks import StitchFiles
from agq.blockwise.storage.arrays import load_arrays
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.dashboard.run_view import RunView
from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.folder import RunFolder
from agq.pipeline.suspects.candidates import FEATURES, MERGE, SPLIT, Candidates, distinct, gains
from agq.pipeline.suspects.coefficients import DEFAULT
from agq.pipeline.suspects.evidence import SegmentEvidence
from agq.pipeline.suspects.find import all_owners, finder
from agq.pipeline.suspects.listed import TABLE, read_suspects
from agq.pipeline.suspects.model import Logistic, Model
from agq.pipeline.view.marks import run_marks
from tests.helpers.browser import browser_page, serving
from tests.helpers.runs import agq, blobs, make_config, write_volume


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
    base = "https://lab.example/run"
    words = ("--least", 10, "--top", 30, "--pictures", 12, "--base-url", base)
    done = agq("suspects", stitched, *words, "--json")
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
    for row in rows:
        site, _, state = row["link"].partition("/#!")
        assert site == "https://neuroglancer-demo.appspot.com"
        shown = json.loads(unquote(state))
        assert shown["position"] == [row[axis] + 0.5 for axis in "xyz"]
        [layer] = [layer for layer in shown["layers"] if layer["name"] == "segmentation"]
        assert layer["source"][0]["url"].startswith(f"zarr3://{base}/")
        assert set(map(int, layer["segments"])) == {row["segment"], row["other_segment"]}


@pytest.fixture(scope="module")
def drawn(
    stitched: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Return a run, which tests leave as it is, and its list with twelve pictures."""
    run = tmp_path_factory.mktemp("drawn") / "run"
    shutil.copytree(stitched, run)
    words = ("--least", 10, "--top", 30, "--pictures", 12, "--json")
    done = agq("suspects", run, *words)
    assert done.returncode == 0, done.stderr
    return run, json.loads(done.stdout)["suspects"]


def pictures(run: Path) -> list[Path]:
    return sorted((run / "suspects" / "pictures").iterdir())


def panels(file: Path) -> list[np.ndarray]:
    """Return raw, now and mended, uint8 (y, x, 3), of a picture."""
    image = np.rint(255 * imread(file)[..., :3]).astype(np.uint8)
    width = (image.shape[1] - 12) // 3
    return [image[:, k * (width + 6) :][:, :width] for k in range(3)]


def hues(panel: np.ndarray) -> set[str]:
    """Return which of both colours a panel has."""
    red, blue = panel[..., 0].astype(int), panel[..., 2].astype(int)
    return {
        *(["orange"] if (red - blue > 40).sum() > 10 else []),
        *(["blue"] if (blue - red > 40).sum() > 10 else []),
    }


def test_pictures_show_both_sides_as_they_are_and_mended(
    drawn: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run, rows = tmp_path / "run", drawn[1]
    shutil.copytree(drawn[0], run)
    files = pictures(run)
    assert [file.name for file in files] == [f"{k:04}.png" for k in range(1, 13)]
    for row, file in zip(rows, files, strict=False):
        assert row["kind"] == MERGE
        raw, now, mended = panels(file)
        assert hues(raw) == set()
        assert (hues(now), hues(mended)) == ({"orange"}, {"orange", "blue"}), row
    again = [file.read_bytes() for file in files]
    done = agq("suspects", run, "--least", 10, "--top", 30, "--pictures", 12)
    assert (done.returncode, "12 pictures" in done.stdout) == (0, True)
    assert [file.read_bytes() for file in files] == again
    assert agq("suspects", run, "--least", 10, "--pictures", 2).returncode == 0
    assert len(pictures(run)) == 2


def test_the_page_has_the_list_and_its_pictures(drawn: tuple[Path, list[dict[str, Any]]]) -> None:
    run, rows = drawn
    view = RunView(run)
    listed = view.suspects()
    assert [row["segment"] for row in listed] == [str(row["segment"]) for row in rows]
    assert [row["drawn"] for row in listed] == [k < 12 for k in range(len(rows))]
    picture = view.suspect(1)
    assert picture == (run / "suspects" / "pictures" / "0001.png").read_bytes()
    assert view.suspect(13) is None
    assert view.overview(None)["suspects"] == (run / TABLE).stat().st_mtime


def test_a_list_of_another_stitch_is_not_shown(
    drawn: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn[0], run)
    assert read_suspects(run)
    [mark] = [m for m in run_marks(RunFolder(run), "nm") if m.name == "suspect merges"]
    assert mark.items
    words = ("--set", "stitch.across=0.95", "--set", "stitch.within=0.9")
    assert agq("stitch", run, *words).returncode == 0
    assert read_suspects(run) == []
    assert RunView(run).suspects() == []
    assert not [m for m in run_marks(RunFolder(run), "nm") if m.name.startswith("suspect")]
    done = agq("view", run, "--suspect", 1, "--print-state", "--base-url", "http://a/run")
    assert (done.returncode, "`agq suspects` lists them" in done.stderr) == (2, True)
    assert agq("suspects", run, "--least", 100, "--pictures", 5).returncode == 0
    assert {row["kind"] for row in read_suspects(run)} == {SPLIT}
    shown = [panels(file) for file in pictures(run)]
    assert [hues(raw) for raw, _, _ in shown] == [set()] * 5
    assert [hues(mended) for _, _, mended in shown] == [{"orange"}] * 5
    # Of a small side the plane may have only its border.
    assert sum(hues(now) == {"orange", "blue"} for _, now, _ in shown) >= 3


def test_a_viewer_starts_at_a_suspect(drawn: tuple[Path, list[dict[str, Any]]]) -> None:
    run, rows = drawn
    words = ("--print-state", "--base-url", "http://a/run")
    done = agq("view", run, "--suspect", 2, *words)
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    assert state["position"] == [rows[1][axis] + 0.5 for axis in "xyz"]
    for words_wrong in (("--suspect", 31), ("--suspect", 1, "--at", "1,1,1")):
        done = agq("view", run, *words_wrong, *words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_damaged_list_is_one_line(
    drawn: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn[0], run)
    (run / TABLE).write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="run `agq suspects` again"):
        read_suspects(run)


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


@pytest.mark.slow
def test_a_real_browser_shows_the_pictures_and_opens_the_viewer(
    drawn: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, rows = drawn
    asked = []

    def viewer(
        run_dir: Path, host: str, at: tuple[int, int, int], segments: tuple[int, ...]
    ) -> str:
        asked.append((run_dir, at, segments))
        return f"http://{host}:{server.port}/page.css"

    with serving(Runs([run]), viewer=viewer) as server, browser_page() as page:
        page.goto(server.address)
        page.wait_for_selector("#suspects figure")
        assert page.locator("#suspects figure").count() == len(rows)
        first = page.locator("#suspects figure").first
        image = first.locator("img")
        image.scroll_into_view_if_needed()
        width = panels(pictures(run)[0])[0].shape[1]
        page.wait_for_function("i => i.naturalWidth > 0", arg=image.element_handle())
        assert image.evaluate("i => i.naturalWidth") == 3 * width + 12
        assert first.inner_text().startswith("1. merge of 1: probability 0.99")
        with page.expect_popup() as opened:
            first.locator("a").click()
        opened.value.wait_for_load_state()
    assert asked == [(run, tuple(rows[0][axis] for axis in "zyx"), (rows[0]["segment"],))]


def test_what_edits_have_decided_is_no_suspect(
    drawn: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn[0], run)
    cut = drawn[1][0]
    assert cut["kind"] == MERGE
    pair = (cut["fragment"], cut["other_fragment"])
    edits = tmp_path / "edits.csv"

    def stitch(kind: str) -> None:
        edits.write_text(f"kind,a,b\n{kind},{pair[0]},{pair[1]}\n")
        assert agq("stitch", run, "--edits", edits).returncode == 0

    def sides() -> list[int]:
        """Return how many of both fragments are on one side of each cut."""
        with finder(RunFolder(run), 10) as found:
            cuts = [row for table in found.cuts(DEFAULT.value) for row in table.rows]
            return [int(np.isin(pair, side).sum()) for side in found.sides(cuts)]

    def pairs() -> set[tuple[int, int]]:
        with finder(RunFolder(run), 10) as found:
            rows = [row for table in found.pairs() for row in table.rows]
        return {(int(row["a"]), int(row["b"])) for row in rows}

    assert 1 in sides()
    stitch("merge")
    assert sides()
    assert 1 not in sides(), "a cut would undo the edit"
    stitch("split")
    lut = dict(zip(*(ids.tolist() for ids in all_owners(RunFolder(run))), strict=True))
    one, other = sorted(lut[fragment] for fragment in pair)
    assert one != other
    assert (one, other) not in pairs()
    monkeypatch.setattr(SegmentEvidence, "_allowed", lambda self, between: between)
    assert (one, other) in pairs(), "they touch"


def test_no_cut_parts_a_fragment_of_another_model_and_no_pair_joins_classes(
    tmp_path: Path,
) -> None:
    """Fragments of 20 columns in pieces; of the two halves one has a class that may not merge."""
    rng = np.random.default_rng(3)
    fragments = np.repeat(np.arange(1, 31, dtype=np.uint64), 20)[None, None].repeat(20, 0)
    fragments = np.ascontiguousarray(np.broadcast_to(fragments, (20, 8, 600)))
    classes = np.where(np.arange(600) < 300, 1, 2).astype(np.uint8)
    container = tmp_path / "in.zarr"
    write_volume(container, "fragments", fragments)
    write_volume(container, "classes", np.broadcast_to(classes, fragments.shape).copy())
    affinities = rng.integers(120, 180, (3, *fragments.shape)).astype(np.uint8)
    attributes = {"voxel_size": [30, 6, 6], "offset": [0, 0, 0], "units": ["nm"] * 3}
    zarr.create_array(str(container / "affinities"), data=affinities).attrs.update(attributes)
    words = ("--fragments", f"{container}::fragments", "--affinities", f"{container}::affinities")
    words += ("--output", tmp_path / "run", "--threshold", "0.588", "--voxel-size", "30,6,6")
    words += ("--set", f"input.classes.path={container}", "--set", "input.classes.dataset=classes")
    done = agq("stitch", *words)
    assert done.returncode == 0, done.stderr
    names = {}
    files = StitchFiles(tmp_path / "run")
    for path in sorted(files.contacts.glob("0/*.npz")):
        arrays = load_arrays(path, "nodes.ids", "names")
        names |= dict(zip(arrays["nodes.ids"].tolist(), arrays["names"].tolist(), strict=True))
    assert len(set(names.values())) == 30 < len(names)
    run = RunFolder(tmp_path / "run")
    with finder(run, 10) as found:
        cuts = [row for table in found.cuts(DEFAULT.value) for row in table.rows]
        pairs = [row for table in found.pairs() for row in table.rows]
        assert cuts
        for row in cuts:
            [side] = found.sides([row])
            sides = {name: set() for name in names.values()}
            for fragment, name in names.items():
                sides[name].add(bool(np.isin(fragment, side)))
            assert all(len(found) == 1 for found in sides.values())
    ends = {frozenset(names[int(row[end])] > 15 for end in ("u", "v")) for row in pairs}
    assert frozenset((True, False)) not in ends, "the contact of both classes is no suspect"
