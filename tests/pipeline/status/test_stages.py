"""The words for the stages of a run, the same from journal and ledger."""

import contextlib
import json
import shutil
import time
import uuid

import pytest
from pydantic import SecretStr

from agq.blockwise.journal.records import BlockRecord, WorkerInfo, decode, encode
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.settings import LedgerSettings
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.session import feeder_of
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.run_status import QueueStatus
from agq.pipeline.status.stages import run_state_of, stage_entries, stage_status
from tests.helpers.ledgers import wait_for

PARTS = ("relabel", "pyramid")


@pytest.mark.parametrize(
    ("told", "begun", "alive", "run", "words"),
    [
        ({}, "", True, "running", {}),
        ({"predict": "running"}, "predict", True, "running", {"predict": "running"}),
        ({"predict": "running"}, "predict", False, "stopped", {"predict": "stopped"}),
        ({"predict": "running"}, "predict", None, "running", {"predict": "running"}),
        ({"predict": "done"}, "predict", False, "done", {"predict": "done"}),
        ({"predict": "failed"}, "predict", False, "failed", {"predict": "failed"}),
        (
            {"predict": "done", "stitch": "running"}, "predict", True, "running",
            {"predict": "done", "stitch": "running", "relabel": "waiting", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "running"}, "predict relabel", True, "running",
            {"predict": "done", "stitch": "running", "relabel": "running", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "stopped"}, "predict relabel", False, "stopped",
            {"predict": "done", "stitch": "stopped", "relabel": "stopped", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "running"}, "predict relabel", False, "stopped",
            {"predict": "done", "stitch": "stopped", "relabel": "stopped", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "done"}, "predict relabel", False, "done",
            {"predict": "done", "stitch": "done", "relabel": "done", "pyramid": "done"},
        ),
    ],
)  # fmt: skip
def test_the_same_facts_give_the_same_words(tmp_path, told, begun, alive, run, words):
    record = {"stages": {name: {"state": state} for name, state in told.items()}}
    # The ledger's document has sums of all stages with a journal from the beginning.
    document = {"stages": {name: {"totals": {"bytes": 0}} for name in ("predict", *PARTS)}}
    for name, entry in record["stages"].items():
        document["stages"].setdefault(name, {}).update(entry)
    for said in (record, document):
        entries = stage_entries(said, begun.split())
        state = run_state_of(entries.values(), alive)
        assert state == run
        stages = [
            stage_status(name, entry, None, state, tmp_path, time.time())
            for name, entry in entries.items()
        ]
        assert {stage.name: stage.state for stage in stages} == words
        assert list(words) == [stage.name for stage in stages]


@pytest.fixture(scope="module")
def ledger(mongo_uri):
    settings = LedgerSettings(
        uri=SecretStr(mongo_uri), database=f"t{uuid.uuid4().hex}", interval_s=0.05
    )
    ledger = connect(settings)
    yield ledger
    ledger.runs.database.client.drop_database(settings.database)
    ledger.close()


def job(role: str, state: str = "PENDING", reason: str | None = None) -> QueueStatus:
    return QueueStatus(role=role, state=state, reason=reason, count=1)


WORKERS = job("workers", "RUNNING")
STITCH = job("stitch", reason="Dependency")
HERE, GONE, ELSEWHERE = True, False, None
BOTH = ("coordinator", "stitch")
GONE_JOB = "is not in the queue any more"

