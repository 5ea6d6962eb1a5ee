import itertools
import logging
import random
import shutil
import signal
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bson
import pytest
from pydantic import SecretStr, ValidationError
from pymongo.errors import DuplicateKeyError, WriteError

from agq.blockwise.journal.records import BlockRecord, BlockState, Order
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.feeder import LedgerFeeder
from agq.blockwise.ledger.progress import LedgerStage
from agq.blockwise.ledger.settings import (
    URI_VARIABLE,
    LedgerError,
    LedgerSettings,
    Secrets,
    mask_secrets,
    shown_uri,
)
from agq.blockwise.ledger.updates import begin_update, block_update, worker_update
from agq.errors import InputError
from tests.helpers.ledgers import (
    PASSWORD,
    QUOTED,
    WORKER,
    in_journal,
    in_ledger,
    journal_slowly,
    record,
    settings_for,
    wait_for,
)
from tests.helpers.services import (
    MISSING,
    SERVER,
    MongoServer,
    free_port,
    running,
)


@pytest.fixture
def ledger(mongo_uri):
    ledger = connect(settings_for(mongo_uri, required=True, timeout_s=5))
    ledger.prepare()
    yield ledger
    ledger.runs.database.client.drop_database(ledger.runs.database.name)
    ledger.close()


# Single writes


def test_any_order_and_any_number_of_times(ledger):
    events = [
        begin_update("r", "predict", 1, Order(0, BlockState.OPEN, 1.0, 1, "aa")),
        block_update("r", "predict", record(1, "failed", finished=2.0, token="aa"), WORKER),
        begin_update("r", "predict", 1, Order(0, BlockState.OPEN, 3.0, 2, "bb")),
        block_update("r", "predict", record(1, attempt=2, finished=4.0, token="bb"), WORKER),
        block_update("r", "predict", record(1, attempt=2, finished=5.0, token="cc"), WORKER),
        block_update("r", "predict", record(1, "failed", finished=9.0, token="dd"), WORKER),
    ]
    seen = []
    orders = list(itertools.permutations(range(len(events))))
    for order in random.Random(0).sample(orders, 25):
        ledger.blocks.delete_many({})
        for i in order:
            assert ledger.write("blocks", [events[i], events[order[0]]]) == 0
        seen += list(ledger.find_blocks("r", "predict"))
    assert len(seen) == 25, "one document per block"
    assert all(doc == seen[0] for doc in seen)
    assert (seen[0]["state"], seen[0]["token"], seen[0].get("error")) == ("done", "cc", None)
    # The failed attempts stay, whatever came after them.
    assert sorted(seen[0]["attempts"]) == ["aa-1", "dd-1"]
    assert seen[0]["attempts"]["aa-1"]["worker"] == WORKER.name


#: As release 0.1 wrote them.
EARLIER = [
    {
        "_id": "r/predict/1", "run": "r", "stage": "predict", "block": 1, "attempt": 2,
        "token": "bb", "worker": "w0", "host": "node1", "device": "cuda:0", "job": "77",
        "order": [4, 4.0, 2, "bb"], "attempts": {"aa-1": {"attempt": 1, "reason": "R"}},
        "state": "done", "reason": None, "error": None, "sums": {"fragments": "1"},
        "roi": {"offset": [0, 60, 120], "shape": [30, 6, 6]}, "started": 3.0, "finished": 4.0,
        "read_s": 0.1, "compute_s": 0.2, "write_s": 0.3, "labels": 3, "components": 4, "dropped": 1,
        "voxels": 10,
    },
    {
        "_id": "r/predict/2", "run": "r", "stage": "predict", "block": 2, "attempt": 1,
        "token": "zz", "worker": "w0", "host": "node1", "device": "cuda:0", "job": "77",
        "order": [1, 5.0, 1, "zz"], "attempts": {}, "state": "running", "started": 5.0,
    },
]  # fmt: skip


