"""Whole addresses beside a record that does not say them."""

import json
import os

import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.predict.paths import spec_path
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.storage.addresses import put_away, put_back
from agq.errors import DamagedError

RAW = "http://user:RAWSECRET@host/in.zarr?sig=QUERYSECRET"
SHOWN = "http://user:***@host/in.zarr?***"
VALUES = {"input": {"raw": {"path": RAW}, "mask": {"path": "s3://b/m"}}, "list": [1, RAW, None]}


def test_a_record_without_secrets_is_whole_again(tmp_path):
    record = tmp_path / "run.json"
    shown = put_away(record, VALUES)
    assert shown["input"]["raw"]["path"] == shown["list"][1] == SHOWN
    assert put_back(record, shown) == VALUES
    file = tmp_path / "run.secrets.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_bytes()) == {SHOWN: RAW}
    assert not put_away(record, {"input": {"mask": VALUES["input"]["mask"]}}).get("list")


def test_what_is_hidden_already_stays_known(tmp_path):
    record = tmp_path / "run.json"
    shown = put_away(record, VALUES)
    assert put_away(record, shown) == shown
    assert put_back(record, shown) == VALUES
    # A new signature takes the place of the old one; what is named no more is forgotten.
    fresh = RAW.replace("QUERYSECRET", "FRESH1")
    put_away(record, {"a": fresh})
    assert put_back(record, {"a": SHOWN}) == {"a": fresh}
    put_away(record, {"a": "plain"})
    assert put_back(record, {"a": SHOWN}) == {"a": SHOWN}


def test_without_secrets_no_file_is_made(tmp_path):
    put_away(tmp_path / "run.json", {"path": "/data/in.zarr", "unit": "nm"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"a": 1}', '{"http://user:***@host/": "http://eve"}']
)
def test_a_file_that_was_changed_is_named(tmp_path, text):
    (tmp_path / "run.secrets.json").write_text(text)
    with pytest.raises(DamagedError, match=r"run\.secrets\.json is damaged: delete it"):
        put_back(tmp_path / "run.json", {})
    put_away(tmp_path / "run.json", VALUES)
    assert put_back(tmp_path / "run.json", {"a": SHOWN}) == {"a": RAW}


def test_what_workers_read_of_a_prediction(tmp_path):
    grid = BlockGrid(
        volume_shape=(4, 8, 8), voxel_size=(1, 1, 1), write_shape=(4, 8, 8), after=(0, 0, 0)
    )
    spec = PredictSpec(
        run_dir=str(tmp_path),
        raw={"path": RAW},
        grid=grid.to_dict(),
        factory="a:b",
        options={"weights": RAW},
    )
    before = os.umask(0)
    try:
        spec.save()
    finally:
        os.umask(before)
    assert "SECRET" not in spec_path(tmp_path).read_text()
    assert spec_path(tmp_path).stat().st_mode & 0o777 == 0o644
    assert PredictSpec.load(tmp_path) == spec
