"""`agq submit` on a real SLURM, from the command line to the segmentation."""

import json
import os
import shlex
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from agq.blockwise.journal.reader import Journal
from tests.cluster.runs import N_BLOCKS, ClusterRun, chunks, wait_for
from tests.helpers.pages import CLUSTER_PAGES, section_commands
from tests.helpers.runs import ROOT, agq, blobs, command, environment, results, write_volume


def test_all_stages_with_odd_names(quiet, tmp_path, segmented, monkeypatch):
    run = ClusterRun(tmp_path / "a ü 'q\" $x; #y", delay_s=0.05)
    # Options and the job of the shell that it is called from.
    for name, value in {"SBATCH_PARTITION": "short", "SBATCH_TIMELIMIT": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "77")
    shown = run.agq("submit", run.config, "--dry-run")
    assert "SBATCH_PARTITION, SBATCH_TIMELIMIT of the environment do not count" in shown
    assert not run.run_dir.exists()
    refused = agq("submit", run.config, "--dry-run", "--set", "slurm.mem=1T")
    assert (refused.returncode, refused.stdout) == (2, "")
    said = run.agq("submit", run.config)
    assert said.count("submitted") == 3
    lines = quiet.command("scontrol", "--oneliner", "show", "job").splitlines()
    jobs = [dict(w.split("=", 1) for w in line.split() if "=" in w) for line in lines]
    jobs = [job for job in jobs if int(job["JobId"]) >= run.jobs("coordinator")[0]]
    assert {(job["Partition"], job["TimeLimit"]) for job in jobs} == {("gpu", "01:00:00")}
    for option in ("--array=0-2", "--dependency=after:COORDINATOR", "afterany:COORDINATOR"):
        assert option in shown
    for name in ("coordinator", "workers", "stitch"):
        assert (run.run_dir / "slurm" / f"{name}.sh").read_text() in shown
    wait_for(lambda: run.done() > 0)
    session = run.run_dir / "session.json"
    assert stat.S_IMODE(session.stat().st_mode) == 0o600
    token = json.loads(session.read_text())["token"]
    assert len(token) == 64
    refused = agq("submit", run.config)
    assert refused.returncode == 2
    assert "jobs in the queue" in refused.stderr
    out = run.agq("attach", run.run_dir, "--interval", "1")
    assert "done" in out
    assert results(run.run_dir) == segmented
    status = json.loads(run.agq("status", run.run_dir, "--json"))
    assert status["state"] == "done"
    workers = status["stages"][0]["workers"]
    array = run.jobs("workers")[0]
    assert {w["name"] for w in workers} <= {f"{array}_{task}" for task in range(3)}
    again = run.agq("submit", run.config, "--dry-run")
    assert "predict: done" in again
    assert again.count("# sbatch") == 1
    assert {w["host"] for w in workers} <= {"gpu1", "gpu2", "gpu3", "gpu4"}
    assert "attempt 1 begun by" in run.agq("logs", run.run_dir, "--block", "7")
    assert "workers-" in run.agq("logs", run.run_dir)
    for log in run.run_dir.rglob("*.log"):
        assert token not in log.read_text(errors="replace")