def test_documents_of_an_earlier_release_are_read_and_replaced(ledger):
    def now() -> list[dict]:
        return list(ledger.find_blocks("r", "predict"))

    ledger.blocks.insert_many(EARLIER)
    stage = LedgerStage(ledger, "r", "predict")
    read = stage.record(1)
    assert (read.worker, read.roi, read.labels) == ("w0", ((0, 60, 120), (30, 6, 6)), 3)
    assert stage.record(2) is None
    assert stage.rows["block"].tolist() == [1]
    begun = Order(0, BlockState.OPEN, 5.0, 1, "zz")
    same = record(1, attempt=2, finished=4.0, token="bb")
    for update in (
        block_update("r", "predict", same, WORKER),
        block_update("r", "predict", replace(same, finished=3.9, attempt=3), WORKER),
        block_update("r", "predict", replace(same, state="failed", finished=9.0)),
        begin_update("r", "predict", 2, begun),
        begin_update("r", "predict", 2, begun._replace(time=4.9, attempt=2)),
    ):
        ledger.write("blocks", [update])
    first, second = now()
    failed = first["attempts"].pop("bb-2")
    assert (failed["finished"], first, second) == (9.0, *EARLIER)
    ledger.write("blocks", [block_update("r", "predict", replace(same, token="bc"), WORKER)])
    ledger.write("blocks", [begin_update("r", "predict", 2, begun._replace(attempt=2))])
    first, second = now()
    assert (first["token"], second["attempt"], second["state"]) == ("bc", 2, "running")
    assert set(first["attempts"]) == {"aa-1", "bb-2"}
    assert "host" not in first


def test_a_block_takes_half_the_room_that_it_took(ledger):
    """Of an id as long as real ones: no copies of what run and worker documents say."""
    run = "0123456789abcdef" * 2
    place = {"started": 1.8e9, "finished": 1.8e9 + 9, "voxels": 17 * 257 * 257}
    about = {"read_s": 0.5, "compute_s": 3.5, "write_s": 1.5, "labels": 300, "components": 400}
    sums = {"fragments": "0" * 16, "sidecar": "1" * 16}
    token = "fedcba9876543210"
    predicted = BlockRecord(10**7, "done", token=token, sums=sums, **place, **about)
    relabelled = BlockRecord(10**7, "done", token=token, sums=sums, **place)
    for stage, done in (("predict", predicted), ("relabel", relabelled)):
        ledger.write("blocks", [block_update(run, stage, done, WORKER)])
    sizes = [len(bson.encode(document)) for document in ledger.blocks.find()]
    # Of these, release 0.1 made 648 and 576 bytes.
    assert sizes[0] <= 648 / 2
    assert sizes[1] <= 576 / 2


def test_state_never_goes_back(ledger):
    states = [state.word for state in BlockState if state]
    for first, second in itertools.product(states, states):
        ledger.blocks.delete_many({})
        ledger.write("blocks", [block_update("r", "s", record(0, first, finished=1.0))])
        ledger.write("blocks", [block_update("r", "s", record(0, second, finished=2.0))])
        begun = Order(0, BlockState.OPEN, 99.0, 9, "zz")
        ledger.write("blocks", [begin_update("r", "s", 0, begun)])
        (doc,) = ledger.find_blocks("r", "s")
        assert doc["state"] == max(first, second, key=BlockState.of)


def test_a_later_revision_replaces_what_was_done(ledger):
    updates = [
        block_update("r", "s", record(0, "done", finished=9.0)),
        block_update("r", "s", record(0, "open", finished=1.0, revision=1)),
        begin_update("r", "s", 0, Order(1, BlockState.OPEN, 2.0, 1, "aa")),
        block_update("r", "s", record(0, "failed", finished=3.0, revision=1)),
    ]
    for state, count in (("done", 1), ("queued", 2), ("running", 3), ("failed", 4)):
        for order in itertools.permutations(updates[:count]):
            ledger.blocks.delete_many({})
            for update in order:
                assert ledger.write("blocks", [update]) == 0
            (doc,) = ledger.find_blocks("r", "s")
            assert doc["state"] == state


