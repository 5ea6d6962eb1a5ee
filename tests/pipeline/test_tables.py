"""Tables are whole: in a narrow terminal, in an ordinary one, and in a pipe."""

import dataclasses
import importlib
import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress_bar import ProgressBar
from rich.text import Text

from agq import terminal
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.predict.coordinator import PredictReport
from agq.blockwise.stitch.run import StitchReport
from agq.blockwise.verify.report import Problem, VerifyReport
from agq.pipeline.api import RunReport
from agq.pipeline.evaluate.baseline.compare import METHODS, BaselineReport
from agq.pipeline.evaluate.baseline.watershed import WatershedSettings
from agq.pipeline.evaluate.block_scores import BlockReport, BlockScore
from agq.pipeline.evaluate.calibrate import Calibration, Trial
from agq.pipeline.evaluate.scores import Disagreement, EvaluationReport, Scores
from agq.pipeline.evaluate.sweep import Point, points_table
from agq.pipeline.forecast.scale import DENSE, scale
from agq.pipeline.run.chosen_blocks import ChosenBlocks
from agq.pipeline.run.plan import Plan
from agq.pipeline.status.run_status import (
    Failure,
    FailureGroup,
    ForecastStatus,
    RunStatus,
    StageStatus,
    WorkerStatus,
)
from agq.pipeline.status.text import render
from agq.tables import Tabled
from agq.terminal import WholeTable, facts
from tests.helpers import ROOT

PLANNED: dict[str, Any] = {
    "run_dir": "/runs/one", "volume_shape": (12, 3400, 5600), "voxel_size": (30, 6, 6),
    "unit": "nm", "notes": ("a note of many words " * 8,), "grid_shape": (1, 22, 33),
    "read_shape": (17, 257, 257), "write_shape": (16, 256, 256), "blocks": 1_234_567, "done": 1,
    "masked": 2, "todo": 3, "free_bytes": 10**13, "raw": "/data/raw.zarr::raw", "settings": {},
}  # fmt: skip


class CheapPlan(Plan):
    """A plan whose forecast is one line (`tests/pipeline/forecast` has the others)."""

    def _cost(self) -> list[tuple[str, str]]:
        return [("predict", "about 3h 20m, from one block that was computed on this machine")]


SCORES = Scores(0.1234, 1.2345, 0.3456, 0.4567, 0.5678)


def printed(monkeypatch, renderable, width: int | None) -> str:
    """Return what a terminal of this width shows, before it wraps lines; None: a pipe."""
    console = terminal.console()
    monkeypatch.setattr(console, "_force_terminal", width is not None)
    monkeypatch.setattr(console, "_color_system", None)
    console.width = width or 80
    console.file = io.StringIO()
    console.print(renderable)
    text: str = console.file.getvalue()
    return text


def words(text: str) -> set[str]:
    return set(text.replace("\n", " ").split())


def evaluation() -> tuple[object, list[str]]:
    parts = ((7_654_321, 12_345_678, (30_015, 36_003, 60_003)), (8, 90, (15, 3, 9)))
    wrong = Disagreement(4_711_471, 0.5, 123, parts)
    report = EvaluationReport(
        "/runs/one::x", "/truth::labels", (0, 0, 0), (1, 2, 3), (30, 6, 6), "nm",
        {"radius": 2, "axes": "yx"}, 12_345, 0.1, 0.0, 150.0, 7, 9, SCORES, SCORES, None,
        [wrong], [wrong],
    )  # fmt: skip
    said = ["as is", "filled, by the nearest within 150 nm", "0.1234", "0.5678", "4711471"]
    return report.table(), [*said, "12,345,678", "1000,6000,10000", "30015,36003,60003"]


def sweep() -> tuple[object, list[str]]:
    scores = {"background_filled": SCORES, "as_is": SCORES}
    point = Point("AGQ", {"across": 0.55, "within": 0.575}, 12_345_678, scores)
    return points_table([point, point], "one: the best of 2 settings"), [
        *("AGQ", "0.55", "0.575", "12345678", "0.3456", "one:"),
    ]


