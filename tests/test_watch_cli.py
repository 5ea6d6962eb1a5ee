"""Metrics, all runs of a database, and bringing a database to what the journal says."""

import json
import re
import uuid

import pytest
from pymongo import MongoClient

from pipeline.run_status import RunStatus, StageStatus, WorkerStatus
from pipeline.watch_cli import prometheus
from tests.runs import agq, make_config
from tests.services import mongo_uri  # noqa: F401


def worker(name: str, state: str) -> WorkerStatus:
    return WorkerStatus(
        name=name, host="n", pid=1, device="cpu", state=state, started=0, last=1, done=1, failed=0
    )


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
        id="1",
        name='a "b"\\c',
        run_dir="/r",
        state="running",
        source="journal",
        updated=1795374381.25,
        stages=(stage,),
    )
    lines = prometheus(status).splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    for line in samples:
        assert re.fullmatch(r'agq_\w+\{(\w+="(\\.|[^"\\])*",?)+\} [-+.e\d]+', line), line
    name = 'run="a \\"b\\"\\\\c"'
    assert f'agq_blocks{{{name},stage="predict",state="done"}} 4.0' in samples
    assert f'agq_workers{{{name},stage="predict",state="silent"}} 1.0' in samples
    assert f"agq_updated_seconds{{{name}}} 1795374381.25" in samples
    assert f'agq_voxels_done{{{name},stage="predict"}} 123456789.0' in samples


def test_status_wants_a_run_or_all():
    refused = agq("status")
    assert refused.returncode == 2
    assert "--all" in refused.stderr


@pytest.mark.slow
def test_sync_and_all_runs(tmp_path, mongo_uri, monkeypatch):  # noqa: F811
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
    assert 'agq_blocks{run="run",stage="predict",state="done"} 60.0' in text
    with MongoClient(mongo_uri) as client:
        client.drop_database(database)
