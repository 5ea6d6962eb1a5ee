"""What clusters do to jobs. Each ends with all blocks done and the bytes of an undisturbed run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from agq.blockwise.predict.spec import Session
from tests.cluster.runs import N_BLOCKS, ClusterRun, chunks, wait_for
from tests.helpers.fakes import HANG
from tests.helpers.runs import agq, blobs, make_config, results


def check(run: ClusterRun, undisturbed: dict[str, bytes], seconds: float = 600.0) -> None:
    run.wait_until_done(seconds)
    assert chunks(run.run_dir) == undisturbed


def wait_for_progress(run: ClusterRun) -> None:
    """Wait for blocks that are not done now; they show that the run has recovered."""
    before = run.done()
    wait_for(lambda: run.done() > before or run.done() == N_BLOCKS, why=run.post_mortem)


def test_worker_killed(quiet, tmp_path, undisturbed, note):
    run = ClusterRun(tmp_path, delay_s=1.0)
    run.submit()
    run.wait_until_begun(workers=3)
    since = time.monotonic()
    victim = run.processes("agq.blockwise.predict.worker")[0]
    victim.kill()

    def replaced() -> bool:
        workers = run.journal().workers.values()
        return sum(worker.done > 0 for worker in workers) > 3 or run.done() == N_BLOCKS

    wait_for(replaced)
    note("worker: kill -9", "the job starts another worker; its blocks are handed out again", since)
    check(run, undisturbed)


def test_node_killed(quiet, tmp_path, undisturbed, note):
    run = ClusterRun(tmp_path, delay_s=2.0)
    run.submit()
    run.wait_until_begun(workers=3)
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


def test_preempted(quiet, tmp_path, undisturbed, note):
    slurm = {"partition": "scavenge", "workers": 8, "mem": "600M"}
    run = ClusterRun(tmp_path, delay_s=6.0, slurm=slurm)
    run.submit()
    # All eight, so that the whole cluster is in use.
    run.wait_until_begun(3, workers=8)
    since = time.monotonic()
    quiet.command(
        "sbatch",
        "--partition=gpu",
        "--gres=gpu:2",
        "--nodes=2",
        "--exclusive",
        f"--nodelist={run.node_of('coordinator')}",
        "--time=1",
        "--output=/dev/null",
        "--chdir=/tmp",
        "--wrap=sleep 15",
    )
    running = lambda: sum("RUNNING" in line for line in run.queue())  # noqa: E731
    wait_for(lambda: running() < 9)
    wait_for(lambda: run.done() == N_BLOCKS or running() >= 9, why=run.post_mortem)
    note("pre-empted by another partition", "SIGTERM, blocks abandoned, SLURM requeues", since)
    check(run, undisturbed)
    log = run.run_dir / "logs" / "slurm" / f"coordinator-{run.jobs('coordinator')[0]}.log"
    assert "its batch job was pre-empted (SIGTERM)" in log.read_text()
    logs = [f.read_text() for f in (run.run_dir / "logs" / "slurm").glob("workers-*.log")]
    assert sum("DUE TO PREEMPTION" in text for text in logs) >= 4
    assert any(text.count(" INFO job ") > 1 for text in logs), "nobody was requeued"


def test_time_limit(quiet, tmp_path, undisturbed, note):
    # More work than fits into the time until the notice, after 35 s.
    run = ClusterRun(tmp_path, delay_s=2.0, slurm={"workers": 2, "time": "1", "lead_s": 25})
    since = time.monotonic()
    run.submit()
    check(run, undisturbed, 600)
    logs = [f.read_text() for f in (run.run_dir / "logs" / "slurm").glob("workers-*.log")]
    assert any("status 75" in text for text in logs), "no time limit was reached"
    note("time limit of 1 minute", "SIGUSR1, block finished, job requeued (whole run)", since)


def coordinators(run: ClusterRun) -> list[psutil.Process]:
    found = run.processes("agq.pipeline.slurm.coordinator")
    return [process for process in found if "bash" not in process.name()]


def session_id(run: ClusterRun) -> str:
    session = Session.load(run.run_dir)
    return "" if session is None or session.state != "open" else session.id


def wait_for_the_next_coordinator(run: ClusterRun, last: str) -> None:
    """Wait until it hands out blocks, and for blocks that are done after that."""
    wait_for(lambda: session_id(run) not in ("", last), why=run.post_mortem)
    wait_for_progress(run)


def test_coordinator_requeued_again_and_again_then_killed(quiet, tmp_path, undisturbed, note):
    """Requeues do not count: a job that has had five of them comes again when it dies."""
    run = ClusterRun(tmp_path, delay_s=2.0)
    run.submit()
    run.wait_until_begun(workers=3)
    since = time.monotonic()
    workers = {p.pid for p in run.processes("agq.blockwise.predict.worker")}
    job, last = str(run.jobs("coordinator")[0]), session_id(run)
    quiet.command("scontrol", "requeue", job)
    wait_for_the_next_coordinator(run, last)
    assert {p.pid for p in run.processes("agq.blockwise.predict.worker")} == workers, (
        "workers should wait"
    )
    note("coordinator job requeued", "workers keep their network loaded and wait for it", since)
    shown = ["scontrol", "--oneliner", "show", "job", job]
    for restarts in range(2, 6):
        quiet.command("scontrol", "requeue", job)
        again = f"JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts={restarts} "
        wait_for(lambda words=again: words in quiet.command(*shown), why=run.post_mortem)
    wait_for(lambda: coordinators(run), why=run.post_mortem)
    since = time.monotonic()
    last = session_id(run)
    for process in (killed := coordinators(run)):
        process.kill()
    assert killed
    wait_for_the_next_coordinator(run, last)
    note("coordinator: kill -9 after five requeues", "its job requeues itself; workers wait", since)
    check(run, undisturbed)


def test_half_the_array_cancelled(quiet, tmp_path, undisturbed, note):
    run = ClusterRun(tmp_path, delay_s=1.0, slurm={"workers": 4, "cpus": 1, "mem": "600M"})
    run.submit()
    run.wait_until_begun(workers=4)
    since = time.monotonic()
    job = run.jobs("workers")[0]
    quiet.command("scancel", f"{job}_0", f"{job}_2")
    wait_for_progress(run)
    note("scancel of half the array", "the others take over its blocks", since)
    check(run, undisturbed)
    assert len(run.jobs("workers")) == 1, "the user wanted fewer workers"


def test_a_node_on_which_every_block_fails(quiet, tmp_path, undisturbed, note):
    since = time.monotonic()
    # Slow enough for the workers of the broken node to find out that it is broken.
    slurm = {"workers": 4, "mem": "600M"}
    run = ClusterRun(tmp_path, delay_s=1.5, options={"broken_on": "gpu2"}, slurm=slurm)
    run.submit()
    check(run, undisturbed)
    ends = list((run.run_dir / "slurm" / "ends").glob("*.json"))
    assert ends, "no worker was drained"
    assert all('"gpu2"' in end.read_text() for end in ends)
    note("every block fails on one node", "its workers test themselves and leave", since)


def test_a_worker_that_hangs(quiet, tmp_path, note):
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


def test_a_frozen_worker(quiet, tmp_path, undisturbed, note):
    run = ClusterRun(tmp_path, workers={"count": 1, "timeout_s": 10})
    run.submit()
    run.wait_until_begun(workers=3)
    run.processes("agq.blockwise.predict.worker")[0].suspend()
    wait_for(lambda: run.stage().get("state") == "done", why=run.post_mortem)
    since = time.monotonic()
    check(run, undisturbed, 120)
    note("a worker: kill -STOP", "another takes its block; its job ends it after the run", since)


def of_workers(command: str) -> list[str]:
    """A prologue that only worker jobs run."""
    return [f'case "$SLURM_JOB_NAME" in agq-workers*) {command};; esac']


def test_a_node_on_which_no_worker_starts(quiet, tmp_path, undisturbed, note):
    """SLURM gives the next job the same node, which is idle: it is excluded in the end."""
    prologue = of_workers('[ "$SLURMD_NODENAME" != gpu2 ] || exit 3')
    run = ClusterRun(tmp_path, delay_s=3.0, slurm={"prologue": prologue})
    run.submit()
    run.wait_until_begun(workers=2)
    since = time.monotonic()
    status = json.loads(run.agq("status", run.run_dir, "--json"))
    workers = {q["state"]: q["count"] for q in status["queue"] if q["role"] == "workers"}
    assert workers == {"RUNNING": 2, "MISSING": 1}
    wait_for(lambda: len(run.jobs("workers")) == 2, why=run.post_mortem)
    note("a worker job ends at its start", "the coordinator submits another", since)
    wait_for(lambda: len(run.journal().workers) == 3, why=run.post_mortem)
    assert "no workers on gpu2" in run.agq("status", run.run_dir)
    note("no worker starts on one node", "the second one lost there, it is excluded", since)
    check(run, undisturbed)
    assert len(run.jobs("workers")) == 3


def test_worker_jobs_without_an_environment(quiet, tmp_path, note):
    prologue = of_workers("/envs/gone/bin/python -V; exit")
    run = ClusterRun(tmp_path, slurm={"prologue": prologue})
    run.submit()
    since = time.monotonic()
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    stage = run.stage()
    assert stage["state"] == "stopped", run.post_mortem()
    for words in (
        "no worker job is left, and 60 blocks remain",
        "FAILED",
        "/envs/gone/bin/python: No such file or directory",
        "slurm.python",
    ):
        assert words in stage["error"]
    note("no worker job finds its Python", "submitted again, then the run stops and says so", since)


@contextlib.contextmanager
def read_only(folder: Path, aside: Path) -> Iterator[None]:
    """Make a folder read-only, for root too, while processes write to it."""
    aside.mkdir()
    # Read-only before it covers the folder: a mount that somebody writes to cannot be made so.
    subprocess.run(["mount", "--bind", folder, aside], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", aside], check=True)
    subprocess.run(["mount", "--bind", aside, folder], check=True)
    subprocess.run(["umount", aside], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Fill the disk of a folder."""
    filler = folder / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A run folder on a disk of 6 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mounts")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "agq-test", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_run_folder_full_then_read_only_for_a_while(quiet, tmp_path, small_disk, undisturbed, note):
    run = ClusterRun(tmp_path, delay_s=1.5)
    run.submit()
    run.wait_until_begun(5, workers=3)
    with full(small_disk):
        time.sleep(25)
        before = run.done()
    since = time.monotonic()
    wait_for(lambda: run.done() > before, why=run.post_mortem)
    note("run folder full for 25 s", "coordinator and workers wait until there is room", since)
    wait_for(lambda: session_id(run) and run.done() > before + 4, why=run.post_mortem)
    logs = sorted((run.run_dir / "logs" / "slurm").glob("workers-*.log"))
    count = lambda: [f.read_text().count("cannot write the run folder: waiting") for f in logs]  # noqa: E731
    at_first = count()
    with read_only(run.run_dir, tmp_path / "aside"):
        wait_for(lambda: all(map(int.__lt__, at_first, count())), why=run.post_mortem)
        time.sleep(5)
    since = time.monotonic()
    wait_for_progress(run)
    note("run folder read-only for a while", "workers wait until it can be written", since)
    run.wait_until_done()
    # A file that a worker had just begun could not be deleted either.
    kept = {name: data for name, data in chunks(run.run_dir).items() if not name.endswith(".tmp")}
    assert kept == undisturbed