def baseline() -> tuple[object, list[str]]:
    scores = {"background_filled": SCORES, "as_is": SCORES}
    agq = Point("AGQ", {"across": 0.55, "within": 0.575}, 1234, scores)
    others = [Point(method, {"affinity": 0.95}, 99, scores) for method in METHODS]
    report = BaselineReport(
        "/runs/one", "/truth::labels", WatershedSettings(), agq, others, [agq, *others], 100, [],
        None, "/runs/one/baselines/x/data.zarr/segmentation", {"watershed": 1.25},
    )  # fmt: skip
    said = ["removed", "fewer than 100 voxels", "75 %", "mean", "0.95", "0.575", "1.2 s"]
    return report.table(), said


def calibration() -> tuple[object, list[str]]:
    setting = {"across": 0.55, "within": 0.575, "min_contact": 123, "min_size": 12_345_678}
    trial = Trial(setting, (0.5432, 0.2345), (0.5678, 0.3456), ((0.5, 0.25), (0.75, 0.5)))
    report = Calibration("one", 2.0, trial, trial, trial, 16)
    return report.table(), ["0.55", "0.575", "123", "12345678", "0.5432", "0.3456", "16"]


def blocks() -> tuple[object, list[str]]:
    place = (1000, 25_600, 51_200), (30_015, 153_603, 307_203)
    score = BlockScore(123_456, *place, 10, SCORES, SCORES)
    said = ["one: 1 blocks", "mean", "123456", "1000,25600,51200", "30015,153603,307203", "1.3579"]
    return BlockReport("one", "nm", [score]).table(), said


def stitch() -> tuple[object, list[str]]:
    report = StitchReport(
        edits={"sha256": "", "merges": 1, "splits": 2},
        ids={
            "kept": 10**6,
            "new": 2,
            "most": 10**9,
            "changed": [{"before": 10**12, "after": [10**9 - i for i in range(5)], "into": 7}],
        },
        largest=[{"id": 5, "voxels": 10**9, "fragments": 2}],
    )
    path = Path("/a/folder/whose/name/is/longer/than/narrow/terminals/one/data.zarr/segmentation")
    said = ["Stitch of one", "5: 1,000,000,000 voxels, 2 fragments", str(path)]
    return report.table(path), said


def whole_run() -> tuple[object, list[str]]:
    predicted = PredictReport(9, 8, 0, (7,), *[0] * 9)
    compared = (ForecastStatus(name="gpu_hours", forecast=12_345.6),)
    report = RunReport(Path("/runs/one"), predicted, StitchReport(), None, forecast=compared)
    return report.table(), ["Run one", "agq view /runs/one", "GPU hours", "12,345.6"]


def plan() -> tuple[object, list[str]]:
    grid = BlockGrid((8000, 256_000, 512_000), (30, 6, 6), (16, 256, 256), *[(0, 0, 0)] * 3)
    found = scale(grid, grid.n_blocks, grid.n_blocks, DENSE)
    fields = {field.name: PLANNED.get(field.name) for field in dataclasses.fields(Plan)}
    values = fields | {"scale": (found, found), "ledger": True}
    return CheapPlan(**values).table(), [
        "stitch.min_contact",
        "database",
        "/runs/one",
        "1,234,567",
        "12 x 3400 x 5600",
    ]


def chosen() -> tuple[object, list[str]]:
    numbers = np.arange(40)
    report = ChosenBlocks(Path("/runs/one"), numbers, np.zeros(40, np.uint8))
    return report.table(), ["/runs/one", "40", "0, 1, 2,"]


def verification() -> tuple[object, list[str]]:
    wrong = Problem("fragments", "data.zarr/fragments/c/0/0/1", "the checksum differs", block=12)
    report = VerifyReport("/runs/one", Counter(fragments=12), problems=[wrong])
    return report.table(), ["12 checked", "block 12,", "the checksum differs"]


