"""Records of a prediction that are damaged, or made to do harm."""

import json
import os
import random
from pathlib import Path

import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.predict.paths import session_path, spec_path
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.stitch.steps import Step
from tests.helpers.fuzz import attack, odd_json, require_one_line

GRID = BlockGrid(volume_shape=(40, 60, 80), voxel_size=(30, 6, 6), write_shape=(16, 32, 32))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    PredictSpec(
        run_dir=str(tmp_path),
        grid=GRID.to_dict(),
        raw={"path": "a.zarr", "dataset": "raw"},
        factory="agq.model.predictor:AGQPredictor",
        options={"checkpoint": "demo"},
        contrast=((0.0, 1.0),),
        bad_sections=(3,),
    ).save()
    Session(id="a", host="h", port=7, token="t").save(tmp_path)
    (tmp_path / "stitch").mkdir()
    (tmp_path / "stitch" / "lut.json").write_text('{"key": "a", "done": true, "result": {}}')
    return tmp_path


READERS = {
    "predict.json": PredictSpec.load,
    "session.json": Session.load,
    "stitch/lut.json": lambda run: Step.read(run, "lut"),
}


@pytest.mark.fuzz
@pytest.mark.parametrize("name", READERS)
def test_damaged_records(run: Path, name: str) -> None:
    document = json.loads((run / name).read_bytes())

    def look(data: bytes) -> None:
        (run / name).write_bytes(data)
        found = READERS[name](run)
        if isinstance(found, PredictSpec):
            found.block_grid().select((0, 0, 0), (1, 1, 1))

    def case(rng: random.Random) -> bytes:
        return odd_json(rng, document)

    assert attack(look, case, 150)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge", "deep", "list"])
def test_what_is_no_record(run: Path, name: str, kind: str) -> None:
    assert spec_path(run) == run / "predict.json"
    assert session_path(run) == run / "session.json"
    path = run / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.write_text("[]" if kind == "list" else "[" * 200_000 + "]" * 200_000)
    assert path.name in require_one_line(lambda: READERS[name](run))