def test_text_with_dollars_and_surrogates_is_stored_as_it_is(ledger):
    error = "$state ${x} $$ROOT \udcff \0 é"
    bad = record(1, "failed", error=error, reason="$reason")
    assert ledger.write("blocks", [block_update("r", "s", bad, replace(WORKER, name="$w"))]) == 0
    (doc,) = ledger.find_blocks("r", "s")
    assert doc["error"] == "$state ${x} $$ROOT ? \N{SYMBOL FOR NULL} é"
    (attempt,) = doc["attempts"].values()
    assert (doc["reason"], attempt["worker"]) == ("$reason", "$w")


def test_block_is_unique_per_run_and_stage(ledger):
    ledger.write("blocks", [block_update("r", "s", record(1), WORKER)])
    (doc,) = ledger.find_blocks("r", "s")
    with pytest.raises(DuplicateKeyError):
        ledger.blocks.insert_one(doc | {"_id": "other"})


def test_worker_keeps_the_newest_and_the_furthest(ledger):
    ledger.write("workers", [worker_update("r", "s", "f", {"done": 5}, read=50, delivered=40)])
    ledger.write("workers", [worker_update("r", "s", "f", {"done": 2}, read=20, delivered=20)])
    ledger.write("workers", [worker_update("r", "s", "f", {"done": 7}, read=60, delivered=30)])
    (doc,) = ledger.find_workers("r", "s")
    assert (doc["done"], doc["delivered"]) == (7, 40)
    assert ledger.delivered("r", "s") == {"f": 40}


def test_totals_never_go_back(ledger):
    ledger.set_run("r", {"state": "running"})
    for size, done in [(10, 1), (30, 3), (20, 2), (30, 4)]:
        ledger.set_totals("r", "predict", size, {"done": done})
    assert ledger.find_run("r")["stages"]["predict"]["totals"] == {"done": 4, "bytes": 30}


# The feeder


def stage_totals(ledger, stage):
    return ledger.find_run("r")["stages"][stage].get("totals", {})


def test_feeder_delivers_everything(ledger, tmp_path):
    run = {"host": "h", "config": {"ledger": {"uri": "mongodb://u:secret@h/"}, "a.b": 2**70}}
    folders = {"predict": tmp_path / "predict", "relabel": tmp_path / "relabel"}
    feeder = LedgerFeeder(ledger, "r", folders, run)
    feeder.start()
    with JournalWriter(folders["predict"], WORKER) as writer:
        for block in range(300):
            writer.begin(block)
            writer.finish(record(block, "failed" if block % 50 == 7 else "done"))
        writer.begin(300, 1)
        feeder.update_stage("predict", state="running", blocks_total=400)
        # The run is there before its stages are.
        wait_for(lambda: "predict" in (ledger.find_run("r") or {}).get("stages", {}))
        wait_for(lambda: stage_totals(ledger, "predict").get("done") == 294)
        (worker,) = ledger.workers.find({"run": "r", "stage": "predict", "exit": None})
        assert worker["current"] == [
            {"block": 300, "attempt": 1, "begun": worker["current"][0]["begun"]}
        ]
        assert ledger.blocks.find_one({"block": 300})["state"] == "running"
        for block in range(300, 400):
            writer.finish(record(block, attempt=2))
        writer.finish(record(7, attempt=2))
    feeder.update_stage("predict", state="done")
    report = feeder.stop(60)
    assert report.complete, report
    assert report.delivered == 1 + 300 * 2 + 1 + 101 + 1
    assert in_ledger(ledger, "r") == in_journal(folders["predict"])
    doc = ledger.find_run("r")
    assert doc["config"] == {"ledger": {"uri": "***"}, "a_b": str(2**70)}
    stage = doc["stages"]["predict"]
    assert (stage["state"], stage["blocks_total"]) == ("done", 400)
    totals = stage["totals"]
    assert (totals["done"], totals["failed"], totals["skipped"]) == (395, 5, 0)
    assert totals["voxels"] == 3950
    assert totals["running"] == 0
    (worker,) = ledger.find_workers("r", "predict")
    assert (worker["done"], worker["failed"], worker["exit"]) == (395, 6, "end")
    assert worker["delivered"] == writer.path.stat().st_size