def test_a_plan_times_a_block_in_a_job_and_the_run_is_compared_with_it(quiet, tmp_path):
    run = ClusterRun(tmp_path, delay_s=0.3, slurm={"price_per_gpu_hour": 3.6})
    said = run.agq("plan", run.config, "--submit")
    assert "timed now on" in said
    assert "cpu (gpu" in said, "on a node of the cluster"
    for word in ("GPU hours", "cost", "3 with a GPU each", "stitch", "pyramid", "disk: all"):
        assert word in said
    # The result is there before SLURM has taken the job off the queue.
    wait_for(lambda: not run.queue(), 60)
    plan = json.loads(agq("plan", run.config, "--json").stdout)
    assert plan["timing"]["host"].startswith("gpu")
    assert 0.3 <= plan["seconds_per_block"] < 5
    expected = 60 * plan["seconds_per_block"] + 3 * plan["timing"]["load_s"]
    assert plan["forecast"]["worker_hours"] == pytest.approx(expected / 3600)

    # A partition whose jobs are shorter than that, and shorter than they may be.
    short = ("--set", "slurm.partition=short", "--set", "slurm.time='5'")
    never = agq("plan", run.config, "--submit", *short)
    assert never.returncode == 2
    assert "slurm.time" in never.stderr
    held = agq("plan", run.config, "--submit", "--set", "slurm.extra=[--hold]")
    assert held.returncode == 2
    assert "can never start: JobHeldUser" in held.stderr
    assert not [line for line in run.queue() if "COMPLETING" not in line]
    failed = agq("plan", run.config, "--submit", "--set", "slurm.prologue=[echo no module, exit 3]")
    assert failed.returncode == 2
    assert "ended without a result" in failed.stderr
    assert failed.stderr.strip().endswith("no module")
    waiting = subprocess.Popen(
        command("plan", run.config, "--submit", "--set", "slurm.extra=[--begin=now+1hour]"),
        env=environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: run.queue())
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode != 0
    assert "Traceback" not in err
    wait_for(lambda: not run.queue())

    assert "forecast: " in run.agq("submit", run.config)
    run.agq("attach", run.run_dir, "--interval", "1")
    rows = {r["name"]: r for r in json.loads(run.agq("status", run.run_dir, "--json"))["forecast"]}
    assert rows["gpu_hours"]["forecast"] == pytest.approx(expected / 3600)
    for name in ("gpu_hours", "cost", "predict_s", "stitch_s", "files", "disk_bytes"):
        assert rows[name]["fact"] > 0
    assert "GPU hours" in run.agq("status", run.run_dir)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slurm.partition=nope", ["slurm.partition", "'nope'", "gpu, scavenge, short"]),
        ("slurm.gpus=3", ["slurm.gpus", "gpu:fake:2"]),
        ("slurm.gres=gpu:a100", ["gpu:a100", "gpu:fake:2"]),
        ("slurm.mem=1T", ["slurm.mem", "64000M"]),
        ("slurm.cpus=17", ["slurm.cpus", "16"]),
        ("slurm.time='30-00:00:00'", ["slurm.time", "10080 minutes"]),
        ("slurm.workers=200000", ["slurm.workers", "100001"]),
        ("slurm.constraint=a100", ["slurm.constraint", "'a100'"]),
        ("slurm.partition='gpu; rm -rf x'", ["slurm.partition", "one word"]),
    ],
)
def test_what_the_cluster_lacks_is_said_before_submission(slurm, tmp_path, setting, words):
    run = ClusterRun(tmp_path)
    refused = agq("submit", run.config, "--set", setting)
    assert refused.returncode == 2
    for word in words:
        assert word in refused.stderr, refused.stderr
    assert not (run.run_dir / "slurm" / "jobs.json").exists(), "something was submitted"


def test_scale_cancel_and_resume(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=2.0)
    run.agq("submit", run.config, "--stage", "predict", "--set", "slurm.workers=1")
    run.wait_until_begun(2)
    assert "1 -> 3" in run.agq("scale", run.run_dir, 3)
    workers = lambda: [line for line in run.queue() if line.split()[1] != "N/A"]  # noqa: E731
    wait_for(lambda: sum("RUNNING" in line for line in workers()) == 3)
    assert "3 -> 2" in run.agq("scale", run.run_dir, 2)
    wait_for(lambda: len(workers()) == 2)
    assert "killed" not in run.agq("cancel", run.run_dir, "--wait", "120")
    wait_for(lambda: not run.queue())
    done = run.done()
    assert 2 <= done < 60
    run.agq("resume", run.run_dir, "--stage", "predict", "--workers", "4")
    run.wait_until_done()
    assert chunks(run.run_dir) == undisturbed


