"""Whether a result is plausible: figures, rules, and commands that work as they are printed."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.volumes.create import create_affinities, create_array
from agq.pipeline.cli.main import app
from agq.pipeline.evaluate import plausibility
from agq.pipeline.evaluate.plausibility import assess, recorded_plausibility

PLACED: Any = {"voxel_size": (30, 6, 6), "offset": (0, 0, 0)}


def stitched(
    folder: Path,
    voxels: Any,
    fragments: Any,
    labels: tuple[int, ...] = (9,) * 8,
    voxel_size: Any = (30, 6, 6),
    unit: str = "nm",
) -> Path:
    """Write what is read of a stitched folder: the table of segments, journal, metadata."""
    (folder / "lut").mkdir(parents=True)
    columns = {
        "segment": np.arange(len(voxels)),
        "voxels": np.asarray(voxels, np.int64),
        "fragments": np.asarray(fragments, np.int64),
    }
    pq.write_table(pa.table(columns), folder / "lut" / "segments.parquet", row_group_size=1000)
    create_array(
        folder / "data.zarr",
        "fragments",
        shape=(2, 2, 2),
        chunks=(2, 2, 2),
        dtype=np.uint64,
        voxel_size=voxel_size,
        unit=unit,
    )
    with JournalWriter(folder / "journal" / "predict", WorkerInfo("w", "node", 1)) as journal:
        for block, n in enumerate(labels):
            journal.finish(BlockRecord(block, "done", labels=n, dropped=2))
    return folder


def titles(folder: Path, thresholds: Thresholds | None = None, *, truth: bool = False) -> list[str]:
    found = assess(folder, thresholds or Thresholds(), truth=truth)
    assert found is not None
    return [advice.title for advice in found.advice]


def test_figures(tmp_path: Path) -> None:
    """Against sorting all sizes; several pieces, and sizes over ten orders of magnitude."""
    rng = np.random.default_rng(1)
    voxels = np.exp(rng.uniform(0, 23, 200_001)).astype(np.int64)
    fragments = rng.integers(1, 4, voxels.size)
    found = assess(stitched(tmp_path, voxels, fragments), Thresholds(), truth=False)
    assert found is not None
    ordered = np.sort(voxels)
    half = ordered[np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)]
    assert (found.segments, found.fragments, found.voxels) == (
        voxels.size,
        fragments.sum(),
        voxels.sum(),
    )
    assert found.median_voxels == pytest.approx(np.median(voxels), rel=0.01)
    assert found.half_voxels == pytest.approx(half, rel=0.01)
    assert found.largest == pytest.approx(voxels.max() / voxels.sum())
    assert found.merged == pytest.approx(fragments[fragments > 1].sum() / fragments.sum())
    assert (found.blocks, found.empty_blocks, found.dropped) == (8, 0, 16)
    assert found.voxel_nm3 == 1080
    again = recorded_plausibility(json.loads(json.dumps({"plausibility": found.to_dict()})))
    assert again == found


def test_small_sizes_are_exact(tmp_path: Path) -> None:
    for k, voxels in enumerate(([7], [255, 255, 3], [1, 2, 3, 4])):
        found = assess(stitched(tmp_path / str(k), voxels, voxels), Thresholds(), truth=False)
        assert found is not None
        assert found.median_voxels == np.sort(voxels)[(len(voxels) - 1) // 2]


@pytest.mark.parametrize(
    ("voxels", "fragments", "labels", "said"),
    [
        ([10**5] * 40, [9] * 40, (9,) * 8, []),
        ([4 * 10**6, *[10**5] * 10], [50] * 11, (9,) * 8, ["looks merged too far"]),
        ([10**5] * 40, [1] * 40, (9,) * 8, ["looks too split"]),
        ([10**5] * 40, [1] * 40, (9,) * 7, []),  # few blocks
        ([10**6, *[20] * 40], [100, *[1] * 40], (9,) * 8, ["looks merged too far", "many specks"]),
        ([10**5] * 40, [9] * 40, (0, 0, 0, 0, 0, 0, 9, 9), ["looks empty"]),
        ([10**5] * 40, [9] * 40, (0,) * 8, []),  # not counted, as of fragments of another model
        ([600_000, *[20] * 40], [1] * 41, (9,) * 8, []),  # too small to judge
    ],
)
def test_rules(
    tmp_path: Path, voxels: Any, fragments: Any, labels: tuple[int, ...], said: list[str]
) -> None:
    assert titles(stitched(tmp_path, voxels, fragments, labels)) == said


def test_a_speck_is_a_volume_and_not_a_count(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"isotropic": ((80, 80, 80), "angstrom"), "thick": ((40, 32, 32), "nm")}
    for name, (size, unit) in sizes.items():
        for voxels, specks in ((200, name == "isotropic"), (260, False), (9, True)):
            folder = tmp_path / f"{name}-{voxels}"
            many = [voxels] * 60 + [10**6] * 50
            stitched(folder, many, [9] * len(many), voxel_size=size, unit=unit)
            assert (titles(folder) == ["many specks"]) == specks, (name, voxels)


def test_what_cannot_be_measured_is_no_error(tmp_path: Path) -> None:
    assert assess(tmp_path, Thresholds(), truth=False) is None
    assert assess(stitched(tmp_path / "none", [], []), Thresholds(), truth=False) is None
    folder = stitched(tmp_path / "bad", [5], [1])
    (folder / "lut" / "segments.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert assess(folder, Thresholds(), truth=False) is None
    for entry in ({}, {"plausibility": None}, {"plausibility": {"segments": "many"}}):
        assert recorded_plausibility(entry) is None


def run_line(line: str) -> Any:
    program, *words = shlex.split(line)
    assert program == "agq"
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def commands_of(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.startswith("  agq ")]


def test_the_commands_work_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fragments of another model: merged into one, then cut, then too split, then merged again."""
    monkeypatch.setattr(plausibility, "LEAST_VOXELS", 1000)
    monkeypatch.setattr(plausibility, "LEAST_BLOCKS", 1)
    folder = tmp_path / "a folder"
    folder.mkdir()
    shape = (4, 20, 20)
    options: Any = {"shape": shape, "chunks": (4, 10, 10), **PLACED}
    labels = np.arange(1, 5).repeat(5)[None, None, :] + np.zeros(shape, int)
    create_array(folder / "in.zarr", "fragments", dtype=np.uint64, **options)[:] = labels
    affinities = create_affinities(folder / "in.zarr", "affinities", **options)
    # 0.52 between neighbouring fragments: above the threshold 0.5, below 0.55.
    affinities[:] = 133
    out = folder / "out"
    stitch = ("agq", "stitch", "--fragments", f"{folder}/in.zarr::fragments")
    more = ("--affinities", f"{folder}/in.zarr::affinities", "--output", str(out))
    printed = run_line(shlex.join([*stitch, *more]))
    assert "looks merged too far: one segment holds 100.0 %" in printed
    (command,) = commands_of(printed)
    assert command == shlex.join(["agq", "stitch", str(out), "--margin=0.05"])
    printed = run_line(command)
    assert "looks merged too far" not in printed
    entry = json.loads((out / "run.json").read_text())["stages"]["stitch"]
    found = recorded_plausibility(entry)
    assert found is not None
    assert found.segments == 4
    assert "looks too split" in printed
    (command,) = commands_of(printed)
    assert command.endswith(" --margin=0")
    assert "looks merged too far" in run_line(command)