def test_feeder_goes_on_where_the_last_one_stopped(ledger, tmp_path):
    folders = {"predict": tmp_path}
    writer = JournalWriter(tmp_path, WORKER)
    writer.finish_many(record(b) for b in range(20))
    first = LedgerFeeder(ledger, "r", folders)
    first.start()
    assert first.stop(60).delivered == 21
    writer.finish_many(record(b) for b in range(20, 25))
    second = LedgerFeeder(ledger, "r", folders)
    second.start()
    assert second.stop(60).delivered == 5
    assert in_ledger(ledger, "r") == in_journal(tmp_path)
    # A sync delivers all of it again, and heals what somebody deleted.
    before = sorted(ledger.find_blocks("r", "predict"), key=lambda d: d["block"])
    ledger.blocks.delete_many({"block": {"$lt": 10}})
    sync = LedgerFeeder(ledger, "r", folders, full=True)
    sync.start()
    assert sync.stop(60).delivered == 26
    assert sorted(ledger.find_blocks("r", "predict"), key=lambda d: d["block"]) == before


@pytest.mark.parametrize("while_feeding", [True, False])
def test_stage_that_is_started_over(ledger, tmp_path, while_feeding):
    """A stitch with other settings drops the journal of the relabelling and begins again."""
    folder = tmp_path / "relabel"
    feeder = LedgerFeeder(ledger, "r", {"relabel": folder})
    feeder.start()
    with JournalWriter(folder, WORKER) as writer:
        writer.finish_many(record(b) for b in range(20))
    if while_feeding:
        wait_for(lambda: len(in_ledger(ledger, "r", "relabel")) == 20)
        wait_for(lambda: (ledger.find_run("r") or {}).get("stages"))
    else:
        assert feeder.stop(60).complete
        feeder = LedgerFeeder(ledger, "r", {"relabel": folder})
    shutil.rmtree(folder)
    if not while_feeding:
        feeder.start()
    with JournalWriter(folder, WORKER) as writer:
        writer.finish_many(record(b) for b in range(5))
    wait_for(lambda: len(in_ledger(ledger, "r", "relabel")) == 5)
    assert feeder.stop(60).complete
    assert in_ledger(ledger, "r", "relabel") == in_journal(folder)
    assert ledger.find_run("r")["stages"]["relabel"]["totals"]["done"] == 5
    assert len(ledger.find_workers("r", "relabel")) == 1


def test_two_runs_in_one_database(ledger, tmp_path):
    feeders = []
    for run in ("a", "b"):
        with JournalWriter(tmp_path / run, replace(WORKER, name=run)) as writer:
            writer.finish_many(record(b, labels=len(run)) for b in range(50 + (run == "b")))
        feeders.append(LedgerFeeder(ledger, run, {"predict": tmp_path / run}, {"user": run}))
    for feeder in feeders:
        feeder.start()
    assert all(feeder.stop(60).complete for feeder in feeders)
    for run in ("a", "b"):
        assert in_ledger(ledger, run) == in_journal(tmp_path / run)
        assert ledger.find_run(run)["user"] == run
    ledger.remove_run("a")
    assert in_ledger(ledger, "a") == {}
    assert ledger.find_run("a") is None
    assert in_ledger(ledger, "b") == in_journal(tmp_path / "b")


def test_same_job_twice_gives_one_record(ledger, tmp_path):
    for time_ in (1.0, 2.0):
        with JournalWriter(tmp_path, WORKER) as writer:
            writer.finish_many(record(b, finished=time_) for b in range(10))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path})
    feeder.start()
    assert feeder.stop(60).complete
    assert in_ledger(ledger, "r") == in_journal(tmp_path)
    assert ledger.find_run("r")["stages"]["predict"]["totals"]["duplicates"] == 10


