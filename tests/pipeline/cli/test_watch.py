"""Metrics, all runs of a database, and bringing a database to what the journal says."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid

import pytest
from pydantic import SecretStr
from pymongo import MongoClient

from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.settings import LedgerSettings
from agq.pipeline.cli import watch as watch_commands
from agq.pipeline.cli.watch import prometheus
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.session import feeder_of
from agq.pipeline.status.run_status import QueueStatus, RunStatus, StageStatus, WorkerStatus
from tests.helpers.runs import agq, environment, make_config


def worker(name: str, state: str) -> WorkerStatus:
    return WorkerStatus(
        name=name, host="n", pid=1, device="cpu", state=state, started=0, last=1, done=1, failed=0
    )


def lint(text: str) -> None:
    """Check what `promtool check metrics` does, for gauges; with it too, where it is installed."""
    if promtool := shutil.which("promtool"):
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert text.endswith("\n")
    described: dict[str, set[str]] = {}
    samples = set()
    for line in text.splitlines():
        words = line.split(" ", 3)
        if line.startswith("# "):
            kind, name, what = words[1], words[2], words[3]
            assert kind not in described.setdefault(name, set()), line
            described[name].add(kind)
            assert what == "gauge" if kind == "TYPE" else what
            assert re.fullmatch(r"agq_[a-z_]+", name), "no capitals, colons or figures"
            assert not re.search(r"_(total|count|sum|bucket|info)$", name), "that is no gauge"
            assert not {"gauge", "counter", "ms", "s", "kb", "minutes", "hours"} & {
                *name.split("_")
            }
            last = name
            continue
        name, _, rest = line.partition("{")
        assert name == last, "samples follow the lines about their metric"
        labels = rest.rpartition("}")[0]
        assert (name, labels) not in samples, "no sample twice"
        samples.add((name, labels))
        assert {"run", "id", "user"} <= set(re.findall(r'(\w+)="', labels))
    assert all(kinds == {"HELP", "TYPE"} for kinds in described.values())
    assert {name for name, _ in samples} == set(described)


def test_metrics_are_prometheus_text():
    stage = StageStatus(
        name="predict",
        state="running",
        blocks_total=10,
        done=4,
        failed=1,
        voxels=123456789,
        workers=(worker("a", "running"), worker("b", "silent")),
    )
    status = RunStatus(
        id="1f",
        user="me",
        name='a "b"\\c',
        run_dir="/r",
        state="running",
        source="journal",
        updated=1795374381.25,
        stages=(stage,),
        queue=tuple(
            QueueStatus(role="workers", state="PENDING", reason=reason, count=2)
            for reason in ("Resources", "Priority")
        ),
    )
    text = prometheus(status)
    lint(text)
    lines = text.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    for line in samples:
        assert re.fullmatch(r'agq_\w+\{(\w+="(\\.|[^"\\])*",?)+\} [-+.e\d]+', line), line
    name = 'run="a \\"b\\"\\\\c",id="1f",user="me"'
    assert f'agq_blocks{{{name},stage="predict",state="done"}} 4.0' in samples
    assert f'agq_workers{{{name},stage="predict",state="silent"}} 1.0' in samples
    assert f'agq_batch_jobs{{{name},role="workers",state="pending"}} 4.0' in samples
    assert f'agq_run_state{{{name},state="running"}} 1.0' in samples
    assert f'agq_run_state{{{name},state="stopped"}} 0.0' in samples
    assert f'agq_stage_blocks{{{name},stage="predict"}} 10.0' in samples
    assert f"agq_updated_timestamp_seconds{{{name}}} 1795374381.25" in samples
    assert f'agq_voxels_done{{{name},stage="predict"}} 123456789.0' in samples


def test_status_wants_a_run_or_all():
    refused = agq("status")
    assert refused.returncode == 2
    assert "--all" in refused.stderr


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run with one worker's journal and log: a block done, one failed twice, one begun."""
    run = RunFolder(tmp_path / "the run")
    with run.lock():
        run.create({"run_dir": str(run.path), "input": {"raw": {"path": "x.zarr"}}}, {"grid": {}})
    worker = WorkerInfo("77_3", "gpu4", 12, job="77_3")
    with JournalWriter(run.journal("predict"), worker) as journal:
        journal.begin(1)
        journal.finish(BlockRecord(1, "done", finished=time.time()))
        for attempt in (1, 2):
            journal.begin(5, attempt)
            error = f"Traceback (most recent call last):\n  File x\nValueError: try {attempt}"
            reason = f"ValueError: try {attempt}"
            journal.finish(BlockRecord(5, "failed", attempt=attempt, reason=reason, error=error))
        journal.begin(6)
    run.update_stage("predict", state="failed", blocks_total=9)
    logs = run.path / "logs"
    (logs / "slurm").mkdir(parents=True)
    (logs / "predict").mkdir()
    (logs / "predict" / "worker-77_3.log").write_text("".join(f"line {i}\n" for i in range(900)))
    (logs / "predict" / "worker-77_4.log").write_text("another\n")
    (logs / "slurm" / "workers-77_3.log").write_text("job 77_3 on gpu4\n")
    return run


