"""The database of a submitted run: away for a while, and its password seen by nobody."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from pymongo import MongoClient

from tests.cluster.runs import N_BLOCKS, ClusterRun, chunks, wait_for
from tests.helpers.services import MISSING, SERVER, MongoServer, running

PASSWORD = "s3cr3t p@ss/w0rd:%"
# Every form of it holds this.
MARK = "s3cr3t"

pytestmark = pytest.mark.skipif(not SERVER.exists(), reason=MISSING)


@pytest.fixture
def server(tmp_path):
    """A database that asks for a password."""
    server = MongoServer(tmp_path / "mongo")
    with running(server):
        server.add_user("me", PASSWORD)
    server.auth = True
    with running(server):
        yield server


def in_ledger(uri: str) -> dict[int, tuple]:
    """What the database says of the blocks that have ended."""
    with MongoClient(uri) as client:
        workers = {w["token"]: w for w in client.agq.workers.find({"stage": "predict"})}
        return {
            d["block"]: (
                d["state"], d["attempt"], d["token"], d["started"], d["finished"],
                d.get("labels", 0), d.get("dropped", 0), d["voxels"], d.get("error"),
                workers[d["token"]]["name"], workers[d["token"]]["host"],
            )
            for d in client.agq.blocks.find({"stage": "predict", "state": {"$ne": "running"}})
        }  # fmt: skip


def in_journal(run: ClusterRun) -> dict[int, tuple]:
    journal = run.journal()
    return {
        r.block: (
            r.state, r.attempt, r.token, r.started, r.finished,
            r.labels, r.dropped, r.voxels, r.error,
            r.worker, journal.workers[r.token].info.host,
        )
        for r in journal.records()
    }  # fmt: skip


def seen_by_others(lab: Path) -> list[str]:
    """Where the password shows now: arguments of processes, what SLURM tells, its own files."""
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in " ".join(process.cmdline()):
                found.append(f"process {process.cmdline()}")
        except psutil.Error:
            continue
    for command in ("scontrol show job -d -o", "squeue -O ALL"):
        shown = subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout
        if MARK in shown:
            found.append(command)
    for folder in ("state", "spool", "log"):
        for file in (lab / folder).rglob("*"):
            try:
                if file.is_file() and MARK.encode() in file.read_bytes():
                    found.append(str(file))
            except OSError:  # SLURM removes its files at any time
                continue
    return found


def test_database_away_for_a_while_and_its_password_nowhere(
    quiet, tmp_path, undisturbed, server, monkeypatch, note
):
    uri = server.uri_of("me", PASSWORD)
    monkeypatch.setenv("AGQ_MONGO_URI", uri)
    run = ClusterRun(tmp_path, delay_s=2.0, ledger={"timeout_s": 1})
    run.submit()
    run.wait_until_begun(workers=3)
    assert seen_by_others(quiet.lab) == []
    before = run.done()
    since = time.monotonic()
    server.stop(signal.SIGKILL)
    time.sleep(20)
    assert run.done() > before, "blocks wait for the database"
    server.start()

    def delivered() -> bool:
        done = {block for block, record in in_journal(run).items() if record[0] == "done"}
        return len(done) > before and done <= in_ledger(uri).keys()

    wait_for(delivered, why=run.post_mortem)
    note("database: kill -9, back after 20 s", "blocks go on, the journal is delivered", since)
    assert seen_by_others(quiet.lab) == []
    run.wait_until_done()
    assert chunks(run.run_dir) == undisturbed
    wait_for(lambda: in_ledger(uri) == in_journal(run), 60)
    assert len(in_ledger(uri)) == N_BLOCKS
    # Asked as from another machine: by the ledger, without the folder.
    run.run_dir.rename(tmp_path / "elsewhere")
    said = run.agq("status", run.run_dir)
    assert f"{N_BLOCKS}/{N_BLOCKS}" in said
    assert MARK not in said
    holders = [
        file
        for file in (tmp_path / "elsewhere").rglob("*")
        if file.is_file() and MARK.encode() in file.read_bytes()
    ]
    assert holders == [tmp_path / "elsewhere" / "slurm" / "ledger-uri"]
    assert holders[0].stat().st_mode & 0o077 == 0
