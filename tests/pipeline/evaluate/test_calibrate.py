"""`agq calibrate`: what is chosen, held out and written."""

import json
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.stitch.settings import StitchSettings
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.config.edit import set_values
from agq.pipeline.evaluate.calibrate import TILES, tiles
from agq.pipeline.evaluate.sweep import thresholds_of
from tests.helpers.runs import agq, blobs, make_config, stored, write_volume


def test_settings_are_chosen_and_written(tmp_path: Path) -> None:
    done = agq("run", make_config(tmp_path, blobs((8, 34, 34))))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    labels = open_volume(run / "data.zarr", "segmentation", level=0, kind="labels").read(
        (0, 0, 0), (8, 34, 34)
    )
    write_volume(tmp_path / "in.zarr", "truth", labels.astype(np.uint32))
    config = tmp_path / "my.yaml"
    config.write_text("# mine\nstitch:\n  across: 0.1  # low\nmodel: {checkpoint: em}\n")
    tried = ("--across", "0.7,0.99", "--within", "1.0", "--min-contact", "0", "--min-size", "0")
    truth = f"{tmp_path}/in.zarr::truth"
    done = agq("calibrate", run, "--truth", truth, *tried, "--merge-price", 3, "--write", config)
    assert done.returncode == 0, done.stderr
    report = json.loads((run / "calibration.json").read_text())
    best = report["best"]
    costs = [
        report[name]["chosen_on"][0] + 3 * report[name]["chosen_on"][1]
        for name in ("best", "before", "best_held_out")
    ]
    assert costs[0] == min(costs)
    assert report["lost_on_held_out"] >= 0
    assert report["apply"] in done.stdout
    lines = config.read_text().splitlines()
    assert lines[0] == "# mine"
    assert f"  across: {best['setting']['across']:g}  # low" in lines
    assert "model: {checkpoint: em}" in lines
    done = agq("calibrate", run, "--truth", truth, "--write", tmp_path / "none.yaml")
    assert (done.returncode, "no such configuration" in done.stderr) == (2, True)


def test_tiles_are_a_checkerboard(tmp_path: Path) -> None:
    truth = stored(tmp_path / "t.zarr", np.ones((3, 40, 60), np.uint32), size=(30, 6, 6))
    parts = tiles(truth)
    assert sum(np.prod(part.shape) for part in parts) == 3 * 40 * 60
    places = [
        [round(4 * (o - t) / (n * s)) for o, t, n, s in zip(*where, strict=True)]
        for where in (
            (part.offset[1:], truth.offset[1:], truth.shape[1:], (6, 6)) for part in parts
        )
    ]
    assert len({tuple(place) for place in places}) == TILES**2
    assert [sum(place) % 2 for place in places] == [0, 1] * (TILES**2 // 2)
    with pytest.raises(InputError, match="too few"):
        tiles(stored(tmp_path / "s.zarr", np.ones((3, 3, 2), np.uint32)))


def test_what_is_not_searched_stays() -> None:
    settings = StitchSettings(min_contact=7, evidence="both", overlap=0.3, margin=0.1)
    made = thresholds_of(settings, across=0.4, within=0.6)
    assert (made.min_contact, made.evidence, made.overlap) == (7, "both", 0.3)
    assert (made.across, made.within, made.margin) == (0.4, 0.6, 0.0)


def test_values_are_set_in_place(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("a: 1\nstitch:\n    within: 0.5\n    # why\n    across: 0.1\nb: 2\n")
    set_values(config, {"stitch.across": "0.6", "stitch.min_size": "100"})
    assert config.read_text() == (
        "a: 1\nstitch:\n    min_size: 100\n    within: 0.5\n    # why\n    across: 0.6\nb: 2\n"
    )
    config.write_text("a: 1\n")
    set_values(config, {"stitch.across": "0.6"})
    assert config.read_text() == "a: 1\n\nstitch:\n  across: 0.6\n"
    config.write_text("stitch: {across: 0.1}\n")
    with pytest.raises(InputError, match="by hand"):
        set_values(config, {"stitch.across": "0.6"})