@pytest.mark.parametrize(("state", "status"), [("stopped", 1), ("failed", 1), ("done", 0)])
def test_watch_ends_as_the_run_did(run, main, state, status):
    run.update_stage("predict", state=state)
    assert main("watch", run.path, "--interval", "0.2")[0] == status


def test_watch_waits_for_a_run_that_is_starting(run, main, tmp_path, monkeypatch):
    config = make_config(tmp_path)
    monkeypatch.setattr(watch_commands, "_START_S", 0.2)
    code, _, err = main("watch", config)
    assert code == 2
    assert f"start it: agq run {config}" in err
    run.update_stage("predict", state="done")
    monkeypatch.setattr(watch_commands, "_START_S", 30.0)
    there = tmp_path / "later"
    starting = threading.Timer(0.5, run.path.rename, (there,))
    starting.start()
    assert main("watch", there, "--interval", "0.2")[0] == 0
    starting.join()


def test_status_of_a_folder_lists_its_runs(run, main):
    run.update_stage("predict", state="done", blocks_total=9)
    code, out, _ = main("status", run.path.parent)
    assert code == 0
    assert out.startswith(f"Runs of {run.path.parent}")
    assert run.path.name in out
    assert max(len(line) for line in out.splitlines()[1:]) <= 80


def test_a_command_without_a_database_says_so(run, main, monkeypatch):
    monkeypatch.delenv("AGQ_MONGO_URI", raising=False)
    code, _, err = main("ledger", "sync", run.path)
    assert code == 2
    assert "no database is named: set the environment variable AGQ_MONGO_URI" in err


def test_logs_of_a_block_and_of_a_worker(run):
    said = agq("logs", run.path, "--block", "5")
    assert said.returncode == 0
    lines = said.stdout.splitlines()
    kinds = [line[21:] for line in lines if line.startswith("20")]
    assert kinds == [
        "attempt 1 begun by 77_3 on gpu4",
        "failed by 77_3 on gpu4: ValueError: try 1",
        "attempt 2 begun by 77_3 on gpu4",
        "failed by 77_3 on gpu4: ValueError: try 2",
    ]
    assert "ValueError: try 1" in lines
    assert f"log: {run.path}/logs/predict/worker-77_3.log" in lines
    # By the worker's name: its own log, and that of its job.
    said = agq("logs", run.path, "--worker", "77_3", "-n", "3").stdout
    assert said.count("==> ") == 2
    assert "line 897\nline 898\nline 899\n" in said
    assert "line 896\n" not in said
    assert "job 77_3 on gpu4" in said
    assert "another" not in said
    assert agq("logs", run.path).stdout.count(".log\n") == 3
    for wrong, word in (
        ("--block=8", "has no line about this block"),
        ("--worker=9", "has no such log; agq logs"),
    ):
        refused = agq("logs", run.path, wrong)
        assert refused.returncode == 2
        assert word in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_status_of_a_run_on_another_machine(run, tmp_path, mongo_uri, monkeypatch):
    record = run.record()
    database = f"t{uuid.uuid4().hex}"
    ledger = connect(LedgerSettings(uri=SecretStr(mongo_uri), database=database))
    info = {"name": record["name"], "run_dir": str(run.path)}
    feeder = LedgerFeeder(ledger, record["id"], {"predict": run.journal("predict")}, info)
    feeder.update_stage("predict", **run.record()["stages"]["predict"])
    feeder.start()
    assert feeder.stop(60).complete
    ledger.close()
    run.path.rename(tmp_path / "not here")
    monkeypatch.delenv("AGQ_MONGO_URI", raising=False)
    for name in ("run", "nothing here"):
        refused = agq("status", tmp_path / name)
        assert refused.returncode == 2
        assert "AGQ_MONGO_URI" in refused.stderr
        assert refused.stderr.count("\n") == 1
    monkeypatch.setenv("AGQ_MONGO_URI", mongo_uri)
    monkeypatch.setenv("AGQ_MONGO_DATABASE", database)
    for name in (run.path, record["id"]):
        said = agq("status", name)
        assert said.returncode == 0, said.stderr
        assert "(ledger" in said.stdout
        assert "1 failed: ValueError: try 2" in said.stdout
        lines = [line for line in said.stdout.splitlines() if str(tmp_path) not in line]
        assert max(map(len, lines)) <= 80
        data = json.loads(agq("status", name, "--json").stdout)
        assert (data["id"], data["run_dir"]) == (record["id"], str(run.path))
        assert data["stages"][0]["errors"][0]["log"].endswith("logs/predict/worker-77_3.log")
    refused = agq("status", tmp_path / "nothing here")
    assert refused.returncode == 2
    assert "unknown to the ledger" in refused.stderr
    with MongoClient(mongo_uri) as client:
        client.drop_database(database)