def test_slurmctld_away(quiet, tmp_path, undisturbed, note):
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
    wait_for_progress(run)
    quiet.up()
    note("slurmctld: kill -9, restarted", "blocks go on meanwhile", since)
    check(run, undisturbed)


def test_split_brain(quiet, tmp_path, undisturbed, note):
    run = ClusterRun(tmp_path, delay_s=3.0, slurm={"workers": 2})
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


def test_a_stitch_that_never_begins(quiet, tmp_path, segmented, note):
    """The run says so, and why, from the moment on; each time `agq resume` goes on."""
    said = tmp_path / "said"
    tell = "import os, sys; print(os.environ['AGQ_NOTIFY_EVENT'], file=open(sys.argv[1], 'a'))"
    notify = {"command": [sys.executable, "-c", tell, str(said)], "timeout_s": 60}
    run = ClusterRun(tmp_path, delay_s=0.8, notify=notify)

    def stopped(part: str) -> bool:
        status = json.loads(run.agq("status", run.run_dir, "--json"))
        states = {stage["name"]: stage["state"] for stage in status["stages"]}
        error = next(s["error"] for s in status["stages"] if s["name"] == "stitch")
        return (status["state"], states["stitch"]) == ("stopped", "stopped") and part in error

    run.agq("submit", run.config)
    run.wait_until_begun()
    assert "waiting" in run.agq("status", run.run_dir)
    since = time.monotonic()
    quiet.command("scancel", str(run.jobs("coordinator")[0]))
    wait_for(lambda: stopped("are missing"))
    note("coordinator: scancel", "its stitch began and said which blocks are missing", since)
    # Nobody comes for the workers any more.
    quiet.command("scancel", str(run.jobs("workers")[0]))
    wait_for(lambda: not run.queue())
    assert said.read_text() == "failure\n"
    run.agq("attach", run.run_dir, "--interval", "1", code=1)

    run.agq("resume", run.run_dir)
    since = time.monotonic()
    quiet.command("scancel", str(run.jobs("stitch")[-1]))
    run.wait_until_done()
    # The coordinator has recorded it, for those who cannot ask the queue.
    recorded = json.loads((run.run_dir / "run.json").read_text())["stages"]["stitch"]
    assert recorded["state"] == "stopped"
    assert said.read_text() == "failure\n" * 2
    assert stopped("not in the queue any more")
    assert "agq resume goes on" in run.agq("attach", run.run_dir, "--interval", "1", code=1)
    note("stitch: scancel while it waits", "the run is stopped, `agq resume` stitches", since)

    run.agq("resume", run.run_dir)
    run.agq("attach", run.run_dir, "--interval", "1")
    assert said.read_text() == "failure\n" * 2 + "end\n"
    assert results(run.run_dir) == segmented