def test_refused_documents_are_counted_and_do_not_stop_the_rest(ledger, tmp_path):
    ledger.runs.database.command(
        "collMod", "blocks", validator={"labels": {"$ne": 666}}, validationLevel="strict"
    )
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(record(b, labels=666 if b == 3 else 1) for b in range(10))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path})
    feeder.start()
    report = feeder.stop(60)
    assert (report.refused, report.undelivered, report.complete) == (1, 0, False)
    assert sorted(in_ledger(ledger, "r")) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_record_that_python_cannot_hold_hides_no_other(ledger):
    # The test server refuses such records; MongoDB stores them.
    year_300_000 = bson.datetime_ms.DatetimeMS(2**53)
    data = bson.encode({"at": year_300_000, "note": "aXXa"}).replace(b"aXXa", b"a\xff\xfea")
    found = bson.decode(data, ledger.runs.codec_options)
    assert found == {"at": year_300_000, "note": "a\ufffd\ufffda"}


def test_validators_refuse_what_no_client_should_write(ledger):
    ledger.blocks.drop()
    ledger._prepared = False
    ledger.prepare()
    with pytest.raises(WriteError):
        ledger.blocks.insert_one({"_id": "r/s/1", "run": "r", "state": "dnoe"})
    assert ledger.write("blocks", [block_update("r", "s", record(1), WORKER)]) == 0
    assert [d["state"] for d in ledger.find_blocks("r", "s")] == ["done"]


def test_every_failed_attempt_of_one_batch_is_kept(ledger, tmp_path):
    with JournalWriter(tmp_path, WORKER) as writer:
        for attempt in (1, 2):
            writer.begin(7, attempt)
            writer.finish(record(7, "failed", attempt=attempt, finished=float(attempt)))
        writer.begin(7, 3)
        writer.finish(record(7, attempt=3, finished=3.0))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path})
    feeder.start()
    assert feeder.stop(60).complete
    (doc,) = ledger.find_blocks("r", "predict")
    assert (doc["state"], doc["attempt"]) == ("done", 3)
    assert sorted(a["attempt"] for a in doc["attempts"].values()) == [1, 2]


@pytest.mark.parametrize("state", ["running", "stopped", "failed", "done", None])
def test_old_runs_of_the_same_user_that_rest_are_removed(ledger, state):
    """Whatever runs is left alone, however long nothing was heard of it."""
    odd = {"stages": {"predict": "running"}}, {"stages": {"predict": None}}
    told = {"stages": {"predict": {"state": "done"}, "stitch": {"state": state} if state else {}}}
    for run, user, age, fields in (
        *(("old", "me", 10, told), ("new", "me", 1, told), ("other", "you", 10, told)),
        *((f"odd{i}", "me", 10, fields) for i, fields in enumerate(odd)),
        *(("this", "me", 10, {}), ("nothing", "me", 10, {})),
    ):
        ledger.set_run(run, {"user": user, "updated": time.time() - 86400 * age, **fields})
        ledger.write("blocks", [block_update(run, "predict", record(1), WORKER)])
    kept = {"new", "other", "odd0", "odd1", "this"} | ({"old"} if state == "running" else set())
    assert ledger.remove_old("me", 5, keep="this") == 7 - len(kept)
    assert (
        {r["_id"] for r in ledger.runs.find()} == {b["run"] for b in ledger.blocks.find()} == kept
    )


def feed_slowly(ledger, run, folder):
    """A run whose first blocks are in the database, and whose worker goes on."""
    feeder = LedgerFeeder(ledger, run, {"predict": folder}, {"user": "me", "config": {"a": 1}})
    feeder.update_stage("predict", state="running", blocks_total=40, report={"b": 2})
    feeder.start()
    writer = JournalWriter(folder, WORKER)
    writer.finish_many(record(b) for b in range(20))
    wait_for(lambda: len(in_ledger(ledger, run)) == 20 and ledger.delivered(run, "predict"))
    return feeder, writer


