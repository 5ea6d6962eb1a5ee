"""What single processes must bear, and that a plan and the page on scale say it."""

import json
import math
import runpy
from pathlib import Path

import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.create import create_array
from agq.pipeline.forecast.scale import DENSE, SPARSE, cross_sections, scale
from tests.helpers import ROOT
from tests.helpers.runs import make_config


def grid(*shape: int) -> BlockGrid:
    volume = tuple(n * w for n, w in zip(shape, (16, 256, 256), strict=True))
    return BlockGrid(volume, (30, 6, 6), (16, 256, 256), (0, 0, 0), (1, 1, 1), (0, 0, 0))


def test_the_last_merge_grows_with_cross_sections_and_not_with_blocks() -> None:
    assert cross_sections((2, 3, 5)) == 2 * (15 + 10 + 6)
    assert cross_sections((1, 3, 5)) == 2 * (5 + 3), "a single layer has no plane across z"
    one, other = (scale(grid(n, n, n), n**3, n**3, SPARSE) for n in (20, 40))
    assert other.root_edges == pytest.approx(4 * one.root_edges)
    assert other.coordinator_bytes - one.coordinator_bytes == pytest.approx(77 * 56_000, abs=1)
    part = scale(grid(40, 40, 40), 8000, 8000, SPARSE)
    assert part.root_edges == pytest.approx(one.root_edges)
    dense = scale(grid(20, 20, 20), 8000, 8000, DENSE)
    assert dense.root_edges == pytest.approx(one.root_edges * DENSE.edges / SPARSE.edges)


def test_what_breaks_first_is_said_with_what_helps() -> None:
    assert scale(grid(10, 40, 40), 16_000, 16_000, DENSE).limits() == []
    said = scale(grid(500, 1000, 2000), 10**9, 10**9, DENSE).limits()
    for line, words in zip(said, ("stitch.min_contact", "input.roi", "quota"), strict=True):
        assert words in line
    [quota] = scale(grid(50, 100, 200), 10**6, 10**6, SPARSE, affinities=True).limits()
    assert "3,000,000 files" in quota


def test_the_page_has_the_table_as_it_is_computed() -> None:
    computed = runpy.run_path(str(ROOT / "benchmarks" / "scale.py"))
    assert computed["table"]() in (ROOT / "docs" / "scale.md").read_text()
    for name, shape in computed["GRIDS"].items():
        voxels = math.prod(shape) * math.prod(computed["WRITE"])
        assert voxels == pytest.approx(10 ** int(name[3:]), rel=0.05)


def test_a_plan_of_what_does_not_fit_the_disk_is_printed_and_refused(main, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    code, text, _ = main("plan", config)
    assert code == 0
    assert "memory: coordinator    about 2" in text
    assert "memory: last merge     about 2" in text
    create_array(
        tmp_path / "huge.zarr",
        "raw",
        shape=(16_000, 64_000, 64_000),
        chunks=(64, 512, 512),
        dtype="uint8",
        voxel_size=(30, 6, 6),
        offset=(0, 0, 0),
    )
    huge = ("--set", f"input.raw.path={tmp_path / 'huge.zarr'}")
    large = ("--set", "blocks.read_shape=[34,514,514]", "--assume", "1")
    code, text, err = main("plan", config, *huge, *large)
    assert code == 2
    assert "needs about" in err
    assert "limit                  about " in text
    plan = json.loads(main("plan", config, *huge, *large, "--json")[1])
    assert plan["scale"]["dense"]["files_peak"] == 2 * plan["blocks"]
    assert not (tmp_path / "run" / "data.zarr").exists()
