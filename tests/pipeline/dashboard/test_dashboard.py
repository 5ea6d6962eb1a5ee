"""The web page: what its server answers, and what a real browser shows of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.table import ROW
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.settings import LedgerSettings
from agq.errors import InputError
from agq.pipeline.cli.look import _sources
from agq.pipeline.dashboard import blockmap
from agq.pipeline.dashboard.details import group_failures, history
from agq.pipeline.dashboard.run_view import RunView
from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.dashboard.server import Dashboard
from agq.pipeline.folder import RunFolder
from agq.pipeline.status.run_status import Failure
from tests.helpers.browser import browser_page, serving
from tests.helpers.runs import ROOT, agq, command, environment
from tests.helpers.services import (
    free_port,
    mongo_uri,  # noqa: F401
)

GRID = BlockGrid((12, 40, 50), (30, 6, 6), (4, 10, 10), offset=(60, 0, 0))
SCRIPT = "<script>alert('pwned')</script><img src=x onerror=alert(1)>"
WORKER = WorkerInfo(name="worker-0", host="node1", pid=12, device="cuda:0", job="77", started=1.0)
DONE, SKIPPED, FAILED, RUNNING = [0, 1, 2, 3, 4, 5, 6, 7], [8, 9], [22, 23, 24], [30]
DAY = 86_400


def write_journal(run: RunFolder, start: float) -> JournalWriter:
    writer = JournalWriter(run.journal("predict"), replace(WORKER, started=start))
    for block in DONE:
        end = start + 10.0 * (block + 1)
        writer.finish(
            BlockRecord(
                block, "done", started=end - 5 - block, finished=end, voxels=400, labels=block
            )
        )
    for block in SKIPPED:
        writer.finish(BlockRecord(block, "skipped", reason="mask", finished=start + 1))
    for block in FAILED:
        roi = GRID.write_roi(block)
        error = f"Traceback\n  File {SCRIPT}\nValueError: block {block} is bad {SCRIPT}"
        writer.finish(
            BlockRecord(
                block,
                "failed",
                attempt=3,
                error=error,
                roi=(tuple(map(float, roi.offset)), tuple(map(float, roi.shape))),
                finished=start + 2,
            )
        )
    for block in RUNNING:
        writer.begin(block, 1)
    return writer


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run under way, held by this process, with a name that must not become HTML."""
    folder = RunFolder(tmp_path / "runs" / "my <b>run")
    with folder.lock():
        config = {"run_dir": str(folder.path), "input": {"raw": {"path": SCRIPT}}}
        folder.create(config, {"grid": GRID.to_dict()})
        start = time.time() - 85
        folder.update_stage("predict", state="running", blocks_total=60, started=start)
        write_journal(folder, start)
        (folder.path / "logs" / "predict").mkdir(parents=True)
        (folder.path / "logs" / "predict" / "worker-0.log").write_text(f"the end {SCRIPT}")
        yield folder