def test_ten_runs_of_one_name_are_told_apart(run, tmp_path, mongo_uri, main, monkeypatch):
    """From their folders, from a database, and with a damaged one among them."""
    database = f"t{uuid.uuid4().hex}"
    ledger = connect(LedgerSettings(uri=SecretStr(mongo_uri), database=database))
    now, ids, parent = time.time(), [], tmp_path / "parent"
    parent.mkdir()
    run.path.rename(parent / "first")
    for i, state in enumerate(("running", "done", "stopped")):
        one = RunFolder(parent / f"run{i}")
        with one.lock():
            one.create({"run_dir": str(one.path)}, {"grid": {}})
            one.update(name="the same")
            one.update_stage("predict", state=state, blocks_total=30, started=now - 100)
        (one.path / ".lock").write_text("host elsewhere, pid 1")
        with JournalWriter(one.journal("predict"), WorkerInfo("w", "n", 1)) as journal:
            journal.finish_many(BlockRecord(b, "done", finished=now - b) for b in range(12))
        feeder = feeder_of(one, ledger)
        feeder.start()
        assert feeder.stop(60).complete
        ids.append(one.record()["id"])
    ledger.runs.insert_one({"_id": "odd", "created": 1.0, "stages": {"predict": {"totals": 5}}})
    ledger.close()
    (parent / "bad").mkdir()
    (parent / "bad" / "run.json").write_text('{"format": 1, "id": [], "stages": []}')
    monkeypatch.setenv("AGQ_MONGO_URI", mongo_uri)
    monkeypatch.setenv("AGQ_MONGO_DATABASE", database)
    here, there = (
        {
            line["id"]: line
            for line in json.loads(main("status", "--all", *where, "--json")[1])["runs"]
        }
        for where in ([parent], [])
    )
    assert here[""]["state"] == there["odd"]["state"] == "damaged"
    assert "run.json" in here[""]["problem"]
    assert there["odd"]["problem"]
    assert set(there) == {*ids, "odd"}
    for run_id, state in zip(ids, ("running", "done", "stopped"), strict=True):
        for line in (here[run_id], there[run_id]):
            assert (line["state"], line["stage"], line["problem"]) == (state, "predict", None)
            assert line["stages"]["predict"]["done"] == 12
            assert line["user"] == here[run_id]["user"]
            if state == "running":
                assert line["eta_s"] == pytest.approx(18 / line["blocks_per_s"])
            else:
                assert line["blocks_per_s"] is None
        assert here[run_id]["run_dir"] == there[run_id]["run_dir"]
    text = main("status", "--all", parent)[1]
    assert {run_id[:8] for run_id in ids} <= set(text.split())
    assert str(parent / "run2") in text
    monkeypatch.delenv("AGQ_MONGO_URI")
    code, _, said = main("status", "--all")
    assert (code, "agq status --all FOLDER" in said) == (2, True)
    code, _, said = main("status", "--all", tmp_path / "nothing")
    assert (code, "no run folder in it" in said) == (2, True)
    with MongoClient(mongo_uri) as client:
        client.drop_database(database)


