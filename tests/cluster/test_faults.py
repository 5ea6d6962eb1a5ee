"""What clusters do to jobs. Each ends with all blocks done and the bytes of an undisturbed run."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest

from blockwise.journal import Journal
from tests.cluster.runs import N_BLOCKS, ClusterRun, chunks, note, wait_for
from tests.fakes import HANG
from tests.runs import agq, blobs, make_config
from tests.services import MISSING, SERVER, MongoServer, running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = agq("predict", make_config(folder))
    assert done.returncode == 0, done.stderr
    return chunks(folder / "run")


def check(run: ClusterRun, undisturbed: dict[str, bytes], seconds: float = 400.0) -> None:
    run.wait_until_done(seconds)
    assert chunks(run.run_dir) == undisturbed


def progress_after(run: ClusterRun, start: float) -> float:
    """Wait for blocks that were not done at `start`; they show that the run has recovered."""
    before = run.done()
    wait_for(lambda: run.done() > before or run.done() == N_BLOCKS)
    return start


def test_worker_killed(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path)
    run.submit()
    run.wait_until_begun()
    since = time.monotonic()
    victim = run.processes("blockwise.worker")[0]
    victim.kill()

    def replaced() -> bool:
        workers = Journal(run.run_dir / "journal" / "predict").workers.values()
        return sum(worker.done > 0 for worker in workers) > 3 or run.done() == N_BLOCKS

    wait_for(replaced)
    note("worker: kill -9", "the job starts another worker; its blocks are handed out again", since)
    check(run, undisturbed)


def test_node_killed(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=2.0)
    run.submit()
    run.wait_until_begun()
    coordinator, nodes = run.node_of("coordinator"), {line.split()[-1] for line in run.queue()}
    victim = next(n for n in sorted(nodes, reverse=True) if n != coordinator and "gpu" in n)
    since = time.monotonic()
    quiet.kill_node(victim)
    job = run.jobs("workers")[0]
    down = f"scontrol show node {victim}".split()
    wait_for(lambda: "DOWN" in quiet.command(*down) and "*+DRAIN" not in quiet.command(*down))
    wait_for(
        lambda: (
            sum(str(job) in line and "RUNNING" in line for line in run.queue()) == 3
            or not run.queue()
        )
    )
    note("slurmd and jobs of a node: kill -9", "node DOWN, SLURM requeues the job elsewhere", since)
    check(run, undisturbed)


def test_preempted(quiet, tmp_path, undisturbed):
    elsewhere = {"partition": "gpu", "cpus": 1, "mem": "900M"}
    slurm = {"partition": "scavenge", "workers": 8, "mem": "600M", "coordinator": elsewhere}
    run = ClusterRun(tmp_path, delay_s=8.0, slurm=slurm)
    run.submit()
    run.wait_until_begun(3)
    since = time.monotonic()
    quiet.command(
        "sbatch",
        "--partition=gpu",
        "--gres=gpu:2",
        "--nodes=2",
        "--time=1",
        "--output=/dev/null",
        "--chdir=/tmp",
        "--wrap=sleep 15",
    )
    wait_for(lambda: sum("RUNNING" in line for line in run.queue()) < 9)
    wait_for(lambda: (run.done() >= 60) or sum("RUNNING" in line for line in run.queue()) >= 9, 120)
    note("pre-empted by another partition", "SIGTERM, block abandoned, SLURM requeues", since)
    check(run, undisturbed)
    logs = [f.read_text() for f in (run.run_dir / "logs" / "slurm").glob("workers-*.log")]
    assert sum("DUE TO PREEMPTION" in text for text in logs) >= 4
    assert any(text.count(" INFO job ") > 1 for text in logs), "nobody was requeued"


def test_time_limit(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=4.0, slurm={"workers": 2, "time": "1", "lead_s": 20})
    since = time.monotonic()
    run.submit()
    check(run, undisturbed, 600)
    logs = [f.read_text() for f in (run.run_dir / "logs" / "slurm").glob("workers-*.log")]
    assert any("status 75" in text for text in logs), "no time limit was reached"
    note("time limit of 1 minute", "SIGUSR1, block finished, job requeued (whole run)", since)


def test_coordinator_requeued(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=1.0)
    run.submit()
    run.wait_until_begun()
    since = time.monotonic()
    workers = {p.pid for p in run.processes("blockwise.worker")}
    quiet.command("scontrol", "requeue", str(run.jobs("coordinator")[0]))
    time.sleep(3)
    progress_after(run, since)
    assert {p.pid for p in run.processes("blockwise.worker")} == workers, "workers should wait"
    note("coordinator job requeued", "workers keep their network loaded and wait for it", since)
    check(run, undisturbed)


def test_coordinator_killed(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=1.0)
    run.submit()
    run.wait_until_begun()
    since = time.monotonic()
    for process in run.processes("pipeline.slurm.coordinator"):
        if "bash" not in process.name():
            process.kill()
    time.sleep(3)
    progress_after(run, since)
    note("coordinator: kill -9", "its job requeues itself; workers wait", since)
    check(run, undisturbed)


def test_half_the_array_cancelled(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, slurm={"workers": 4, "cpus": 1, "mem": "600M"})
    run.submit()
    run.wait_until_begun()
    since = time.monotonic()
    job = run.jobs("workers")[0]
    quiet.command("scancel", f"{job}_0", f"{job}_2")
    progress_after(run, since)
    note("scancel of half the array", "the others take over its blocks", since)
    check(run, undisturbed)
    assert len(run.jobs("workers")) == 1, "the user wanted fewer workers"


def test_a_node_on_which_every_block_fails(quiet, tmp_path, undisturbed):
    since = time.monotonic()
    run = ClusterRun(tmp_path, options={"broken_on": "gpu2"}, slurm={"workers": 4, "mem": "600M"})
    run.submit()
    check(run, undisturbed)
    ends = list((run.run_dir / "slurm" / "ends").glob("*.json"))
    assert ends, "no worker was drained"
    assert all('"gpu2"' in end.read_text() for end in ends)
    note("every block fails on one node", "its workers test themselves and leave", since)


def test_a_worker_that_hangs(quiet, tmp_path):
    data = np.minimum(blobs((20, 50, 70)), 240).astype(np.uint8)
    data[10, 25, 35] = HANG
    (tmp_path / "calm").mkdir()
    calm = make_config(tmp_path / "calm", data)
    assert agq("predict", calm).returncode == 0
    (tmp_path / "state").mkdir()
    run = ClusterRun(
        tmp_path / "disturbed",
        data=data,
        options={"marks": True, "times": 1, "state": str(tmp_path / "state")},
        workers={"count": 1, "timeout_s": 10},
    )
    since = time.monotonic()
    run.submit()
    wait_for(lambda: (tmp_path / "state" / f"mark-{HANG}").exists())
    since = time.monotonic()
    log = run.run_dir / "logs" / "slurm"
    wait_for(lambda: any("exit status 87" in f.read_text() for f in log.glob("workers-*.log")))
    note("a worker hangs", "block timeout (10 s): the process ends, the job starts another", since)
    check(run, chunks(tmp_path / "calm" / "run"))


@pytest.mark.skipif(not SERVER.exists(), reason=MISSING)
def test_database_away_for_a_minute(quiet, tmp_path, undisturbed):
    with running(MongoServer(tmp_path / "mongo")) as server:
        ledger = {"uri": server.uri, "timeout_s": 1}
        run = ClusterRun(tmp_path, delay_s=4.0, ledger=ledger)
        run.submit()
        run.wait_until_begun()
        before = run.done()
        since = time.monotonic()
        server.stop(signal.SIGKILL)
        time.sleep(60)
        assert run.done() > before, "blocks wait for the database"
        server.start()

        def delivered() -> bool:
            with server.client() as client:
                found = client.agq.blocks.count_documents({"state": "done"})
            return found >= run.done()

        wait_for(delivered, 120)
        note("database: kill -9, back after 60 s", "blocks go on, the journal is delivered", since)
        check(run, undisturbed)
        with server.client() as client:
            states = [d["state"] for d in client.agq.blocks.find()]
        assert states == ["done"] * 60


def test_run_folder_read_only_for_a_while(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=1.0)
    run.submit()
    run.wait_until_begun()
    where, aside = str(run.run_dir), tmp_path / "aside"
    aside.mkdir()
    # Read-only before it covers the folder: a mount that somebody writes to cannot be made so.
    subprocess.run(["mount", "--bind", where, aside], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", aside], check=True)
    subprocess.run(["mount", "--bind", aside, where], check=True)
    subprocess.run(["umount", aside], check=True)
    try:
        log = run.run_dir / "logs" / "slurm"
        wait_for(
            lambda: sum("cannot be written" in f.read_text() for f in log.glob("workers-*")) == 3
        )
        time.sleep(10)
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)
    since = time.monotonic()
    progress_after(run, since)
    note("run folder read-only for a while", "workers wait until it can be written", since)
    check(run, undisturbed)


def test_slurmctld_away(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=1.0)
    run.submit()
    run.wait_until_begun()
    pid = int((quiet.lab / "run" / "slurmctld.pid").read_text())
    since = time.monotonic()
    # A state-saving call first: killed right after a start, slurmctld forgets that start.
    for job in run.jobs("workers") + run.jobs("coordinator"):
        quiet.command("scontrol", "update", f"jobid={job}", "comment=x")
    time.sleep(7)
    os.kill(pid, signal.SIGKILL)
    progress_after(run, since)
    quiet.up()
    note("slurmctld: kill -9, restarted", "blocks go on meanwhile", since)
    check(run, undisturbed)


def test_split_brain(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=4.0, slurm={"workers": 2})
    run.submit()
    run.wait_until_begun(2)
    node = run.node_of("coordinator")
    since = time.monotonic()
    quiet.kill_node(node, "zombie")
    job = run.jobs("coordinator")[0]
    log = run.run_dir / "logs" / "slurm" / f"coordinator-{job}.log"
    wait_for(lambda: "another agq process works on" in log.read_text() or run.done() == N_BLOCKS)
    note("slurmd of the coordinator's node: kill -9", "the second waits for the first", since)
    check(run, undisturbed)
    assert "another agq process works on" in log.read_text(), "there was no second coordinator"