def status() -> tuple[object, list[str]]:
    worker = WorkerStatus(
        name="gpu-node-0123-4567", host="gpu-node-0123", pid=1, device="cuda:0 (NVIDIA H200)",
        state="running", started=0.0, last=1.0, done=123_456, failed=12, current=(1_234_567,),
    )  # fmt: skip
    place = "voxel 1000,25600,51200 (30015,153603,307203 nm)"
    failure = Failure(block=5, attempt=3, reason="out of memory", place=place)
    group = FailureGroup(summary="out of memory", count=7, example=failure)
    stage = StageStatus(
        name="predict", state="running", blocks_total=1_234_567, done=123_456, failed=7, running=1,
        eta_s=90_000.0, errors=(group,), workers=(worker,),
    )  # fmt: skip
    report = RunStatus(
        id="0", name="one", run_dir="/runs/one", state="running", source="journal",
        updated=2.0, stages=(stage,),
    )  # fmt: skip
    return render(report), ["123456/1234567", "1d 01h", "gpu-node-0123-4567", place]


CASES = {
    EvaluationReport: evaluation,
    BaselineReport: baseline,
    BlockReport: blocks,
    Calibration: calibration,
    StitchReport: stitch,
    RunReport: whole_run,
    Plan: plan,
    ChosenBlocks: chosen,
    VerifyReport: verification,
    RunStatus: status,
}


@pytest.mark.parametrize("width", [40, 80, None])
@pytest.mark.parametrize("case", [*CASES.values(), sweep])
def test_no_cell_is_cut(monkeypatch, case, width):
    renderable, cells = case()
    text = printed(monkeypatch, renderable, width)
    assert "…" not in text
    for cell in cells:
        assert words(cell) <= words(text), text


@pytest.mark.parametrize("width", [80, None])
@pytest.mark.parametrize("case", [*CASES.values(), sweep])
def test_tables_fit_80_columns(monkeypatch, case, width):
    """Only a word that is longer than a line, such as a path, may pass it."""
    for line in printed(monkeypatch, case()[0], width).splitlines():
        assert len(line.rstrip()) <= 80 or len(line.split()[-1]) > 40, line


def test_every_report_is_among_the_cases():
    for package in ("blockwise", "pipeline"):
        for file in (ROOT / package).rglob("*.py"):
            if "Tabled" in file.read_text(encoding="utf-8"):
                name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                importlib.import_module(f"agq.{name}")
    assert set(Tabled.__subclasses__()) == set(CASES)


@pytest.mark.parametrize(("width", "rows"), [(None, 3), (40, 4), (24, 5)])
def test_words_wrap_and_then_rows_become_lists(monkeypatch, width, rows):
    table = WholeTable("", ("name", "value"), numbers=("value",))
    table.add_row("a name of several words and [more]", "0.1234")
    table.add_row("another", "1")
    lines = printed(monkeypatch, table, width).splitlines()
    assert len(lines) == rows
    assert all(len(line) <= (width or 80) for line in lines)
    assert "[more]" in " ".join(lines)


def test_lists_hold_what_has_words(monkeypatch):
    table = WholeTable("title", ("name", "", "value"), legend="legend")
    table.add_row(
        "extraordinarily", ProgressBar(total=4, completed=2, width=10), Text("long\nline")
    )
    assert printed(monkeypatch, table, 20).splitlines() == [
        "title", "name   extraordinarily", "value  long", "       line", "", "legend",
    ]  # fmt: skip


def test_facts_are_lines_of_name_and_value(monkeypatch):
    text = printed(monkeypatch, facts("[run]", [("a", "1"), ("long", "2\n3")]), 10)
    assert text == "[run]\na     1\nlong  2\n      3\n"


def test_every_command_prints_whole_tables():
    for package in ("blockwise", "pipeline"):
        for file in (ROOT / package).rglob("*.py"):
            assert "rich.table" not in file.read_text(encoding="utf-8"), file


def test_a_command_says_what_takes_long(monkeypatch, capsys):
    """On a slow machine only, where nobody looks on: a pipe gets no line for each short step."""
    monkeypatch.setattr(terminal, "SILENT_S", 0.2)
    with terminal.busy("short") as tell:
        tell("long")
        deadline = time.monotonic() + 20
        while not (said := capsys.readouterr().err):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        tell("short again")
    time.sleep(0.4)
    assert said == "long ...\n"
    assert capsys.readouterr().err == ""