def test_resume_submits_what_is_missing(quiet, tmp_path, segmented, note):
    held, lingers = tmp_path / "held", tmp_path / "lingers"
    wait = f'case "$SLURM_JOB_NAME" in agq-stitch*) while [ -e {held} ]; do sleep 0.2; done;; esac'
    end = f'trap "while [ -e {lingers} ]; do sleep 0.2; done" EXIT'
    linger = f'case "$SLURM_JOB_NAME" in agq-coordinator*) {end};; esac'
    run = ClusterRun(tmp_path, delay_s=0.8, slurm={"prologue": [wait, linger]})
    ids = lambda: {line.split()[0] for line in run.queue() if "COMPLETING" not in line}  # noqa: E731

    # sbatch refuses the last of three scripts.
    refused = agq("submit", run.config, "--set", "slurm.stitch.constraint=a&b")
    assert refused.returncode == 2
    assert "sbatch" in refused.stderr
    assert not ids()
    assert [run.jobs(role) for role in ("coordinator", "workers", "stitch")] == [[], [], []]

    # No worker is wanted: the coordinator stops, and the stitch finds blocks missing.
    run.agq("submit", run.config)
    run.wait_until_begun(2)
    run.agq("scale", run.run_dir, 0)
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    assert run.done() < N_BLOCKS
    held.touch()
    lingers.touch()
    since = time.monotonic()
    assert "3 array tasks" in run.agq("resume", run.run_dir)

    # The coordinator has done its work, but SLURM ends its job at the time limit.
    wait_for(lambda: run.stage().get("state") == "done", why=run.post_mortem)
    coordinator = str(run.jobs("coordinator")[-1])
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 2))
    quiet.command("scontrol", "update", f"jobid={coordinator}", f"EndTime={soon}")
    shown = ["scontrol", "show", "job", coordinator]
    wait_for(lambda: "JobState=TIMEOUT" in quiet.command(*shown), why=run.post_mortem)
    limit = time.monotonic()
    wait_for(lambda: any("agq-stitch" in line and "RUNNING" in line for line in run.queue("%j %T")))
    note("coordinator: TIMEOUT after its work", "its stitch begins all the same", limit)

    # The prediction is done, the stitch works: it goes on, and no GPU waits for nothing.
    wait_for(lambda: run.stage().get("state") == "done" and len(ids()) == 1, why=run.post_mortem)
    stitch = str(run.jobs("stitch")[-1])
    wait_for(lambda: any("RUNNING" in line for line in run.queue()))
    said = run.agq("resume", run.run_dir)
    assert f"stitch: job {stitch} is in the queue (RUNNING) and goes on" in said
    assert ids() == {stitch}

    # The stitch is lost: it alone is submitted.
    quiet.command("scancel", stitch)
    wait_for(lambda: not run.queue())
    assert run.agq("resume", run.run_dir).count("submitted") == 1
    assert ids() == {str(run.jobs("stitch")[-1])}
    held.unlink()
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    note("scale 0, then resume; stitch lost, then resume", "only what is missing comes", since)
    assert results(run.run_dir) == segmented, run.post_mortem()
    assert "stitch: done" in run.agq("resume", run.run_dir)
    assert not ids()


def pending(run_dir: Path) -> set[tuple[str, int]]:
    """Why worker jobs wait, and how many, as `agq status` says."""
    queue = json.loads(agq("status", run_dir, "--json").stdout)["queue"]
    found = [q for q in queue if q["role"] == "workers" and q["state"] == "PENDING"]
    return {(q["reason"], q["count"]) for q in found}


@pytest.mark.parametrize("page", CLUSTER_PAGES)
def test_pages_line_by_line(quiet, tmp_path, monkeypatch, page):
    """The section as written, but for the place of the data and a network without weights."""
    lines = section_commands(page, CLUSTER_PAGES[page])
    assert {"config", "submit", "attach", "scale", "cancel"} <= {line.split()[1] for line in lines}
    write_volume(tmp_path / "in.zarr", "raw", blobs((20, 50, 70)))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shim = tmp_path / "bin" / "agq"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexec " + shlex.join(command()) + ' "$@"\n')
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("RAW", str(tmp_path / "in.zarr"))
    run_dir, my = tmp_path / "my-volume", tmp_path / "my.yaml"
    done = lambda: Journal(run_dir / "journal" / "predict").counts()["done"]  # noqa: E731

    for line in lines:
        process = subprocess.Popen(
            ["bash", "-euc", line.replace("/scratch/me", str(tmp_path))],
            env=environment(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if " attach " in line:
            wait_for(lambda: done() > 2)
            os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{line}: {errors}"
        if " init " in line:
            config = yaml.safe_load(my.read_text())
            config["model"] = {
                "factory": "tests.helpers.fakes:threshold",
                "options": {"delay_s": 5.0},
            }
            config["blocks"] = {"read_shape": [9, 17, 17], "before": [1, 1, 1], "after": [1, 1, 1]}
            config["slurm"]["stitch"]["cpus"] = 1
            my.write_text(yaml.safe_dump(config, allow_unicode=True))
        elif "--dry-run" in line:
            assert "#SBATCH --gres=gpu:1" in said
            assert not run_dir.exists()
        elif " scale " in line:
            # Eight GPUs for sixteen jobs: the status says why the others wait.
            wait_for(lambda: pending(run_dir) in ({("Resources", 8)}, {("Priority", 8)}))
    assert 2 < done() < 60
    if not lines[-1].startswith("agq resume"):
        # A comment says that it goes on.
        assert agq("resume", run_dir).returncode == 0
    assert agq("attach", run_dir, "--interval", "1", timeout=600).returncode == 0
    assert done() == 60
    assert (run_dir / "data.zarr" / "segmentation").is_dir()