def test_a_run_that_starts_removes_none_that_is_under_way(ledger, tmp_path):
    """As for one that computes for longer than `keep_days` without another command."""
    feeder, writer = feed_slowly(ledger, "slow", tmp_path / "slow")
    long_ago = time.time() - 3600
    ledger.set_run("slow", {"updated": long_ago})
    ledger.set_run("over", {"updated": long_ago, "user": "me", "stages.predict.state": "done"})
    ledger.settings = ledger.settings.model_copy(update={"keep_days": 0.0007})
    other = LedgerFeeder(ledger, "new", {}, {"user": "me"})
    other.start()
    assert other.stop(60).complete
    assert {r["_id"] for r in ledger.runs.find()} == {"slow", "new"}
    writer.finish_many(record(b) for b in range(20, 30))
    wait_for(lambda: len(in_ledger(ledger, "slow")) == 30)
    wait_for(lambda: ledger.find_run("slow")["updated"] > time.time() - 60)
    writer.close()
    assert feeder.stop(60).complete
    assert in_ledger(ledger, "slow") == in_journal(tmp_path / "slow")


@pytest.mark.parametrize("how", ["run", "document", "database"])
def test_a_run_that_vanished_comes_back_whole(ledger, tmp_path, how):
    feeder, writer = feed_slowly(ledger, "r", tmp_path)
    if how == "run":
        ledger.remove_run("r")
    elif how == "document":
        ledger.runs.delete_one({"_id": "r"})
    else:
        ledger.runs.database.client.drop_database(ledger.runs.database.name)
    writer.finish_many(record(b) for b in range(20, 40))
    writer.close()
    wait_for(lambda: len(in_ledger(ledger, "r")) == 40)
    feeder.update_stage("predict", state="done")
    report = feeder.stop(60)
    assert report.complete, report
    assert in_ledger(ledger, "r") == in_journal(tmp_path)
    assert len(ledger.find_workers("r", "predict")) == 1
    run = ledger.find_run("r")
    assert (run["run"], run["user"], run["config"]) == ("r", "me", {"a": 1})
    stage = run["stages"]["predict"]
    assert (stage["state"], stage["blocks_total"], stage["report"]) == ("done", 40, {"b": 2})
    assert stage["totals"]["done"] == 40
    assert "state" in ledger.blocks.index_information()


def test_a_removal_that_was_cut_short_is_healed(ledger, tmp_path):
    """The next command on the run delivers all of it, though the run's document is still there."""
    feeder, writer = feed_slowly(ledger, "r", tmp_path)
    writer.close()
    assert feeder.stop(60).complete

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    runs, ledger.runs = ledger.runs, SimpleNamespace(delete_one=killed)
    with pytest.raises(KeyboardInterrupt):
        ledger.remove_run("r")
    ledger.runs = runs
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path})
    feeder.start()
    assert feeder.stop(60).complete
    assert in_ledger(ledger, "r") == in_journal(tmp_path)


def test_fields_too_large_are_left_out_and_hold_nothing_up(ledger, tmp_path):
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish(record(1))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path}, {"user": "me"})
    feeder.start()
    wait_for(lambda: in_ledger(ledger, "r"))
    feeder.update_stage("predict", report="x" * (17 << 20))
    wait_for(lambda: feeder._refused == 1)
    feeder.update_stage("predict", state="done")
    report = feeder.stop(60)
    assert (report.refused, report.undelivered, report.error) == (1, 0, None)
    assert ledger.find_run("r")["stages"]["predict"]["state"] == "done"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_outage_in_the_middle(mongo_server, tmp_path, how, caplog, open_ledger):
    ledger = open_ledger(settings_for(mongo_server.uri, required=True))
    folder = tmp_path / "predict"
    feeder = LedgerFeeder(ledger, "r", {"predict": folder}, {"user": "me"})
    feeder.start()
    thread, times = journal_slowly(folder, 400, 0.01)
    wait_for(lambda: ledger.blocks.find_one({"state": "done"}) is not None)
    with caplog.at_level(logging.WARNING):
        if how == "SIGSTOP":
            mongo_server.send(signal.SIGSTOP)
            time.sleep(5)
            mongo_server.send(signal.SIGCONT)
        else:
            mongo_server.stop(signal.Signals[how])
            time.sleep(2)
            assert thread.is_alive(), "blocks go on without the database"
            mongo_server.start()
    thread.join()
    report = feeder.stop(60)
    assert report.complete, report
    assert caplog.text.count("trying again later") <= 3, "one line per outage, not one per try"
    assert in_ledger(ledger, "r") == in_journal(folder)
    assert len(in_ledger(ledger, "r")) == 400
    assert ledger.find_run("r")["user"] == "me"
    assert sorted(times)[200] < 0.5, "blocks do not wait for the database"