def loaded_by(code: str, *arguments: object, **variables: str) -> set[str]:
    """Run some code in a process of its own; return the packages it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('loaded:', *sys.modules)", *arguments],
        env={**environment(), "AGQ_MONGO_URI": "", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()[-1].split()
    assert words[0] == "loaded:"
    return {word if word.startswith("agq.") else word.partition(".")[0] for word in words}


ASK = """
from agq.pipeline.cli.main import app
try:
    app(["status", sys.argv[1]])
except SystemExit:
    pass
"""
#: Neither way of a status needs them, and each takes as long as Python does to start, or longer.
HEAVY = {
    *("torch", "zarr", "numba", "dask", "distributed", "scipy", "matplotlib", "daisy", "funlib"),
    *(
        "tornado",
        "yaml",
        "agq.pipeline.config.schema",
        "agq.pipeline.slurm.settings",
        "agq.pipeline.run.stages",
    ),
}


def test_the_command_line_imports_a_command_when_it_is_asked_for():
    loaded = loaded_by("import agq.pipeline.cli.main")
    assert "typer" in loaded
    assert not loaded & {*HEAVY, "numpy", "pymongo", "rich", "psutil"}


def test_a_command_looks_for_no_garbage_when_it_ends():
    """It would take a fifth of the time of a small run."""
    code = """
import atexit, gc, sys
# Registered before the command registers its own, so called after it.
atexit.register(lambda: print("frozen:", gc.get_freeze_count()))
sys.argv[1:] = ["--version"]
from agq.pipeline.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.rpartition("frozen: ")[2]) > 10_000


def test_a_status_loads_only_what_it_needs(run, tmp_path, monkeypatch):
    """It is asked often, and should answer within a second."""
    (run.path / "slurm").mkdir()
    jobs = {"here": "/", "grace_s": 30, "workers": 1, "jobs": []}
    (run.path / "slurm" / "jobs.json").write_text(json.dumps(jobs))
    loaded = loaded_by(ASK, run.path)
    assert {"numpy", "agq.pipeline.slurm.jobs"} <= loaded
    assert not loaded & {*HEAVY, "pymongo"}


def test_a_status_of_the_database_loads_no_numpy_and_waits_for_no_thread(
    run,
    mongo_uri,
):
    database = f"t{uuid.uuid4().hex}"
    ledger = connect(LedgerSettings(uri=SecretStr(mongo_uri), database=database))
    feeder = LedgerFeeder(ledger, run.record()["id"], {"predict": run.journal("predict")}, {})
    feeder.start()
    assert feeder.stop(60).complete
    ledger.close()
    record = run.record()
    record["config"]["ledger"] = {"database": database}
    run.record_path.write_text(json.dumps(record))
    code = """
import atexit
waited = []
# Registered before pymongo registers its own, so called after it.
atexit.register(lambda: print("waited:", len(waited), "loaded:", *sys.modules))
from pymongo.periodic_executor import PeriodicExecutor
PeriodicExecutor.join = lambda *_: waited.append(1)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + code + ASK, run.path],
        env={**environment(), "AGQ_MONGO_URI": mongo_uri},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(ledger" in done.stdout
    words = done.stdout.splitlines()[-1].split()
    assert words[:2] == ["waited:", "0"]
    assert "pymongo" in words
    assert not {word.partition(".")[0] for word in words} & {*HEAVY, "numpy"}
    with MongoClient(mongo_uri) as client:
        client.drop_database(database)


@pytest.mark.slow
def test_sync_and_all_runs(tmp_path, mongo_uri, monkeypatch):
    database = f"t{uuid.uuid4().hex}"
    config = make_config(tmp_path)
    assert agq("predict", config).returncode == 0
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    record["config"]["ledger"] = {"database": database}
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setenv("AGQ_MONGO_URI", mongo_uri)
    for _ in range(2):
        done = agq("ledger", "sync", run)
        assert done.returncode == 0, done.stderr
        with MongoClient(mongo_uri) as client:
            blocks = list(client[database].blocks.find())
            (known,) = client[database].runs.find()
        assert len(blocks) == 60
        assert {b["state"] for b in blocks} == {"done"}
        assert known["stages"]["predict"]["totals"]["done"] == 60
        with MongoClient(mongo_uri) as client:
            client[database].blocks.delete_many({"block": {"$lt": 20}})
    text = agq("metrics", run).stdout
    lint(text)
    who = f'run="run",id="{record["id"]}",user="{record["commands"][-1]["user"]}"'
    assert f'agq_blocks{{{who},stage="predict",state="done"}} 60.0' in text
    with MongoClient(mongo_uri) as client:
        client.drop_database(database)