#: What the record says, stages with blocks, roles submitted, the queue, whether the process lives;
#: then the words for the run and for its stages, and a part of an error.
FACTS = {
    "nothing begun": ({}, "", (), None, GONE, "new", "", None),
    "computes": ({"predict": "running"}, "predict", (), None, HERE, "running", "running", None),
    "computes elsewhere": (
        {"predict": "running"}, "predict", (), None, ELSEWHERE, "running", "running", None,
    ),
    "killed": ({"predict": "running"}, "predict", (), None, GONE, "stopped", "stopped", None),
    "told to stop": ({"predict": "stopped"}, "predict", (), None, GONE, "stopped", "stopped", None),
    "blocks failed": ({"predict": "failed"}, "predict", (), None, GONE, "failed", "failed", None),
    "predicted": ({"predict": "done"}, "predict", (), None, GONE, "done", "done", None),
    "stitches": (
        {"predict": "done", "stitch": "running"}, "predict", (), None, HERE,
        "running", "done running waiting waiting", None,
    ),
    "relabels": (
        {"predict": "done", "stitch": "running"}, "predict relabel", (), None, HERE,
        "running", "done running running waiting", None,
    ),
    "killed while it relabels": (
        {"predict": "done", "stitch": "running"}, "predict relabel", (), None, GONE,
        "stopped", "done stopped stopped waiting", None,
    ),
    "scores": (
        {"predict": "done", "stitch": "done", "evaluate": "running"}, "predict relabel pyramid", (),
        None, HERE, "running", "done done done done running", None,
    ),
    "all done": (
        {"predict": "done", "stitch": "done", "evaluate": "done"}, "predict relabel pyramid",
        BOTH, (), GONE, "done", "done done done done done", None,
    ),
    "submitted": (
        {"predict": "waiting", "stitch": "waiting"}, "", BOTH,
        (job("coordinator"), STITCH), ELSEWHERE, "new", "waiting waiting waiting waiting", None,
    ),
    "submitted by an earlier release": (
        {}, "", BOTH, (job("coordinator"), STITCH), ELSEWHERE,
        "new", "waiting waiting waiting waiting", None,
    ),
    "submitted, and SLURM is not here": (
        {"predict": "done"}, "predict", BOTH, None, ELSEWHERE,
        "waiting", "done waiting waiting waiting", None,
    ),
    "predicts in a job": (
        {"predict": "running", "stitch": "waiting"}, "predict", BOTH,
        (job("coordinator", "RUNNING"), WORKERS, STITCH), ELSEWHERE,
        "running", "running waiting waiting waiting", None,
    ),
    "the coordinator waits to be started again": (
        {"predict": "stopped", "stitch": "waiting"}, "predict", BOTH,
        (job("coordinator", reason="BeginTime"), WORKERS, STITCH), GONE,
        "waiting", "waiting waiting waiting waiting", None,
    ),
    "the coordinator starts again after kill -9": (
        {"predict": "running", "stitch": "waiting"}, "predict", BOTH,
        (job("coordinator", "RUNNING"), WORKERS, STITCH), GONE,
        "waiting", "waiting waiting waiting waiting", None,
    ),
    "the coordinator was cancelled before it began": (
        {"predict": "waiting", "stitch": "waiting"}, "", BOTH, (STITCH,), ELSEWHERE,
        "stopped", "stopped waiting waiting waiting", GONE_JOB,
    ),
    "the coordinator was killed with its job": (
        {"predict": "running", "stitch": "waiting"}, "predict", BOTH, (WORKERS, STITCH), ELSEWHERE,
        "stopped", "stopped waiting waiting waiting", GONE_JOB,
    ),
    "the stitch waits for a node": (
        {"predict": "done", "stitch": "waiting"}, "predict", BOTH,
        (job("stitch", reason="Resources"),), GONE,
        "waiting", "done waiting waiting waiting", None,
    ),
    "the stitch was cancelled while it waited": (
        {"predict": "done", "stitch": "waiting"}, "predict", BOTH, (), GONE,
        "stopped", "done stopped waiting waiting", GONE_JOB,
    ),
    "an earlier release's stitch was cancelled": (
        {"predict": "done"}, "predict", BOTH, (), GONE,
        "stopped", "done stopped waiting waiting", GONE_JOB,
    ),
    "the stitch was cancelled while it ran": (
        {"predict": "done", "stitch": "running"}, "predict relabel", BOTH, (), ELSEWHERE,
        "stopped", "done stopped stopped waiting", GONE_JOB,
    ),
    "the stitch can never start": (
        {"predict": "done", "stitch": "waiting"}, "predict", BOTH,
        (job("stitch", reason="DependencyNeverSatisfied"),), GONE,
        "stopped", "done stopped waiting waiting", "can never start (DependencyNeverSatisfied)",
    ),
    "the stitch failed and said why": (
        {"predict": "done", "stitch": "stopped"}, "predict", BOTH, (), GONE,
        "stopped", "done stopped waiting waiting", "said",
    ),
    "the cancelled stitch is done by hand": (
        {"predict": "done", "stitch": "running"}, "predict", BOTH, (), HERE,
        "running", "done running waiting waiting", None,
    ),
    "only the prediction was submitted": (
        {"predict": "done"}, "predict", ("coordinator",), (), GONE, "done", "done", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_every_state_has_one_word_in_journal_and_ledger(tmp_path, ledger, name):
    told, begun, roles, queue, alive, word, words, error = FACTS[name]
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({"model": {}}, {"grid": {}})
    for stage, state in told.items():
        run.update_stage(stage, state=state, blocks_total=4)
        if state != "waiting":
            run.update_stage(stage, started=time.time() - 60)
        if state == "stopped":
            run.update_stage(stage, error="said")
    for stage in begun.split():
        with JournalWriter(run.journal(stage), WorkerInfo(f"w-{stage}", "n", 1)) as writer:
            writer.finish(BlockRecord(0, "done", finished=time.time()))
    if roles:
        (run.path / "slurm").mkdir()
        entries = [{"id": 7 + i, "role": role} for i, role in enumerate(("workers", *roles))]
        (run.path / "slurm" / "jobs.json").write_text(json.dumps({"jobs": entries}))
    with contextlib.ExitStack() as stack:
        if alive is HERE:
            stack.enter_context(run.lock())
        if alive is ELSEWHERE:
            (run.path / ".lock").write_text("host elsewhere, pid 1")
        feeder = feeder_of(run, ledger)
        feeder.start()
        assert feeder.stop(60).complete
        asked = [load_status(run.path, source, lambda _: queue) for source in (None, ledger)]
    assert [status.source for status in asked] == ["journal", "ledger"]
    for status in asked:
        assert status.state == word
        assert " ".join(stage.state for stage in status.stages) == words
        errors = [stage.error for stage in status.stages if stage.error]
        assert (error in errors[0]) if error else errors in ([], ["said"])


def test_jobs_of_the_original_say_nothing_of_a_copy(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({"run_dir": str(run.path)}, {"grid": {}})
    run.update_stage("predict", state="done")
    (run.path / "slurm").mkdir()
    jobs = {"jobs": [{"id": 8, "role": "coordinator"}, {"id": 9, "role": "stitch"}]}
    (run.path / "slurm" / "jobs.json").write_text(json.dumps(jobs))
    shutil.copytree(run.path, tmp_path / "copy")
    assert load_status(run.path, queue=lambda _: ()).state == "stopped"
    assert load_status(tmp_path / "copy", queue=lambda _: None).state == "done"
    for damaged in ("", "[1]", '{"jobs": [{"role": "stitch"}]}', '{"jobs": 5}'):
        (run.path / "slurm" / "jobs.json").write_text(damaged)
        assert load_status(run.path, queue=lambda _: None).state == "done"


def test_blocks_of_dead_workers_are_given_back(tmp_path, ledger):
    """One ended with a block in hand, one was killed long ago, one works."""
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({"model": {}}, {"grid": {}})
    run.update_stage("predict", state="running", started=time.time() - 900, blocks_total=4)
    folder = run.journal("predict")
    with JournalWriter(folder, WorkerInfo("ended", "n", 1)) as writer:
        writer.begin(1)
    writers = [JournalWriter(folder, WorkerInfo(name, "n", 2)) for name in ("killed", "works")]
    for block, writer in enumerate(writers, 2):
        writer.begin(block)
    killed = writers[0]
    before = [decode(line) for line in killed.path.read_bytes().splitlines()]
    killed.path.write_bytes(
        b"".join(encode(e.kind, 0, e.token, e.data | {"time": e.time - 600}) for e in before)
    )

    def states() -> list[str]:
        documents = ledger.find_blocks(run.record()["id"], "predict")
        return [document["state"] for document in documents]

    feeder = feeder_of(run, ledger)
    feeder.start()
    wait_for(lambda: states() == ["queued", "queued", "running"])
    wait_for(lambda: "totals" in ledger.find_run(run.record()["id"])["stages"]["predict"])
    with run.lock():
        for status in (load_status(run.path), load_status(run.path, ledger)):
            (stage,) = status.stages
            assert stage.running == 1
            assert {w.name: w.state for w in stage.workers} == {
                "ended": "ended", "killed": "silent", "works": "running"
            }  # fmt: skip
    # What comes late counts: the worker was only stopped for a while.
    killed.finish(BlockRecord(2, "done", finished=time.time()))
    wait_for(lambda: states() == ["queued", "done", "running"])
    assert feeder.stop(60).complete
    assert states() == ["queued", "done", "queued"], "nobody is left who works on it"
    for writer in writers:
        writer.close()