def test_database_that_stays_away(tmp_path, caplog, open_ledger):
    """Not required: a warning, blocks go on, stop is bounded and tells what is undelivered."""
    uri = f"mongodb://me:{QUOTED}@127.0.0.1:{free_port()}/?authSource=admin"
    with caplog.at_level(logging.DEBUG):
        ledger = open_ledger(settings_for(uri))
        feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path})
        feeder.start()
        with JournalWriter(tmp_path, WORKER) as writer:
            writer.finish_many(record(b) for b in range(30))
        start = time.monotonic()
        report = feeder.stop(timeout=2)
        assert time.monotonic() - start < 20
    assert report.undelivered == 32
    assert not report.complete
    assert "refused" in report.error
    assert "the run goes on" in caplog.text
    for secret in (PASSWORD, QUOTED):
        assert secret not in caplog.text + report.error


def test_late_database_gets_everything(tmp_path, mongo_server, open_ledger):
    mongo_server.stop()
    ledger = open_ledger(settings_for(mongo_server.uri))
    feeder = LedgerFeeder(ledger, "r", {"predict": tmp_path}, {"user": "me"})
    feeder.start()
    with JournalWriter(tmp_path, WORKER) as writer:
        writer.finish_many(record(b) for b in range(30))
    feeder.update_stage("predict", state="done")
    mongo_server.start()
    assert feeder.stop(60).complete
    assert in_ledger(ledger, "r") == in_journal(tmp_path)
    assert ledger.find_run("r")["stages"]["predict"]["state"] == "done"


# Reaching it, and the password


def test_unreachable_and_required_is_one_line():
    port = free_port()
    uri = f"mongodb://me:{QUOTED}@127.0.0.1:{port}/?authSource=admin"
    with pytest.raises(LedgerError) as caught:
        connect(settings_for(uri, required=True))
    text = str(caught.value)
    assert isinstance(caught.value, InputError)
    assert text.startswith(f"database mongodb://me:***@127.0.0.1:{port}: ")
    assert "Connection refused" in text
    assert "\n" not in text
    trace = "".join(traceback.format_exception(caught.value))
    assert QUOTED not in trace
    assert PASSWORD not in trace


def test_wrong_password(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    if not SERVER.exists():
        pytest.skip(MISSING)
    server = MongoServer(tmp_path / "mongo")
    with running(server):
        server.add_user("me", PASSWORD)
    server.auth = True
    with running(server):
        good = f"mongodb://me:{QUOTED}@127.0.0.1:{server.port}/?authSource=admin"
        ledger = connect(settings_for(good, required=True, timeout_s=5))
        ledger.prepare()
        ledger.close()
        for wrong in (good.replace("w0rd", "WRONG1"), good.replace(f"me:{QUOTED}@", "")):
            with pytest.raises(LedgerError, match=r"refused|may not do this") as caught:
                connect(settings_for(wrong, required=True, timeout_s=5))
            trace = "".join(traceback.format_exception(caught.value))
            assert "WRONG1" not in trace
            assert "\n" not in str(caught.value)
    for secret in (PASSWORD, QUOTED, "WRONG1"):
        assert secret not in caplog.text


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("mongodb://u:pw@h:1/db?x=1", "mongodb://u:***@h:1"),
        ("mongodb://h:1,h2:2/db", "mongodb://h:1,h2:2"),
        ("mongodb://u@h/", "mongodb://u@h"),
        ("mongodb://u:p@ss@h/", "mongodb://u:***@h"),
        ("mongodb://u:p/ss@h/", "mongodb://u:***@h"),
        ("mongodb+srv://u:pw@cluster.example.org", "mongodb+srv://u:***@cluster.example.org"),
        ("postgres://u:pw@h", "***"),
    ],
)
def test_shown_uri(uri, shown):
    assert shown_uri(uri) == shown


