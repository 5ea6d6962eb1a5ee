import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pydantic import SecretStr
from rich.console import Console

from agq import waiting
from agq.blockwise.journal.reader import compact
from agq.blockwise.journal.records import BlockRecord, WorkerInfo, encode
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.progress import LedgerStage
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.coordinator import PredictProgress
from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.status.failures import MAX_FAILURES, failure_groups
from agq.pipeline.status.listing import ledger_lines
from agq.pipeline.status.monitor import Monitor, load_status, watch
from agq.pipeline.status.progress import RunProgress
from agq.pipeline.status.run_status import QueueStatus, RunStatus
from agq.pipeline.status.text import duration, render
from tests.helpers.services import free_port

WORKER = WorkerInfo(name="worker-0", host="node1", pid=12, device="cuda:0", job="77", started=1.0)
ROI = ((0.0, 6168.0, 1542.0), (510.0, 1542.0, 1542.0))


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "my [run]")
    with folder.lock():
        folder.create({"model": {}}, {"grid": 1})
    return folder


def draw(status: RunStatus, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(render(status))
    return console.file.getvalue()


def predict_half(run: RunFolder, start: float) -> JournalWriter:
    """Of 20 blocks: 8 done in the last 80 s, 2 skipped, 2 failed, 1 begun."""
    writer = JournalWriter(run.journal("predict"), replace(WORKER, started=start))
    for block in range(8):
        end = start + 10.0 * (block + 1)
        writer.finish(BlockRecord(block, "done", started=end - 5, finished=end, voxels=10**6))
    for block in (8, 9):
        writer.finish(BlockRecord(block, "skipped", reason="mask", finished=start + 1))
    for block in (10, 11):
        error = "Traceback (most recent call last):\n  File x\nValueError: NaN in raw [bold]"
        writer.finish(
            BlockRecord(block, "failed", attempt=3, error=error, roi=ROI, finished=start + 2)
        )
    writer.begin(12, 1)
    return writer


def test_no_run(tmp_path):
    with pytest.raises(InputError, match=r"no run\.json"):
        load_status(tmp_path)


def test_new_run_has_no_stages(run):
    status = load_status(run.path)
    assert (status.state, status.source, status.stages) == ("new", "journal", ())
    assert status.id == run.record()["id"]
    assert "my [run]" in draw(status)


def test_status_from_the_journal(run):
    start = time.time() - 80
    with run.lock():
        run.update_stage("predict", state="running", blocks_total=20, started=start, finished=None)
        predict_half(run, start)
        status = load_status(run.path)
    assert (status.state, status.source) == ("running", "journal")
    (stage,) = status.stages
    assert (stage.done, stage.skipped, stage.failed, stage.running) == (8, 2, 2, 1)
    assert stage.blocks_total == 20
    assert stage.voxels == 8 * 10**6
    assert stage.blocks_per_s == pytest.approx(8 / 80, rel=0.2)
    assert stage.voxels_per_s == pytest.approx(8e6 / 80, rel=0.2)
    assert stage.blocks_per_s_now == pytest.approx(6 / 60, rel=0.4)
    assert stage.eta_s == pytest.approx(10 / stage.blocks_per_s_now)
    assert [f.block for f in stage.failures] == [10, 11]
    assert stage.failures[0].summary == "ValueError: NaN in raw [bold]"
    assert stage.failures[0].offset == ROI[0]
    (worker,) = stage.workers
    assert (worker.host, worker.device, worker.state) == ("node1", "cuda:0", "running")
    assert worker.current == (12,)
    text = draw(status)
    for part in (
        *("10/20", duration(stage.eta_s), "cuda:0", "node1"),
        "2 failed: ValueError: NaN in raw [bold]",
        "e.g. block 10, attempt 3",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


def test_blocks_of_an_earlier_session_do_not_count_as_speed(run):
    start = time.time() - 1000
    predict_half(run, start)
    now = time.time()
    run.update_stage("predict", state="running", blocks_total=20, started=now - 40)
    writer = JournalWriter(run.journal("predict"), WORKER)
    writer.finish(BlockRecord(12, "done", started=now - 6, finished=now - 1, voxels=5))
    with run.lock():
        (stage,) = load_status(run.path).stages
    assert stage.done == 9
    assert stage.blocks_per_s == pytest.approx(1 / 40, rel=0.3)
    assert stage.blocks_per_s_now == pytest.approx(1 / 40, rel=0.3)


def test_snapshot_gives_the_same_status(run):
    start = time.time() - 80
    run.update_stage("predict", state="running", blocks_total=20, started=start)
    predict_half(run, start)
    with run.lock():
        before = load_status(run.path)
        compact(run.journal("predict"))
        after = load_status(run.path)
    ignored = {"updated": 0, "stages": ()}
    assert after.model_copy(update=ignored) == before.model_copy(update=ignored)
    rates = {"blocks_per_s": 0, "blocks_per_s_now": 0, "voxels_per_s": 0, "voxels_per_s_now": 0,
             "eta_s": 0}  # fmt: skip
    assert [s.model_copy(update=rates) for s in after.stages] == [
        s.model_copy(update=rates) for s in before.stages
    ]


def test_interrupted_run_is_stopped_not_running(run):
    """The coordinator was killed: run.json still says running."""
    code = (
        "import sys, os, signal; from pathlib import Path; "
        "from agq.pipeline.folder import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1]))\n"
        "with run.lock():\n"
        "    run.update_stage('predict', state='running', blocks_total=20)\n"
        "    print('up', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        predict_half(run, time.time() - 80)
        assert load_status(run.path).state == "running"
        process.kill()
    status = load_status(run.path)
    assert status.state == "stopped"
    assert status.stages[0].state == "stopped"
    assert status.stages[0].running == 0
    assert status.stages[0].workers[0].state == "ended"


def test_coordinator_on_another_machine(run):
    run.update_stage("predict", state="running", blocks_total=20)
    (run.path / ".lock").write_text(f"host not-{socket.gethostname()}, pid {os.getpid()}")
    assert load_status(run.path).state == "running"
    run.update_stage("predict", state="done")
    assert load_status(run.path).state == "done"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({"predict": "done"}, "done"),
        ({"predict": "failed"}, "failed"),
        ({"predict": "done", "stitch": "stopped"}, "stopped"),
    ],
)
def test_state_of_a_run_that_is_over(run, states, expected):
    for stage, state in states.items():
        run.update_stage(stage, state=state, blocks_total=4, error="KeyboardInterrupt: ")
    (run.path / ".lock").write_text(f"host {socket.gethostname()}, pid 999999999")
    status = load_status(run.path)
    assert status.state == expected
    # What the stitch has not begun waits for it.
    parts = ["waiting"] * 2 if "stitch" in states else []
    assert [s.state for s in status.stages] == [*states.values(), *parts]
    assert max(map(len, draw(status).splitlines())) <= 80


@pytest.mark.parametrize(
    ("started_ago", "last_ago", "state"),
    [
        (1000, 100, "running"),
        (4000, 3600, "silent"),
        (4000, 2000, "running"),  # it took 2000 s for its block
    ],
)
def test_silent_worker_is_marked(run, started_ago, last_ago, state):
    now = time.time()
    # Lines as they were written then.
    record = BlockRecord(1, "done", token="aa", worker="w", finished=now - last_ago)
    worker = asdict(replace(WORKER, started=now - started_ago))
    lines = [
        encode("worker", now - started_ago, "aa", {"worker": worker}),
        encode("block", now - last_ago, "aa", record.to_dict()),
    ]
    run.journal("predict").mkdir(parents=True)
    (run.journal("predict") / "h-1-aa.jsonl").write_bytes(b"".join(lines))
    with run.lock():
        run.update_stage("predict", state="running", blocks_total=4)
        status = load_status(run.path)
    assert status.stages[0].workers[0].state == state


def test_json_is_stable(run):
    run.update_stage("predict", state="running", blocks_total=20, started=time.time() - 80)
    predict_half(run, time.time() - 80)
    data = json.loads(load_status(run.path).model_dump_json())
    assert list(data) == ["format", "id", "name", "run_dir", "state", "source", "note", "created",
                          "updated", "stages", "queue", "queue_error", "notices", "user",
                          "heard", "forecast"]  # fmt: skip
    assert list(data["stages"][0]) == [
        *("name", "state", "blocks_total", "done", "skipped", "failed", "running", "voxels"),
        *("blocks_per_s", "blocks_per_s_now", "voxels_per_s", "voxels_per_s_now", "eta_s"),
        *(
            "still_since",
            "started",
            "finished",
            "duplicates",
            "conflicts",
            "error",
            "failures",
            "workers",
        ),
        *("errors", "step", "step_done", "step_total"),
    ]
    assert list(data["stages"][0]["errors"][0]) == ["summary", "count", "example", "log"]
    assert list(data["stages"][0]["failures"][0]) == [
        *("block", "attempt", "reason", "error", "offset", "shape", "worker", "place")
    ]
    assert list(data["stages"][0]["workers"][0]) == [
        *("name", "host", "pid", "device", "job", "state", "started", "last", "done", "failed"),
        *("current", "gpu", "slow"),
    ]
    assert RunStatus.model_validate(data) == RunStatus.model_validate_json(json.dumps(data))


def test_failures_are_counted_by_error(run, ledger):
    """All of them, though a status lists the first twenty only; by journal and by ledger."""
    start = time.time() - 80
    run.update_stage("predict", state="running", blocks_total=900, started=start)
    with JournalWriter(run.journal("predict"), replace(WORKER, started=start)) as writer:
        for block in range(700):
            reason = f"ValueError: NaN in block {block} at {block / 7:.2f}"
            if block % 100 == 7:
                reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
            writer.finish(BlockRecord(block, "failed", reason=reason, roi=ROI, finished=start + 2))
    with run.lock():
        feed(run, ledger)
        for status in (load_status(run.path), load_status(run.path, ledger)):
            (stage,) = status.stages
            assert stage.failed == 700
            assert [(e.count, e.example.block) for e in stage.errors] == [(693, 0), (7, 7)]
            assert stage.errors[0].summary == "ValueError: NaN in block 0 at 0.00"
            log = str(run.path / "logs" / "predict" / "worker-0.log")
            assert {e.log for e in stage.errors} == {log}
            text = draw(status)
            assert "693 failed: ValueError: NaN in block 0 at 0.00" in text
            assert "7 failed: RuntimeError: CUDA error" in text
            assert "other errors" not in text
            assert max(map(len, text.splitlines())) <= 80
            # It may be broken over lines, but nothing of it is left out.
            assert "".join(log.split()) in "".join(text.split())


@pytest.mark.parametrize(
    ("ends", "still"),
    [
        ([], True),  # since it began
        ([3000.0, 3010.0], False),
        ([10.0 * i for i in range(1, 12)], True),
        ([1000.0, 2000.0], False),  # its blocks take that long
        ([100.0], True),
    ],
)
def test_the_time_left_is_unknown_while_nothing_moves(run, ledger, ends, still):
    """3,030 s after the stage began."""
    start = time.time() - 3030
    run.update_stage("predict", state="running", blocks_total=20, started=start)
    with JournalWriter(run.journal("predict"), replace(WORKER, started=start)) as writer:
        writer.begin(19, 1)
        writer.finish_many(
            BlockRecord(i, "done", started=start, finished=start + end)
            for i, end in enumerate(ends)
        )
    with run.lock():
        feed(run, ledger)
        for status in (load_status(run.path), load_status(run.path, ledger)):
            (stage,) = status.stages
            since = start + max(ends, default=0.0)
            assert stage.still_since == (pytest.approx(since, abs=1e-3) if still else None)
            assert (stage.eta_s is None) == still
            text = " ".join(draw(status).split())
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
            assert (f"nothing moves since {at}" in text) == still
            assert ("unknown predict:" in text) == still


def test_stragglers_and_the_queue_are_shown(run):
    start = time.time() - 100
    run.update_stage("predict", state="running", blocks_total=900, started=start)
    for name, done in (("a", 20), ("b", 22), ("c", 5), ("d", 21)):
        writer = JournalWriter(run.journal("predict"), replace(WORKER, name=name, started=start))
        writer.finish_many(
            BlockRecord(100 * ord(name) + i, "done", finished=start + i) for i in range(done)
        )
    with run.lock():
        status = load_status(run.path)
    workers = {worker.name: worker for worker in status.stages[0].workers}
    assert {name for name, worker in workers.items() if worker.slow} == {"c"}
    queue = (
        QueueStatus(role="coordinator", state="RUNNING", count=1),
        QueueStatus(role="workers", state="RUNNING", count=4),
        QueueStatus(role="workers", state="PENDING", reason="QOSMaxGRESPerUser", count=12),
        QueueStatus(role="stitch", state="PENDING", reason="Dependency", count=1),
    )
    text = draw(status.model_copy(update={"queue": queue}))
    assert max(map(len, text.splitlines())) <= 80
    (line,) = [line for line in text.splitlines() if line.startswith("c ")]
    assert line.rstrip().endswith(", slow")
    assert "12 workers pending (QOSMaxGRESPerUser)" in " ".join(text.split())


def test_large_numbers_fit_in_80_columns(run):
    start = time.time() - 10**6
    run.update_stage("predict", state="running", blocks_total=10**7, started=start)
    run.update_stage("stitch", state="running", blocks_total=10**7, started=start)
    long, now = "x" * 200, time.time()
    for i in range(30):
        info = replace(WORKER, name=f"worker-{i}-{long}", host=long, device="cuda:7")
        writer = JournalWriter(run.journal("predict"), info)
        writer.finish_many(
            # Thirty kinds of error, told apart by a word.
            BlockRecord(b, "failed", error=f"{chr(65 + i)}{b}: {long}", finished=now, roi=ROI)
            for b in range(10**6 + 100 * i, 10**6 + 100 * i + 5)
        )
        writer.begin(9_999_999 - i)
    with run.lock():
        status = load_status(run.path)
    assert len(status.stages[0].failures) == 20
    assert status.stages[0].failed == 150
    text = draw(status)
    assert max(map(len, text.splitlines())) <= 80
    assert "5 failed: A1000000: " in text
    assert "125 failed: with other errors" in text
    assert "18 more" in text


# With a ledger


@pytest.fixture
def ledger(mongo_uri):
    settings = LedgerSettings(
        uri=SecretStr(mongo_uri), database=f"t{uuid.uuid4().hex}", interval_s=0.05
    )
    ledger = connect(settings)
    yield ledger
    ledger.runs.database.client.drop_database(ledger.runs.database.name)
    ledger.close()


def feed(run: RunFolder, ledger) -> None:
    record = run.record()
    info = {"name": record["name"], "run_dir": str(run.path)}
    feeder = LedgerFeeder(ledger, record["id"], {"predict": run.journal("predict")}, info)
    for name, entry in record["stages"].items():
        feeder.update_stage(name, **entry)
    feeder.start()
    assert feeder.stop(60).complete


def test_ledger_and_journal_give_the_same_picture(run, ledger):
    start = time.time() - 80
    run.update_stage("predict", state="running", blocks_total=20, started=start)
    predict_half(run, start)
    with run.lock():
        feed(run, ledger)
        by_ledger, by_journal = load_status(run.path, ledger), load_status(run.path)
    assert (by_ledger.source, by_journal.source) == ("ledger", "journal")
    ignored = dict.fromkeys(
        ("blocks_per_s", "blocks_per_s_now", "voxels_per_s", "voxels_per_s_now", "eta_s")
    )
    (a,), (b,) = by_ledger.stages, by_journal.stages
    assert a.model_copy(update=ignored) == b.model_copy(update=ignored)
    assert a.blocks_per_s_now == pytest.approx(b.blocks_per_s_now, rel=0.4)
    assert a.blocks_per_s == pytest.approx(b.blocks_per_s, rel=0.2)
    failures = [
        [x for x in draw(s).splitlines() if "failed: " in x] for s in (by_ledger, by_journal)
    ]
    assert failures[0] == failures[1] != []


def test_status_from_another_machine(run, ledger, tmp_path):
    predict_half(run, time.time() - 80)
    run.update_stage("predict", state="running", blocks_total=20)
    feed(run, ledger)
    run.path.rename(tmp_path / "elsewhere")
    status = load_status(run.path, ledger)
    assert (status.source, status.state, status.stages[0].done) == ("ledger", "running", 8)
    with pytest.raises(InputError, match="unknown to the ledger"):
        load_status(tmp_path / "nothing", ledger)


ODD_DOCUMENTS = [
    ("workers", {"$unset": {"token": 1}}),
    ("workers", {"$set": {"started": "soon"}}),
    ("workers", {"$set": {"last": [1]}}),
    ("workers", {"$set": {"last": float("nan")}}),
    ("workers", {"$set": {"name": {"a": 1}}}),
    ("workers", {"$set": {"current": 5}}),
    ("workers", {"$set": {"current": [{"block": 1, "attempt": 1, "begun": float("inf")}]}}),
    ("workers", {"$set": {"current": ["x"]}}),
    ("blocks", {"$set": {"token": ["a"]}}),
    ("blocks", {"$set": {"roi": {"offset": 3}}}),
    ("blocks", {"$set": {"finished": "late"}}),
    ("runs", {"$set": {"stages.predict": []}}),
    ("runs", {"$set": {"stages": ["predict"]}}),
    ("runs", {"$set": {"stages.predict.totals": "many"}}),
]


def test_documents_of_others_end_in_one_line_or_the_journal(run, ledger, tmp_path):
    predict_half(run, time.time() - 80)
    run.update_stage("predict", state="running", blocks_total=20)
    feed(run, ledger)
    database = ledger.runs.database
    moved = tmp_path / "elsewhere"
    for collection, change in ODD_DOCUMENTS:
        before = list(database[collection].find())
        # The server would refuse some of them: whoever owns the database can take its rules away.
        database[collection].update_many({}, change, bypass_document_validation=True)
        here = load_status(run.path, ledger)
        assert here.source == "journal", change
        assert "damaged" in here.note
        run.path.rename(moved)
        with pytest.raises(InputError, match="damaged"):
            load_status(run.path, ledger)
        moved.rename(run.path)
        (line,) = ledger_lines(ledger)
        assert (line["state"] == "damaged") == (collection == "runs")
        database[collection].delete_many({})
        database[collection].insert_many(before)


def test_a_run_that_was_moved_is_shown_where_it_is(run, ledger, tmp_path):
    run.update_stage("predict", state="stopped", blocks_total=20)
    predict_half(run, time.time() - 80)
    feed(run, ledger)
    moved = run.path.rename(tmp_path / "mounted here")
    status = load_status(moved, ledger)
    assert (status.source, status.run_dir) == ("ledger", str(moved))
    logs = {group.log for group in status.stages[0].errors}
    assert logs == {str(moved / "logs" / "predict" / "worker-0.log")}


def test_every_failed_block_is_counted_whatever_its_error_says(ledger):
    """Here each has a text of its own, as where its number is in it."""
    texts = [f"{'OSError' if k < 10_500 else 'ValueError'}: block {k}" for k in range(11_000)]
    ledger.blocks.insert_many(
        {"_id": f"r/predict/{k}", "run": "r", "stage": "predict", "block": k, "state": "failed",
         "order": "", "attempt": 1, "token": "t", "reason": text}
        for k, text in enumerate(texts)
    )  # fmt: skip
    stage = LedgerStage(ledger, "r", "predict")
    groups = failure_groups(stage, "predict", Path("/r"))
    assert [record.block for record in stage.failed(MAX_FAILURES)] == list(range(20))
    assert [(g.count, g.example.block) for g in groups] == [(10_500, 0), (500, 10_500)]


def test_journal_is_read_where_the_ledger_is_behind(run, ledger, monkeypatch):
    predict_half(run, time.time() - 80)
    status = load_status(run.path, ledger)
    assert status.source == "journal"
    assert "does not know" in status.note
    feed(run, ledger)
    assert load_status(run.path, ledger).source == "ledger"
    JournalWriter(run.journal("predict"), WORKER).finish(BlockRecord(13, "done"))
    assert load_status(run.path, ledger).source == "ledger", "a moment behind is usual"
    monkeypatch.setattr("agq.pipeline.status.monitor._BEHIND_S", 0.0)
    status = load_status(run.path, ledger)
    assert (status.source, status.stages[0].done) == ("journal", 9)


def test_journal_is_read_where_the_ledger_is_away(run, caplog):
    predict_half(run, time.time() - 80)
    uri = f"mongodb://me:hunter2@127.0.0.1:{free_port()}/?authSource=admin"
    away = connect(LedgerSettings(uri=SecretStr(uri), timeout_s=0.3))
    status = load_status(run.path, away)
    assert (status.source, status.stages[0].done) == ("journal", 8)
    assert "mongodb://me:***@127.0.0.1" in status.note
    assert "hunter2" not in status.note + caplog.text
    assert max(map(len, draw(status).splitlines())) <= 80
    away.close()


# Watching


def test_watch_goes_on_while_the_queue_is_not_known(run):
    """The coordinator is away for a requeue, and so is the program that knows its queue."""
    run.update_stage("predict", state="stopped", blocks_total=30, error="requeued")
    (run.path / "slurm").mkdir()
    asked = []

    def queue(_run_dir):
        asked.append(1)
        if len(asked) < 5:
            raise InputError("squeue: Unable to contact slurm controller")
        run.update_stage("predict", state="done")
        return ()

    status = watch(run.path, queue=queue, interval_s=0.01, console=Console(file=io.StringIO()))
    assert (status.state, status.queue, status.queue_error) == ("done", (), None)


def test_watch_follows_until_the_end(run):
    def work() -> None:
        with run.lock():
            started = time.time()
            run.update_stage("predict", state="running", blocks_total=30, started=started)
            with JournalWriter(run.journal("predict"), WORKER) as writer:
                for block in range(30):
                    writer.finish(BlockRecord(block, "done", finished=time.time(), voxels=10))
                    time.sleep(0.02)
            run.update_stage("predict", state="done", finished=time.time())
            (run.path / ".lock").write_text("host elsewhere, pid 1")

    thread = threading.Thread(target=work)
    thread.start()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    status = watch(run.path, interval_s=0.1, console=console)
    thread.join()
    assert (status.state, status.stages[0].done) == ("done", 30)
    assert "30/30" in console.file.getvalue()


def test_monitor_sees_a_stage_that_is_started_over(run):
    predict_half(run, time.time() - 80)
    monitor = Monitor(run.path)
    assert monitor.poll().stages[0].done == 8
    for path in run.journal("predict").iterdir():
        path.unlink()
    with JournalWriter(run.journal("predict"), WORKER) as writer:
        writer.finish(BlockRecord(0, "done"))
    assert monitor.poll().stages[0].done == 1


# Progress of a command


def test_progress_in_lines(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    with RunProgress(tmp_path, console=console, line_s=0.0) as progress:
        progress.start("predict", 10, done=4)
        for done in (1, 1, 6):
            progress.blocks(PredictProgress(6, done, 0, 1, done * 10**6, 2, 1.0))
        progress.step("relabel", 0, 5)
        progress.step("relabel", 5, 5)
        progress.step("relabel checksums", 0, 1)
        progress.note("[bold] is not markup here")
    lines = console.file.getvalue().splitlines()
    assert lines[1] == "predict: 10 blocks, 4 of them done before"
    assert lines[2].startswith("predict: 5/10 (50 %), ")
    assert lines[2].endswith("left, 1 Mvoxel/s, 2 workers, 1 failed")
    assert lines[3].startswith("predict: 10/10 (100 %) in 0s")
    assert lines[4:] == [
        "write: 5 blocks",
        "write: 5/5 (100 %) in 0s",
        "[bold] is not markup here",
    ]


def test_progress_lines_are_few(tmp_path):
    console = Console(file=io.StringIO(), width=80)
    with RunProgress(tmp_path, console=console) as progress:
        progress.start("predict", 1000)
        for done in range(1, 1000):
            progress.advance("predict", done)
    assert len(console.file.getvalue().splitlines()) == 2


def test_progress_bars(tmp_path):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with RunProgress(tmp_path, console=console) as progress:
        progress.blocks(PredictProgress(6, 3, 1, 0, 10**6, 2, 1.0))
        progress.step("pyramid s1", 0, 5)
        progress.step("pyramid s1", 5, 5)
        progress.step("pyramid s1", 0, 7)
        progress.step("pyramid s2", 1, 2)
        waiting.doing("drawing")
        time.sleep(0.3)  # bars are drawn ten times a second
    text = console.file.getvalue()
    for part in ("4/6", "1/9", "drawing"):
        assert part in text


STEPS = ("contacts", "agglomerate 1/2", "agglomerate 2/2", "lut up 1/1", "lut down 1/1", "lut map")


def test_steps_are_told_as_the_stages_that_a_user_knows(tmp_path):
    """Of a whole run they were 21 bars."""
    console = Console(file=io.StringIO(), width=80)
    with RunProgress(tmp_path, console=console, line_s=0.0) as progress:
        for name in STEPS:
            for step in (name, f"{name} checksums"):
                progress.step(step, 0, 4)
                progress.step(step, 4, 4)
        progress.step("relabel", 0, 3)
    lines = console.file.getvalue().splitlines()[1:]
    assert lines[0] == "stitch: starts"
    percents = [int(line.split()[1]) for line in lines[1:-1]]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert lines[-1] == "write: 3 blocks"
    console = Console(file=io.StringIO(), width=80)
    with RunProgress(tmp_path, console=console, line_s=0.0, steps=True) as progress:
        for name in STEPS:
            progress.step(name, 4, 4)
    assert len(console.file.getvalue().splitlines()) == 1 + len(STEPS)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (60, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m"),
     (90000, "1d 01h")],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_copy_is_not_shown_as_its_original(run, tmp_path):
    """The ledger knows the original by the id that the copy still has."""

    class Ledger:
        def find_run(self, run_id):
            raise AssertionError("asked for the original")

    run.update_stage("predict", state="done", blocks_total=4)
    shutil.copytree(run.path, tmp_path / "copy")
    status = load_status(tmp_path / "copy", Ledger())
    assert status.source == "journal"
    assert "does not know this run" in status.note
