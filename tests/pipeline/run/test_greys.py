"""Grey values and bad sections of a run: what is refused, suggested, replaced and kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.volumes.open import open_volume
from agq.errors import InputError
from agq.pipeline.config.schema import InputSettings, load_config
from agq.pipeline.run import greys
from agq.pipeline.run.prepare import prepare
from tests.helpers.runs import blobs, make_config, results, write_volume

DEMO = {"factory": "agq.model.predictor:AGQPredictor"}


def grey(shape: tuple[int, int, int] = (12, 40, 50)) -> np.ndarray:
    return np.clip(np.random.default_rng(0).normal(128, 40, shape), 1, 254)


def config_of(folder: Path, data: np.ndarray | None = None, **sections: Any) -> Path:
    if data is not None:
        write_volume(folder / "in.zarr", "raw", data)
    return make_config(folder, **sections)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([12, "40-44"], (12, 40, 41, 42, 43, 44)),
        ("3, 1,7 - 8,3", (1, 3, 7, 8)),
        (5, (5,)),
        ([], ()),
    ],
)
def test_sections_are_numbers_and_ranges(given, expected):
    raw = {"path": "a.zarr"}
    assert InputSettings(raw=raw, bad_sections=given).bad_sections == expected


@pytest.mark.parametrize("given", [["a"], [-3], ["5-3"], [1.5], [True], ["1-"], [[1]], None, ""])
def test_other_sections_are_refused(main, tmp_path, given):
    config = config_of(tmp_path)
    code, _, err = main("plan", config, "--set", f"input.bad_sections={json.dumps(given)}")
    assert code == 2
    assert "input.bad_sections" in err
    assert len(err.strip().splitlines()) == 1


def test_sections_outside_the_volume_are_refused(main, tmp_path):
    config = config_of(tmp_path)
    for given, expected in [("[20]", "has 0 to 19"), ("['0-19']", "every section")]:
        code, _, err = main("plan", config, "--set", f"input.bad_sections={given}")
        assert code == 2
        assert f"input.bad_sections: {'section 20' if '[20]' in given else ''}" in err
        assert expected in err


@pytest.mark.parametrize(
    ("data", "refusal", "note"),
    [
        (grey().astype(np.uint8), None, None),
        ((grey() * 257).astype(np.uint16), None, None),
        ((grey() * 16).astype(np.uint16), "% of what uint16 holds", None),
        ((grey() * 40).astype(np.uint16), None, "model.normalise"),
        ((grey() / 30 + 100).astype(np.uint8), "the network would see next to nothing", None),
        ((grey() / 255).astype(np.float32), None, None),
        (grey().astype(np.float32), "the network takes 0 to 1", None),
        ((grey() / 128 - 1).astype(np.float32), "the network takes 0 to 1", None),
        ((grey() / 2550).astype(np.float32), "of what float32 holds", None),
        (np.zeros((12, 40, 50), np.uint8), None, None),
    ],
)
def test_grey_values_that_the_network_cannot_use_are_refused(tmp_path, data, refusal, note):
    config = load_config(config_of(tmp_path, data, model=DEMO))
    if refusal is None:
        assert [note in found for found in prepare(config).notes] == (
            [] if note is None else [True]
        )
        return
    with pytest.raises(InputError, match=r"input\.raw: .*model\.normalise: volume") as error:
        prepare(config)
    assert refusal in str(error.value)
    for normalise in ("none", "volume", "section"):
        prepare(load_config(config_of(tmp_path, model=DEMO | {"normalise": normalise})))
    assert not prepare(load_config(make_config(tmp_path))).notes  # a model of the user's own


def test_settings_that_are_not_used_are_not_of_the_identity(tmp_path):
    identity = prepare(load_config(config_of(tmp_path))).identity
    assert not {"bad_sections", "normalise"} & set(identity)
    fill = {"bad_sections_fill": "mask", "raw": {"path": str(tmp_path / "in.zarr")}}
    unused = config_of(tmp_path, input=fill, model={"normalise": "none"})
    assert prepare(load_config(unused)).identity.keys() == identity.keys()
    used = config_of(tmp_path, input=fill | {"bad_sections": [3]}, model={"normalise": "section"})
    found = prepare(load_config(used)).identity
    assert found["bad_sections"] == {"sections": [3], "fill": "mask"}
    assert found["normalise"] == "section"


def test_the_plan_suggests_sections_and_applies_none(main, tmp_path):
    data = grey((30, 60, 60)).astype(np.uint8)
    data[4] = 0
    data[11:14] = 200
    data[20] = data[20] // 6 + 100
    config = config_of(tmp_path, data, model=DEMO)
    plan = json.loads(main("plan", config, "--no-time", "--json")[1])
    (note,) = plan["notes"]
    assert "4 blank, 11-13 low contrast, 20 low contrast" in note
    assert "input.bad_sections: [4, 11-13, 20]" in note
    code, text, err = main("plan", config, "--no-time", "--set", "input.bad_sections=[4,11-13]")
    assert code == 0, err
    assert "stand out: 20 low contrast" in text
    assert "input.bad_sections: [4, 11-13, 20]" in " ".join(text.split())
    assert prepare(load_config(config)).identity.keys() <= {
        "raw", "mask", "grid", "model", "affinities", "classes", "content", "device",
    }  # fmt: skip


def test_a_volume_without_faults_gets_no_suggestion(main, tmp_path):
    config = config_of(tmp_path, blobs((20, 50, 70)))
    assert json.loads(main("plan", config, "--no-time", "--json")[1])["notes"] == []


def test_a_run_with_bad_sections_is_that_of_a_mended_volume(main, tmp_path, monkeypatch):
    """Resumed too: what was measured at the start stays, though raw reads otherwise later."""
    data = blobs((20, 50, 70))
    broken = data.copy()
    broken[6:8] = 255
    config = config_of(
        tmp_path / "a",
        broken,
        input={"raw": {"path": str(tmp_path / "a/in.zarr")}, "bad_sections": ["6-7"]},
        model={"normalise": "section"},
        output={"affinities": True},
    )
    part = ["--set", "input.roi={offset: [0, 0, 0], shape: [5, 20, 20]}"]
    assert main("predict", config, *part)[0] == 0
    spec = PredictSpec.load(tmp_path / "a/run")
    assert spec.contrast is not None
    assert len(spec.contrast) == 20
    assert json.loads((tmp_path / "a/run/run.json").read_bytes())["config"]["input"][
        "bad_sections"
    ] == [6, 7]
    monkeypatch.setattr(greys, "read_sections", None)
    code, _, err = main("predict", config)
    assert code == 0, err

    mended = data.copy()
    mended[6], mended[7] = data[5], data[8]
    source = [5 if z == 6 else 8 if z == 7 else z for z in range(20)]
    black, white = np.array(spec.contrast, np.float32)[source].T[:, :, None, None]
    stretched = np.clip((mended.astype(np.float32) - black) / (white - black), 0, 1)
    write_volume(tmp_path / "b/in.zarr", "raw", np.rint(stretched * np.float32(255)).astype("u1"))
    plain = make_config(tmp_path / "b", output={"affinities": True})
    assert main("predict", plain)[0] == 0
    assert results(tmp_path / "a/run") == results(tmp_path / "b/run")


def test_masked_sections_have_no_label(main, tmp_path):
    config = config_of(
        tmp_path,
        input={
            "raw": {"path": str(tmp_path / "in.zarr")},
            "bad_sections": [3, "9-16"],
            "bad_sections_fill": "mask",
        },
        output={"affinities": True},
    )
    code, _, err = main("predict", config)
    assert code == 0, err
    container = tmp_path / "run" / "data.zarr"
    labels = open_volume(container, "fragments", kind="labels")
    found = labels.read((0, 0, 0), labels.shape).any(axis=(1, 2))
    assert np.flatnonzero(~found).tolist() == [3, *range(9, 17)]
