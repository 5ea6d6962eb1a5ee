"""Blocks computed again because somebody names them."""

import pytest

from agq.blockwise.journal.reader import Journal
from agq.errors import InputError
from agq.pipeline.api import Run
from agq.pipeline.cli.arguments import parse_blocks, parse_box
from tests.helpers.runs import agq, make_config, results


def test_named_blocks_are_computed_again_and_no_others(tmp_path):
    config = make_config(tmp_path)
    run = Run(config)
    first = run.predict()
    before = results(run.path)
    done = agq("predict", config, "--blocks", "0,2-3", "--roi", "0:1,0:1,0:20", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "0, 1, 2, 3" in done.stdout
    assert Journal(run.path / "journal" / "predict").revision == 0
    lost = run.path / "data.zarr/fragments/c/0/0/2"
    lost.unlink()
    again = run.predict(blocks=[0, 2, 3], roi=((0, 0, 0), (1, 1, 20)))
    assert (again.blocks, again.done + again.skipped) == (4, 4)
    assert results(run.path) == before
    journal = Journal(run.path / "journal" / "predict")
    assert journal.counts()["done"] == first.done
    assert journal.conflicts == []
    assert run.predict().blocks == 0
    for wrong, message in (
        ({"blocks": [10**6]}, "no block 1000000"),
        ({"blocks": [-1]}, "no block -1"),
        ({"roi": ((90, 0, 0), (91, 9, 9))}, "no voxel of the volume"),
    ):
        with pytest.raises(InputError, match=message):
            run.predict(**wrong)
    smaller = Run(
        config, input={"roi": {"offset": [0, 0, 0], "shape": [1, 1, 1], "units": "voxels"}}
    )
    with pytest.raises(InputError, match=r"block 1 lies outside input\.roi"):
        smaller.predict(blocks=[0, 1])


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-2", "1,,2", "1.5"])
def test_bad_lists_of_blocks_are_one_line(text):
    with pytest.raises(InputError, match="--blocks"):
        parse_blocks(text)


def test_lists_of_blocks_and_boxes():
    assert parse_blocks("12, 40-44") == [12, 40, 41, 42, 43, 44]
    assert parse_box("--roi", "0:1,2:3,4:5") == ((0, 2, 4), (1, 3, 5))
    for wrong in ("0:1,2:3", "0:1,2:3,5:4", "a:b,0:1,0:1", "-1:2,0:1,0:1"):
        with pytest.raises(InputError, match="--roi"):
            parse_box("--roi", wrong)