def get(url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(url, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def ask(
    page: Dashboard, path: str, headers: dict[str, str] | None = None
) -> tuple[int, bytes, Any]:
    """Ask a page as its browser does: with the cookie that stands for the token."""
    cookie = {} if page.token is None else {"Cookie": f"{page.cookie}={page.token}"}
    return get(f"http://127.0.0.1:{page.port}/{path}", cookie | (headers or {}))


def test_states_of_blocks() -> None:
    rows = np.zeros(3, ROW)
    rows["block"], rows["rank"] = [3, 1, 2], [1, 2, 3]
    codes = blockmap.block_states(8, np.arange(6), rows, np.array([4]))
    names = [blockmap.STATES[c] for c in codes]
    assert names == [
        *("waiting", "skipped", "done", "failed", "running", "waiting"),
        *("outside", "outside"),
    ]


def test_one_failed_block_shows_in_a_map_of_a_million() -> None:
    grid = BlockGrid((2, 700 * 4, 1300 * 4), (1, 1, 1), (1, 4, 4))
    codes = np.full(grid.n_blocks, blockmap.DONE, np.uint8)
    failed = grid.number((1, 699, 1298))
    codes[failed] = blockmap.FAILED
    image = blockmap.state_image(grid, codes, 0, 1)
    assert image.step == 3
    assert image.cells.shape == (234, 434)
    assert [tuple(p) for p in np.argwhere(image.cells == blockmap.FAILED)] == [(233, 432)]
    assert blockmap.block_in_cell(grid, codes, (1, 699, 1296), 0, 3) == failed
    assert not (blockmap.state_image(grid, codes, 0, 0).cells == blockmap.FAILED).any()
    with pytest.raises(IndexError):
        blockmap.block_in_cell(grid, codes, (2, 0, 0), 0, 3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layers_are_cut_along_any_axis(axis: int) -> None:
    codes = (np.arange(GRID.n_blocks) % 6).astype(np.uint8)
    image = blockmap.state_image(GRID, codes, axis, 1)
    for row, column in np.ndindex(image.cells.shape):
        at = [row, column]
        at.insert(axis, 1)
        assert image.cells[row, column] == codes[GRID.number(at)]


def test_values_keep_their_place_and_gaps() -> None:
    rows = np.zeros(2, ROW)
    rows["block"], rows["rank"], rows["finished"] = [1, 59], 3, [2.0, 6.0]
    values = blockmap.block_values(60, rows, "seconds")
    assert values[1] == 2
    assert np.isnan(values).sum() == 58
    image = blockmap.value_image(GRID, values, 0, 0)
    assert (image.cells.ravel()[1], int((image.cells > 0).sum())) == (1, 1)
    assert blockmap.value_image(GRID, values, 0, 2).cells[-1, -1] == 255


def test_history_counts_every_block_of_the_session() -> None:
    rows = np.zeros(5, ROW)
    rows["rank"], rows["finished"], rows["voxels"] = 3, [5, 100, 150, 200, 299], 7
    for begun in (0, 60, rows["finished"] - 3, rows["finished"]):
        rows["started"] = begun
        found = history(rows, 90.0, 300.0)
        assert sum(found["blocks_per_s"]) * found["seconds"] == pytest.approx(4, abs=0.01)
        assert sum(found["voxels_per_s"]) * found["seconds"] == pytest.approx(28, abs=5)
    assert history(rows[:0], None, 10.0)["blocks_per_s"] == [0.0]


def test_a_slow_steady_run_has_a_flat_history() -> None:
    """Two workers that take 30 s for a block: counted at its end, most bins would be empty."""
    rows = np.zeros(40, ROW)
    rows["rank"], rows["voxels"] = 3, 1000
    rows["finished"] = 1000 + 30.0 * (np.arange(40) // 2 + 1)
    rows["started"] = rows["finished"] - 30
    found = history(rows, 1000.0, 1615.0, begun=[1600.0, 1600.0])
    assert len(found["blocks_per_s"]) == 120
    assert found["blocks_per_s"] == pytest.approx([2 / 30] * 120, rel=0.01)
    assert found["voxels_per_s"] == pytest.approx([2000 / 30] * 120, rel=0.01)
    # Blocks that take longer than usual slow it down; without them its end would be empty.
    late = history(rows, 1000.0, 1720.0, begun=[1600.0, 1600.0])["blocks_per_s"]
    assert late[-1] == pytest.approx(2 / 120, rel=0.01)
    assert history(rows, 1000.0, 1720.0)["blocks_per_s"][-1] == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_map_opens_where_something_happens(axis: int) -> None:
    codes = np.full(GRID.n_blocks, blockmap.WAITING, np.uint8)
    assert blockmap.layer_to_show(GRID, codes, axis) == GRID.shape[axis] // 2
    last = [n - 1 for n in GRID.shape]
    codes[GRID.number((0, 0, 0))] = blockmap.DONE
    assert blockmap.layer_to_show(GRID, codes, axis) == 0
    codes[GRID.number(last)] = blockmap.FAILED
    assert blockmap.layer_to_show(GRID, codes, axis) == last[axis]
    codes[GRID.number((1, 2, 3))] = blockmap.RUNNING
    assert blockmap.layer_to_show(GRID, codes, axis) == (1, 2, 3)[axis]


def test_answers(run: RunFolder) -> None:
    with serving(Runs([run.path])) as page:
        (line,) = json.loads(ask(page, "api/runs")[1])
        assert (line["state"], line["done"], line["failed"]) == ("running", 10, 3)
        base = f"api/run/{line['key']}"
        status, body, headers = ask(page, base)
        found = json.loads(body)
        assert status == 200
        assert headers["Content-Type"].startswith("application/json")
        assert found["states"] == [0, 2, 8, 46, 1, 3]
        (group,) = found["failures"]
        assert (group["count"], [b["block"] for b in group["blocks"]]) == (3, FAILED)
        assert group["blocks"][0]["at"] == [6, 5, 25]
        (worker,) = found["workers"]
        assert (worker["host"], worker["job"], worker["current"]) == ("node1", "77", [30])
        status, cells, headers = ask(page, base + "/map?by=state&axis=0&index=0")
        assert json.loads(headers["X-Map"])["shape"] == [4, 5]
        assert list(cells) == [2] * 8 + [1] * 2 + [3] * 10
        block = json.loads(ask(page, base + "/block?at=1,0,2&axis=0&step=1")[1])
        assert (block["block"], block["record"]["state"]) == (22, "failed")
        assert ask(page, base + "/log?worker=worker-0")[1].decode() == f"the end {SCRIPT}"
        assert b"no log" in ask(page, base + "/log?worker=../../run")[1]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("api/run/nothing", 404),
        ("api/run/KEY/map?by=state&axis=0&index=3", 404),
        ("api/run/KEY/map?by=password&axis=0&index=0", 400),
        ("api/run/KEY/map?by=state&axis=3&index=0", 400),
        ("api/run/KEY/map?by=state&axis=0&index=x", 400),
        ("api/run/KEY/block?at=9,9,9&axis=0&step=1", 404),
        ("api/run/KEY/block?at=1,2&axis=0&step=1", 400),
        ("../run.json", 404),
        ("server.py", 404),
    ],
)
def test_bad_requests(run: RunFolder, path: str, code: int) -> None:
    with serving(Runs([run.path])) as page:
        status, body, headers = ask(page, path.replace("KEY", run.record()["id"]))
    assert status == code
    assert b"<" not in body or b"Traceback" not in body
    assert "text/plain" in headers["Content-Type"] or status == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_page_wants_its_token(run: RunFolder, host: str) -> None:
    with serving(Runs([run.path]), host=host) as page:
        base = f"http://127.0.0.1:{page.port}/"
        key = run.record()["id"]
        for path in ("", "api/runs", f"api/run/{key}", f"api/run/{key}/log?worker=worker-0", "x"):
            assert get(base + path)[0] == 403
        assert get(base + "api/runs?token=wrong")[0] == 403
        assert get(base + "api/runs?token=")[0] == 403
        assert get(base + "api/runs", {"Cookie": f"agq-{page.port}=wrong"})[0] == 403
        assert (
            get(
                base + "api/runs",
                {"Cookie": f"agq-{page.port}=\N{LATIN SMALL LETTER E WITH ACUTE}"},
            )[0]
            == 403
        )
        assert get(base + "page.js")[0] == 200
        token = page.address.split("token=")[1]
        assert len(token) >= 32
        assert json.loads(get(f"{base}api/runs?token={token}")[1])
        # The page itself leads to an address without the token; a cookie stands for it.
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{base}?token={token}", timeout=20) as answer:
            assert answer.url == base
        with opener.open(base + "api/runs", timeout=20) as answer:
            assert json.loads(answer.read())


def test_a_log_that_leads_out_of_the_run_folder_is_not_shown(
    run: RunFolder, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    logs = run.path / "logs" / "predict"
    (logs / "link.log").symlink_to(tmp_path / "secret")
    os.mkfifo(logs / "fifo.log")
    base = f"api/run/{run.record()['id']}/log?worker="
    with serving(Runs([run.path])) as page:
        for name in ("link", "fifo", "../../../secret"):
            status, body, _ = ask(page, base + name)
            assert (status, b"secret" in body, b"no log" in body) == (200, False, True)
        logs.rename(tmp_path / "moved")
        logs.symlink_to(tmp_path / "moved")
        assert b"no log" in ask(page, base + "worker-0")[1]
        (run.path / "logs").rename(tmp_path / "logs")
        (run.path / "logs").symlink_to(tmp_path / "logs")
        (tmp_path / "logs" / "worker-0.log").write_text("secret")
        status, body, _ = ask(page, base + "worker-0")
        assert (status, b"symbolic link" in body, b"secret" in body) == (404, True, False)


def test_the_picture_of_a_run_and_nothing_else(run: RunFolder, tmp_path: Path) -> None:
    base = f"api/run/{run.record()['id']}"
    png = b"\x89PNG\r\n\x1a\n and more"
    file = run.path / f"{run.path.name}.png"
    with serving(Runs([run.path])) as page:
        assert json.loads(ask(page, base)[1])["picture"] is None
        assert ask(page, f"{base}/picture")[0] == 404
        file.write_bytes(png)
        status, body, headers = ask(page, f"{base}/picture")
        assert (status, body, headers["Content-Type"]) == (200, png, "image/png")
        file.write_bytes(b"secret")
        assert ask(page, f"{base}/picture")[0] == 404
        file.unlink()
        (tmp_path / "secret.png").write_bytes(png)
        file.symlink_to(tmp_path / "secret.png")
        assert ask(page, f"{base}/picture")[0] == 404
        file.unlink()
        os.mkfifo(file)
        assert ask(page, f"{base}/picture")[0] == 404


def test_two_pages_on_one_host_keep_their_cookies(run: RunFolder) -> None:
    """A browser sends the cookies of a host to all its ports."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with serving(Runs([run.path])) as one, serving(Runs([run.path])) as two:
        for page in (one, two):
            opener.open(page.address, timeout=20).close()
        for page in (one, two):
            with opener.open(f"http://127.0.0.1:{page.port}/api/runs", timeout=20) as answer:
                assert answer.status == 200


def test_other_host_names_are_refused_on_loopback(run: RunFolder) -> None:
    with serving(Runs([run.path])) as page:
        assert ask(page, "api/runs", {"Host": "evil.example:80"})[0] == 403
        assert ask(page, "api/runs", {"Host": f"localhost:{page.port}"})[0] == 200
    with serving(Runs([run.path]), token=False) as page:
        assert page.address == f"http://127.0.0.1:{page.port}/"
        assert get(page.address + "api/runs", {"Host": "evil.example:80"})[0] == 403
        assert get(page.address + "api/runs")[0] == 200
    with pytest.raises(InputError, match="leave out one of the two"):
        Dashboard(Runs([run.path]), host="0.0.0.0", token=False)


def test_an_error_of_the_program_is_told_once(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runs = Runs([run.path])
    monkeypatch.setattr(runs, "listing", lambda: 1 // 0)
    with serving(runs) as page:
        assert [ask(page, "api/runs")[0] for _ in range(3)] == [500] * 3
    assert len(caplog.records) == 1
    assert "ZeroDivisionError" in caplog.text


def test_all_runs_of_a_folder(run: RunFolder) -> None:
    other = RunFolder(run.path.parent / "second")
    with other.lock():
        other.create({}, {"grid": GRID.to_dict()})
    (run.path.parent / "broken").mkdir()
    (run.path.parent / "broken" / "run.json").write_text("{")
    runs = Runs([], run.path.parent)
    lines = runs.listing()
    assert [line["name"] for line in lines] == ["second", "my <b>run", "broken"]
    assert [line["state"] for line in lines] == ["new", "running", "damaged"]
    assert "run.json cannot be read" in lines[2]["problem"]
    with pytest.raises(InputError, match="cannot be read"):
        runs.view(lines[2]["key"])
    for line, folder in zip(lines[:2], (other, run), strict=True):
        record = folder.record()
        assert (line["id"], line["user"]) == (record["id"], record["commands"][-1]["user"])
        assert {"heard", "blocks_per_s", "eta_s"} <= line.keys()
    with pytest.raises(InputError, match=r"no run\.json"):
        Runs([run.path.parent / "nothing"])


@contextmanager
def ledger_of(run: RunFolder, uri: str, **about: Any) -> Iterator[Any]:
    """Deliver the run to a database of its own; yield the ledger."""
    ledger = connect(LedgerSettings(uri=uri, database="dashboard"))
    assert ledger is not None
    record = run.record()
    about = {"name": "told", "grid": record["identity"]["grid"], **about}
    feeder = LedgerFeeder(ledger, record["id"], {"predict": run.journal("predict")}, about)
    feeder.start()
    feeder.update_stage("predict", **record["stages"]["predict"])
    assert feeder.stop().complete
    try:
        yield ledger
    finally:
        ledger.remove_run(record["id"])
        ledger.close()


def given_away(folder: Path) -> None:
    """Give a folder with all in it to another user; skip where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 54321, 54321, follow_symlinks=False)


def test_a_run_that_only_the_ledger_knows(run: RunFolder, mongo_uri: str) -> None:
    key = run.record()["id"]
    with ledger_of(run, mongo_uri, run_dir="/elsewhere/r") as ledger:
        runs = Runs([], None, ledger)
        (line,) = [r for r in runs.listing() if r["key"] == key]
        assert (line["source"], line["done"], line["failed"]) == ("ledger", 10, 3)
        assert line["blocks_per_s"] > 0
        assert line["eta_s"] > 0
        (stage,) = [s for s in runs.view(key).overview()["stages"] if s["name"] == "predict"]
        assert stage["blocks_per_s_now"] == pytest.approx(line["blocks_per_s"], rel=0.5)
        assert stage["eta_s"] == pytest.approx(line["eta_s"], rel=0.5)
        found = runs.view(key).overview()
        assert (found["source"], found["states"]) == ("ledger", [0, 2, 8, 46, 1, 3])
        assert found["failed"] == 3
        image = runs.view(key).image("labels", 0, 0)
        assert (image.low, image.high) == pytest.approx((0.07, 6.93), abs=0.01)


@pytest.mark.parametrize("whose", ["its own", "another run", "a stranger", "no run", "relative"])
def test_a_folder_that_a_document_names_is_read_only_if_it_is_the_runs(
    run: RunFolder, tmp_path: Path, mongo_uri: str, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    monkeypatch.chdir(run.path.parent)
    named = run.path
    if whose == "another run":
        named = tmp_path / "other"
        RunFolder(named).create({}, {})
        shutil.copytree(run.path / "logs", named / "logs")
    elif whose == "no run":
        named = tmp_path / "folder"
        shutil.copytree(run.path / "logs", named / "logs")
    elif whose == "relative":
        named = Path(run.path.name)
    elif whose == "a stranger":
        given_away(run.path)
    key = run.record()["id"]
    with ledger_of(run, mongo_uri, run_dir=str(named)) as ledger:
        runs = Runs([], None, ledger)
        (line,) = [r for r in runs.listing() if r["key"] == key]
        assert (line["name"], line["run_dir"]) == ("told", str(named))
        view = runs.view(key)
        found = view.overview(None)
        mine = whose == "its own"
        assert (found["here"], found["source"]) == (mine, "journal" if mine else "ledger")
        assert found["id"] == key
        assert (view.log("worker-0") is not None) == mine
        if not mine:
            with pytest.raises(InputError, match="belongs to you"):
                assert view.path
        if whose == "a stranger":
            monkeypatch.setenv("AGQ_TRUSTED_USERS", "54321")
            assert Runs([], None, ledger).view(key).overview(None)["here"]


def test_a_page_of_one_run_on_another_machine(
    run: RunFolder, mongo_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder there, or by its id, as for `agq status`."""
    monkeypatch.delenv("AGQ_MONGO_URI", raising=False)
    with pytest.raises(InputError, match="AGQ_MONGO_URI"):
        _sources(tmp_path / "away", everything=False, uri_file=None)
    with ledger_of(run, mongo_uri, run_dir="/elsewhere/r", name="r"):
        monkeypatch.setenv("AGQ_MONGO_URI", mongo_uri)
        monkeypatch.setenv("AGQ_MONGO_DATABASE", "dashboard")
        for target in (Path("/elsewhere/r"), Path(run.record()["id"])):
            sources = _sources(target, everything=False, uri_file=None)
            runs = Runs(*sources)
            (line,) = runs.listing()
            found = runs.view(line["key"]).overview(None)
            assert (found["id"], found["source"]) == (run.record()["id"], "ledger")
            sources[2].close()
        sources = _sources(tmp_path / "nothing", everything=False, uri_file=None)
        assert Runs(*sources).listing() == []
        sources[2].close()


def test_folders_of_strangers_are_listed_and_not_opened(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's folder can neither hide a run by its id, nor be opened by a click."""
    parent = run.path.parent
    shutil.copytree(run.path, parent / "evil")
    given_away(parent / "evil")
    (parent / "evil" / "run.json").unlink()
    os.mkfifo(parent / "evil" / "run.json")
    os.chown(parent / "evil" / "run.json", 54321, 54321)
    with serving(Runs([], parent)) as page:
        lines = {line["name"]: line for line in json.loads(ask(page, "api/runs")[1])}
        assert set(lines) == {"my <b>run", "evil"}
        evil = lines["evil"]
        assert (evil["stranger"], evil["state"]) == ("uid 54321", "")
        for path in ("", "/log?worker=worker-0", "/map?by=state&axis=0&index=0", "/picture"):
            status, body, _ = ask(page, f"api/run/{evil['key']}{path}")
            assert (status, b"belongs to uid 54321" in body) == (404, True)
        assert ask(page, f"view/{evil['key']}?at=0,0,0")[0] == 404
        assert ask(page, f"api/run/{lines['my <b>run']['key']}")[0] == 200
    # The owner of the folder that is named is trusted, as in a container.
    os.chown(parent, 54321, 54321)
    (parent / "evil" / "run.json").unlink()
    (parent / "evil" / "run.json").write_bytes(run.record_path.read_bytes())
    os.chown(parent / "evil" / "run.json", 54321, 54321)
    runs = Runs([], parent)
    keys = {line["name"]: line["key"] for line in runs.listing() if "stranger" not in line}
    assert len(keys) == 1, "both folders have the same name in run.json"
    assert len({line["key"] for line in runs.listing()}) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", ".lock", "session.json", "predict.json", "slurm/jobs.json"),
        *("journal/predict/x.jsonl", "journal/predict/compact.npz", "journal/relabel/x.jsonl"),
    ],
)
def test_nobody_waits_for_a_fifo_in_a_run_folder(run: RunFolder, name: str) -> None:
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)

    def look() -> None:
        with suppress(InputError):
            RunView(run.path).overview(None)
        Runs([], run.path.parent).listing()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_command_without_a_run(tmp_path: Path) -> None:
    done = agq("dashboard", "--all", tmp_path)
    assert (done.returncode, "no run in" in done.stderr) == (2, True)


@pytest.mark.parametrize("everything", [False, True])
def test_the_command_serves_until_interrupted(run: RunFolder, everything: bool) -> None:
    port = free_port()
    wanted = ["--all", run.path.parent, "--viewer-port", free_port()]
    words = command(
        "dashboard", *(wanted if everything else [run.path, "--no-token"]), "--port", port
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=environment(), cwd=ROOT, **pipes) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith(f"http://127.0.0.1:{port}/")
            base, _, token = address.partition("?")
            assert bool(token) == everything
            assert get(base + "api/runs")[0] == (403 if everything else 200)
            (line,) = json.loads(get(f"{base}api/runs?{token}")[1])
            assert line["name"] == "my <b>run"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        said = process.stderr.read()
        assert "Traceback" not in said
        assert ("WARNING: --no-token" in said) == (not everything)


SHOT = os.environ.get("AGQ_SHOTS")


@pytest.mark.slow
def test_a_real_browser_shows_the_run_and_follows_it(run: RunFolder, tmp_path: Path) -> None:
    asked: list[tuple[Path, tuple[int, int, int]]] = []

    def viewer(
        run_dir: Path, host: str, at: tuple[int, int, int], segments: tuple[int, ...]
    ) -> str:
        asked.append((run_dir, at))
        return f"http://{host}:{page_port}/page.css"

    with serving(Runs([run.path]), viewer=viewer) as server, browser_page() as page:
        page_port = server.port
        other_hosts: list[str] = []
        page.on(
            "request",
            lambda r: (
                other_hosts.append(r.url)
                if not r.url.startswith((server.address.partition("?")[0], "data:"))
                else None
            ),
        )
        page.goto(server.address)
        page.wait_for_selector("body[data-ready]")
        assert page.inner_text("#name") == "my <b>run"
        assert page.inner_text("#state") == "running"
        assert SCRIPT in page.inner_text("#failures")
        assert page.locator("script").count() == 1
        assert page.locator("img[src]").count() == 0
        # The middle layer of blocks along z is the one with the failures.
        assert _colours(page) == _expected(
            page, {22: "failed", 23: "failed", 24: "failed", 30: "running"}, 20
        )
        page.fill("#index", "0")
        wait_until(lambda: (page.text_content("#layer") or "").startswith("1 "))
        page.wait_for_timeout(300)
        marks = {**dict.fromkeys(DONE, "done"), **dict.fromkeys(SKIPPED, "skipped")}
        assert _colours(page) == _expected(page, marks, 0)
        # A block that ends meanwhile appears by itself.
        writer = JournalWriter(run.journal("predict"), replace(WORKER, name="worker-1"))
        now = time.time()
        writer.finish(BlockRecord(12, "done", started=now - 1, finished=now, voxels=400))
        wait_until(lambda: _colours(page) == _expected(page, marks | {12: "done"}, 0))
        page.select_option("#by", "labels")
        page.wait_for_selector(".ramp")
        page.click("#map", position={"x": 5, "y": 5})
        page.wait_for_selector("#block:not([hidden])")
        assert page.inner_text("#block").startswith("Block 0 at 0, 0, 0: done")
        page.click("text=end of the log of worker-0 >> nth=0")
        page.wait_for_selector(f"text=the end {SCRIPT[:8]}")
        with page.expect_popup() as popup:
            page.click("text=open in the viewer >> nth=1")
        popup.value.wait_for_load_state()
        assert asked == [(run.path, (6, 5, 25))]
        assert other_hosts == []
        if SHOT:
            page.screenshot(path=f"{SHOT}/dashboard-test.png", full_page=True)


WIDE = """() => [...document.querySelectorAll("body *")].filter((e) =>
  e.getBoundingClientRect().right > innerWidth + 0.5 || (e.scrollWidth > e.clientWidth + 1
  && getComputedStyle(e).overflowX !== "visible")).map((e) => e.outerHTML.slice(0, 80))"""


def shown_whole(page: Any) -> None:
    """Check that nothing is cut off at the right, with all that can be opened open."""
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    width, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= seen
    assert page.evaluate(WIDE) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_is_cut_off_and_a_finished_run_shows_its_results_first(
    run: RunFolder, tmp_path: Path, width: int
) -> None:
    done = RunFolder(run.path.parent / "a-finished-run-with-a-long-name-that-has-no-place-to-break")
    done.create({}, {"grid": GRID.to_dict()})
    writer = JournalWriter(done.journal("predict"), WORKER)
    now = time.time()
    for block in range(GRID.n_blocks):
        writer.finish(BlockRecord(block, "done", started=now - 9, finished=now, voxels=400))
    blank = np.full((60, 90, 3), 200, np.uint8)
    Image.fromarray(blank).save(done.path / f"{done.path.name}.png")
    scores = {"voi_split": 0.5, "voi_merge": 0.25, "meaning": "text"}
    reports: dict[str, Any] = {
        "predict": {"blocks": 60, "labels": 10**12},
        "stitch": {"segments": 7, "largest": [{"id": 2**60, "voxels": 10**15, "fragments": 3}]},
        "evaluate": {"scores": {"as_is": scores, "background_filled": scores}},
    }
    for stage, report in reports.items():
        done.update_stage(stage, state="done", started=now - 60, finished=now, report=report)
    with serving(Runs([], run.path.parent)) as server, browser_page(width, 800) as page:
        page.goto(server.address)
        page.wait_for_selector("#runs tr")
        shown_whole(page)
        page.click("text=my <b>run")
        wait_until(lambda: page.inner_text("#layer") != "")
        assert page.inner_text("#layer") == "2 of 3", "the layer with the running block"
        assert "1 at work" in page.inner_text("#nworkers")
        shown_whole(page)
        page.click("#home")
        page.click(f"text={done.path.name}")
        width_of = "document.querySelector('#picture img').naturalWidth"
        wait_until(lambda: page.evaluate(width_of) == 90)
        parts = ("#picture", "#scores", "#stages", "#map", "#workers", "#settings")
        tops = [page.locator(part).bounding_box()["y"] for part in parts]
        assert tops == sorted(tops)
        assert "0.25" in page.inner_text("#scores")
        shown_whole(page)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "the page did not change by itself"
        time.sleep(0.2)


def _colours(page: Any) -> list[list[int]]:
    """Colour in the middle of each cell of the map."""
    return page.evaluate(
        """() => {
          const c = document.getElementById('map'), d = c.getContext('2d'), found = [];
          const h = c.height / 4, w = c.width / 5;
          for (let k = 0; k < 20; k++) {
            const p = d.getImageData((k % 5 + 0.4) * w, (Math.floor(k / 5) + 0.4) * h, 1, 1).data;
            found.push([p[0], p[1], p[2]]);
          }
          return found;
        }"""
    )


def _expected(page: Any, marks: dict[int, str], first: int) -> list[list[int]]:
    names = [marks.get(first + k, "waiting") for k in range(20)]
    css = {
        name: page.evaluate(
            "n => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()",
            name,
        )
        for name in set(names)
    }
    return [[int(v, 16) for v in re.findall("..", css[name].lstrip("#"))] for name in names]


def test_all_runs_are_those_of_the_database_of_the_environment(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("agq.blockwise.ledger.database.connect", asked.append)
    monkeypatch.setenv("AGQ_MONGO_DATABASE", "ours")
    for file in (None, tmp_path / "uri"):
        _sources(tmp_path, True, file)
        assert (asked[-1].database, asked[-1].uri_file) == ("ours", file)


def test_page_and_status_group_failures_alike():
    failures = [
        Failure(block=k, attempt=1, reason=f"OSError: took {t} s")
        for k, t in enumerate(["1", "2.5", "3"])
    ]
    total, groups = group_failures(failures, None)
    assert total == 3
    assert [group["count"] for group in groups] == [3]


@pytest.mark.parametrize(
    "roi",
    [
        {"offset": [1, 10, 10], "shape": [4, 5, 15]},
        {"offset": [90, 60, 60], "shape": [120, 30, 90], "units": "world"},
    ],
)
def test_blocks_outside_the_roi_are_told_apart(tmp_path, roi):
    folder = RunFolder(tmp_path / "run")
    config = {"run_dir": str(folder.path), "input": {"raw": {"path": "x"}, "roi": roi}}
    folder.create(config, {"grid": GRID.to_dict()})
    view = RunView(folder.path)
    view.overview(None)
    waiting = np.flatnonzero(view._codes() == blockmap.WAITING)
    assert waiting.tolist() == [6, 7, 26, 27]
