"""Tables are whole: in a narrow terminal, in an ordinary one, and in a pipe."""

import io
import time
from pathlib import Path

import pytest
from rich.progress_bar import ProgressBar
from rich.text import Text

from agq import terminal
from agq.blockwise.stitch.run import StitchReport
from agq.pipeline.evaluate.block_scores import BlockReport, BlockScore
from agq.pipeline.evaluate.scores import VARIANTS, Disagreement, EvaluationReport, Scores
from agq.pipeline.evaluate.sweep import Point, points_table
from agq.terminal import WholeTable, facts
from tests.helpers import ROOT

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
    wrong = Disagreement(4711, 0.5, 3, ((7, 1_000, (0, 30, 60)), (8, 90, (30, 36, 66))))
    report = EvaluationReport(
        "/runs/one::x", "/truth::labels", (0, 0, 0), (1, 2, 3), (30, 6, 6), "nm",
        {"radius": 2, "axes": "yx"}, 12_345, 0.1, 0.0, 150.0, 7, 9, SCORES, SCORES, None,
        [wrong], [],
    )  # fmt: skip
    said = [report.meaning(name) for name in VARIANTS]
    return report.table(), [
        *said,
        "0.1234",
        "0.5678",
        "4711",
        "7 (1,000) (0, 30, 60)",
        "/runs/one::x",
    ]


def sweep() -> tuple[object, list[str]]:
    scores = {"background_filled": SCORES, "as_is": SCORES}
    point = Point("watershed + 75% quantile", {"across": 0.55, "within": 0.575}, 123_456, scores)
    said = ["watershed + 75% quantile", "across 0.55, within 0.575", "123456", "0.3456", "one:"]
    return points_table([point, point], "one: the best of 2 settings"), said


def blocks() -> tuple[object, list[str]]:
    score = BlockScore(12, (0, 256, 512), 10, SCORES, SCORES)
    said = ["one: 1 blocks", "mean of the blocks", "block 12 at voxel 0,256,512", "1.3579"]
    return BlockReport("one", [score]).table(), said


def stitch() -> tuple[object, list[str]]:
    report = StitchReport(largest=[{"id": 5, "voxels": 10**9, "fragments": 2}])
    path = Path("/a/folder/whose/name/is/longer/than/narrow/terminals/one/data.zarr/segmentation")
    return report.table(path), [
        "Stitch of one",
        "5: 1,000,000,000 voxels, 2 fragments",
        str(path),
    ]


@pytest.mark.parametrize("width", [40, 80, None])
@pytest.mark.parametrize("case", [evaluation, sweep, blocks, stitch])
def test_no_cell_is_cut(monkeypatch, case, width):
    renderable, cells = case()
    text = printed(monkeypatch, renderable, width)
    assert "…" not in text
    for cell in cells:
        assert words(cell) <= words(text), text
        if width is None:
            assert cell in text


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
