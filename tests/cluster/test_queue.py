"""What users see of the queue and do to it: a long array, a second user, SLURM away."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.runs import ClusterRun, wait_for
from tests.helpers.runs import ROOT, agq, command, environment, results


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can read; pytest's is closed to them."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def agq_of_another(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `agq` as another user, who may read Python wherever it lies and write nowhere."""
    right = "dac_read_search"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    rights = [f"--inh-caps=+{right}", f"--ambient-caps=+{right}"]
    return subprocess.run(
        [*user, *rights, *command(*arguments)],
        env=environment() | {"HOME": "/nonexistent"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def workers(text: str) -> int:
    """Worker jobs in the queue, as `agq status --json` says."""
    queue = json.loads(text)["queue"]
    return sum(q["count"] for q in queue if q["role"] == "workers" and q["state"] != "MISSING")


def test_a_long_array_a_second_user_and_an_outage(
    quiet, shared_folder, tmp_path, monkeypatch, segmented, note
):
    run = ClusterRun(shared_folder, delay_s=1.0, slurm={"workers": 120, "limit": 1})
    run.agq("submit", run.config)
    run.wait_until_begun(2)
    array = run.jobs("workers")[0]
    # What is left, 1-2,4,6,..., is cut by squeue unless it is asked for all of it.
    quiet.command("scancel", f"{array}_[{','.join(map(str, range(3, 120, 2)))}]")

    # The owner, and a second user.
    assert workers(run.agq("status", run.run_dir, "--json")) == 61
    assert "agq_run_running" in run.agq("metrics", run.run_dir)
    seen = agq_of_another("status", run.run_dir, "--json")
    assert workers(seen.stdout) == 61, seen.stderr
    for refused in (["scale", run.run_dir, 2], ["cancel", run.run_dir]):
        done = agq_of_another(*refused)
        assert done.returncode == 2
        assert "ermission denied" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    calls, shim = tmp_path / "calls", tmp_path / "bin" / "scancel"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {shutil.which("scancel")} "$@"\n')
    shim.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
        assert "61 -> 3" in run.agq("scale", run.run_dir, 3)
    assert len(calls.read_text().splitlines()) == 1
    assert workers(run.agq("status", run.run_dir, "--json")) == 3

    # Nobody answers: who follows goes on, and a command that fails changes nothing.
    since = time.monotonic()
    followers = [
        subprocess.Popen(
            command(name, run.run_dir, "--interval", "0.5"),
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("attach", "watch")
    ]
    record = (run.run_dir / "slurm" / "jobs.json").read_text()
    os.kill(int((quiet.lab / "run" / "slurmctld.pid").read_text()), signal.SIGTERM)
    wait_for(lambda: not (quiet.lab / "run" / "slurmctld.pid").exists())
    with ThreadPoolExecutor() as pool:
        words = [["cancel", run.run_dir], ["scale", run.run_dir, 1], ["resume", run.run_dir]]
        refusals = list(pool.map(lambda asked: agq(*asked), words))
    for done in refusals:
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Unable to contact slurm controller" in done.stderr
    assert (run.run_dir / "slurm" / "jobs.json").read_text() == record
    status = json.loads(run.agq("status", run.run_dir, "--json"))
    assert status["state"] == "running"
    assert status["queue"] is None
    assert "Unable to contact slurm controller" in status["queue_error"]
    quiet.up()
    for follower in followers:
        assert follower.poll() is None, follower.communicate()[0]

    # As before a time limit: the coordinator comes again, and the stitch waits for it.
    coordinator = str(run.jobs("coordinator")[0])
    quiet.command("scancel", "--batch", "--signal=USR1", coordinator)
    log = run.run_dir / "logs" / "slurm" / f"coordinator-{coordinator}.log"
    wait_for(lambda: "before the time limit" in log.read_text() or run.done() == 60)
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    note("slurmctld away: status, attach; cancel fails", "they go on; the run does", since)
    for follower in followers:
        said = follower.communicate(timeout=60)[0]
        assert follower.returncode == 0, said
    assert results(run.run_dir) == segmented, run.post_mortem()