def test_hide_every_form_of_the_password():
    secrets = Secrets(
        f"mongodb://me:{QUOTED}@h:1/?tlsCertificateKeyFilePassword=key%20pw&replicaSet=rs"
    )
    text = f"1 {PASSWORD} 2 {QUOTED} 3 key pw 4 key%20pw 5\n6 p%40ss%2Fw0rd+%25%24x rs"
    assert secrets.hide(text) == "1 *** 2 *** 3 *** 4 *** 5 6 *** rs"


@pytest.mark.parametrize("uri", ["mongodb://u:p@ss:w@h/", "mongodb://u:s3cr3t@h:port/",
                                 "mongodb://u:s3cr3t@h/?tls=maybe"])  # fmt: skip
def test_malformed_uri_hides_the_password(uri):
    with pytest.raises(LedgerError) as caught:
        connect(settings_for(uri, required=True))
    trace = "".join(traceback.format_exception(caught.value))
    assert "s3cr3t" not in trace
    assert "ss:w" not in trace


def test_where_the_uri_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    assert connect(LedgerSettings()) is None
    with pytest.raises(LedgerError, match="no database is named"):
        connect(LedgerSettings(required=True))
    monkeypatch.setenv(URI_VARIABLE, "mongodb://env/")
    assert LedgerSettings().resolve().get_secret_value() == "mongodb://env/"
    path = tmp_path / "uri"
    path.write_text("mongodb://file/\n")
    assert LedgerSettings(uri_file=path).resolve().get_secret_value() == "mongodb://file/"
    both = LedgerSettings(uri=SecretStr("mongodb://here/"), uri_file=path)
    assert both.resolve().get_secret_value() == "mongodb://here/"
    with pytest.raises(LedgerError, match="No such file"):
        LedgerSettings(uri_file=tmp_path / "none").resolve()
    path.write_text("hunter2 is the password")
    with pytest.raises(LedgerError, match="not a MongoDB URI") as caught:
        LedgerSettings(uri_file=path).resolve()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "file", "warned"),
    [
        (0o755, 0o644, "may be read by all users"),
        (0o755, 0o640, "may be read by its group"),
        (0o755, 0o600, ""),
        # A closed folder keeps everybody out, whatever its files allow.
        (0o700, 0o644, ""),
    ],
)
def test_a_uri_file_that_others_can_read_is_named(caplog, folder, file, warned):
    with tempfile.TemporaryDirectory() as made:  # pytest keeps the folders above tmp_path closed
        path = Path(made, "uri")
        path.write_text("mongodb://u:s3cr3t@h/")
        path.chmod(file)
        path.parent.chmod(folder)
        for _ in range(2):
            assert LedgerSettings(uri_file=path).resolve() is not None
    assert caplog.text.count(f"chmod 600 {path}") == bool(warned)
    assert warned in caplog.text
    assert "s3cr3t" not in caplog.text


def test_settings_never_show_the_uri():
    settings = LedgerSettings(uri=SecretStr("mongodb://u:hunter2@h/"))
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()
    with pytest.raises(ValidationError) as caught:
        LedgerSettings(uri="mongodb://u:hunter2@h/", databse="x")
    assert "hunter2" not in str(caught.value)


def test_mask_secrets():
    masked = mask_secrets(
        {
            "ledger": {"uri": "mongodb://u:pw@h", "password": "pw", "database": "agq"},
            "storage": {"aws_secret_access_key": "pw", "api_key": None},
            "command": ["agq", "run", "--uri", "mongodb://u:pw@h/x", "s3://bucket/raw.zarr"],
            "tokens": 5,
            "$x.y": (1, 2.5, True, None),
        }
    )
    assert masked == {
        "ledger": {"uri": "***", "password": "***", "database": "agq"},
        "storage": {"aws_secret_access_key": "***", "api_key": None},
        "command": ["agq", "run", "--uri", "mongodb://u:***@h/x", "s3://bucket/raw.zarr"],
        "tokens": 5,
        "_x_y": [1, 2.5, True, None],
    }
