"""The search for thresholds: edges, going on beyond them, picture, the command that applies it."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.cli.score.score import sweep
from agq.pipeline.evaluate.scores import Scores
from agq.pipeline.evaluate.sweep import MOST_ROUNDS, Point, Search, search_pairs
from agq.pipeline.folder import RunFolder
from tests.helpers.runs import agq, blobs, make_config, write_volume


def bowl(at: tuple[float, float]) -> Any:
    """Return scores with one minimum, and the pairs that were asked for."""
    asked: list[tuple[float, float]] = []

    def score(across: Sequence[float], within: Sequence[float]) -> list[Point]:
        points = []
        for a in across:
            for w in within:
                asked.append((a, w))
                error = (a - at[0]) ** 2 + (w - at[1]) ** 2
                scores = Scores(error / 2, error / 2, error, 0.5, 0.5)
                both = {"background_filled": scores, "as_is": scores}
                points.append(Point("AGQ", {"across": a, "within": w}, 1, both))
        return points

    return score, asked


def test_a_best_pair_inside_ends_the_search() -> None:
    score, asked = bowl((0.7, 0.8))
    found = search_pairs(score, (0.6, 0.7, 0.8), (0.9, 0.8, 0.7), rounds=MOST_ROUNDS)
    assert found.best.setting == {"across": 0.7, "within": 0.8}
    assert (found.beyond(), found.rounds, len(asked)) == ({}, 0, 9)


@pytest.mark.parametrize("rounds", [0, 1, MOST_ROUNDS])
def test_the_search_goes_on_beyond_its_edge(rounds: int) -> None:
    score, asked = bowl((0.15, 0.6))
    found = search_pairs(score, (0.6, 0.7, 0.8), (0.6, 0.7), rounds=rounds)
    if rounds == 0:
        assert found.beyond() == {"across": (0.3, 0.4, 0.5), "within": (0.3, 0.4, 0.5)}
        return
    assert len(set(asked)) == len(asked), "no pair is scored twice"
    assert len(asked) == len(found.across) * len(found.within) == len(found.points)
    assert found.within == (0.3, 0.4, 0.5, 0.6, 0.7)
    if rounds == 1:
        assert found.best.setting["across"] == 0.3
        assert found.beyond() == {"across": (0.0, 0.1, 0.2)}
    else:
        assert found.best.setting["across"] in (0.1, 0.2)
        assert (found.beyond(), found.rounds) == ({}, 2)


@pytest.mark.parametrize(
    ("across", "within", "at", "beyond"),
    [
        ((0.7, 0.9), (0.5, 1.0), (1.0, 1.0), {"across": (1.0,)}),  # there is nothing above 1
        ((0.0, 0.1), (0.5, 0.6, 0.7), (0.0, 0.6), {}),
        ((0.7,), (0.5, 0.6, 0.7), (0.1, 0.6), {}),  # one value is no range
    ],
)
def test_edges(across: Any, within: Any, at: Any, beyond: Any) -> None:
    found: Search = search_pairs(bowl(at)[0], across, within)
    assert found.beyond() == beyond


def test_a_sweep_ends_with_a_command_that_applies_the_best(tmp_path: Path) -> None:
    config = make_config(tmp_path, blobs((8, 34, 34)), stitch={"margin": 0.1})
    done = agq("run", config)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    labels = open_volume(run / "data.zarr", "segmentation", level=0, kind="labels").read(
        (0, 0, 0), (8, 34, 34)
    )
    write_volume(tmp_path / "in.zarr", "truth", labels.astype(np.uint32))
    words = ("sweep", run, "--truth", f"{tmp_path}/in.zarr::truth", "--plot", tmp_path / "s.png")
    done = agq(*words, "--across", "0.8,0.9,0.95", "--within", "0.9", "--widen")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    report = json.loads((run / "sweep.json").read_text())
    assert last == f"To apply the best: {report['apply']}"
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 500
    program, *command = shlex.split(report["apply"])
    assert (program, command[-2:]) == ("agq", ["--margin", "0"])
    done = agq(*command)
    assert done.returncode == 0, done.stderr
    stitch = RunFolder(run).config()["stitch"]
    best = report["best"]["setting"]
    assert (stitch["across"], stitch["within"], stitch["margin"]) == (
        best["across"],
        best["within"],
        0,
    )
    with pytest.raises(InputError, match="does not exist"):
        sweep(run, plot=tmp_path / "no" / "s.png")
