"""`agq report` and `agq snapshot`: files that need nothing else."""

import base64
import http.server
import io
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.volumes.create import create_array
from agq.errors import InputError
from agq.pipeline.config.schema import Config, parse_config
from agq.pipeline.dashboard.report import write_report, write_snapshot
from agq.pipeline.folder import RunFolder
from tests.helpers.browser import browser_page

SHAPE = (8, 60, 70)
PLACE: dict[str, Any] = {"voxel_size": (30, 6, 6), "offset": (60, 12, -6)}
GRID = BlockGrid(SHAPE, (30, 6, 6), (4, 30, 35), offset=(60, 12, -6))
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 8 blocks, one failed, whose truth says where a merger is."""
    run = RunFolder(tmp_path / "run")
    options: Any = {"shape": SHAPE, "chunks": (4, 30, 35), **PLACE}
    raw = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    create_array(tmp_path / "in.zarr", "raw", dtype=np.uint8, **options)[:] = raw
    labels = np.zeros(SHAPE, np.uint64)
    labels[:, :30], labels[:, 30:, 35:] = 5, 7
    with run.lock():
        run.create({"note": SCRIPT}, {"grid": GRID.to_dict()})
    for name in ("fragments", "segmentation/s0"):
        create_array(run.container, name, dtype=np.uint64, **options)[:] = labels
    now = time.time()
    journal = JournalWriter(run.journal("predict"), WorkerInfo("worker-0", "node", 1))
    for block in range(7):
        journal.finish(BlockRecord(block, "done", started=now - 9, finished=now, labels=block))
    journal.finish(BlockRecord(7, "failed", error=f"ValueError: {SCRIPT}", finished=now))
    run.update_stage("predict", state="failed", started=now - 60, finished=now, blocks_total=8)
    scores = {"meaning": "as is", "voi_split": 0.125, "adapted_rand_error": 0.5}
    merger = {"label": 5, "bits": 0.5, "parts": 2}
    report = {
        "scores": {"as_is": scores},
        "worst_mergers": [{**merger, "largest": [{"label": 1, "voxels": 9, "at": [120, 60, 60]}]}],
        "worst_splits": [],
    }
    run.update_stage("evaluate", state="done", started=now, finished=now, report=report)
    return parse_config(
        {
            "run_dir": str(run.path),
            "input": {"raw": {"path": str(tmp_path / "in.zarr"), "dataset": "raw"}},
        }
    )


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_report_is_one_file_with_everything(config: Config, tmp_path: Path) -> None:
    write_report(config, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 3
    assert not re.search(r"https?://|src=\"(?!data:)|<link|@import", html)
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    for title in ("Stages", "Block map", "Speed", "Blocks", "Snapshot", "Failures (1 blocks)"):
        assert title in titles
    assert "Merger of segment 5, voxel 2,8,11 (135,63,63 nm)" in titles
    assert "0.1250" in html
    images = pictures(html)
    assert len(images) == 5
    # The block map has the colour of the failed block and that of the done ones.
    colours = {tuple(p) for p in np.asarray(images[0].convert("RGB")).reshape(-1, 3).tolist()}
    assert {(0xD1, 0x26, 0x4F), (0x3B, 0x7D, 0xD8)} <= colours


class _Recorder(http.server.BaseHTTPRequestHandler):
    """Answers everything with a script, and notes who asked for what."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.end_headers()
        self.wfile.write(b"document.title = 'pwned'")

    def log_message(self, *_: Any) -> None:
        pass


HOSTILE = """
<script>document.title = 'pwned'; fetch('URL/fetched').catch(() => 0);</script>
<script src="URL/script"></script>
<script type="module">import('URL/module').catch(() => 0)</script>
<img src="URL/image" onerror="document.title = 'pwned'">
<img src="data:," onerror="document.title = 'pwned'">
<svg onload="document.title = 'pwned'"><use href="URL/use"/></svg>
<link rel="stylesheet" href="URL/sheet"><link rel="icon" href="URL/icon">
<style>@import url(URL/import); @font-face { font-family: f; src: url(URL/font); }
p { background: url(URL/background); font-family: f; }</style><p>text</p>
<iframe src="URL/frame"></iframe><object data="URL/object"></object><embed src="URL/embed">
<video src="URL/video" poster="URL/poster" autoplay></video><audio src="URL/audio"></audio>
<form id="form" action="URL/form"></form><input form="form" type="image" src="URL/input">
"""


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_report_loads_and_runs_nothing_whatever_is_in_it(
    config: Config, tmp_path: Path, guarded: bool
) -> None:
    """Without its policy the same page asks for almost all of it: the test would see that."""
    file = tmp_path / "report.html"
    write_report(config, file)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Recorder) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        html = file.read_text()
        assert html.count("Content-Security-Policy") == 1
        if not guarded:
            html = html.replace("Content-Security-Policy", "x")
        file.write_text(html.replace("<body>", f"<body>{HOSTILE.replace('URL', url)}"))
        with browser_page() as page:
            page.goto(file.as_uri())
            page.wait_for_timeout(500)
            title = page.title()
            shown = page.evaluate("document.images[document.images.length - 1].naturalWidth")
            page.evaluate("document.getElementById('form').submit()")
            page.wait_for_timeout(500)
        server.shutdown()
    asked = set(server.asked)  # type: ignore[attr-defined]
    assert shown > 100, "the pictures of the report are there"
    if guarded:
        assert (title, asked) == ("run: report", set())
    else:
        assert title == "pwned"
        wanted = "fetched script module image sheet import background frame object embed form"
        assert {f"/{name}" for name in wanted.split()} <= {path.rstrip("?") for path in asked}


@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1200])
def test_a_report_fits_its_screen(config: Config, tmp_path: Path, width: int) -> None:
    write_report(config, tmp_path / "report.html")
    with browser_page(width, 900) as page:
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_report_of_a_run_whose_input_is_away(config: Config, tmp_path: Path) -> None:
    (tmp_path / "in.zarr").rename(tmp_path / "gone.zarr")
    write_report(config, tmp_path / "report.html")
    assert len(pictures((tmp_path / "report.html").read_text())) == 3
    with pytest.raises(InputError, match=r"no run\.json"):
        write_report(config.model_copy(update={"run_dir": str(tmp_path)}), tmp_path / "x.html")


def test_snapshot_of_a_run(config: Config, tmp_path: Path) -> None:
    write_snapshot(config, tmp_path / "a.png", (2, 8, 11))
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert image.width > image.height
    pixels = np.asarray(image).astype(int)
    third = image.width // 3
    colour = [np.ptp(pixels[:, k * third : (k + 1) * third], axis=2).max() for k in range(3)]
    assert colour[0] < 10  # The mark is black and white.
    assert min(colour[1:]) > 50
    with pytest.raises(InputError, match="outside"):
        write_snapshot(config, tmp_path / "b.png", (8, 0, 0))
