"""`agq submit` on a real SLURM, from the command line to the segmentation."""

import json
import stat

import pytest

from tests.cluster.runs import ClusterRun, chunks, wait_for
from tests.runs import agq, make_config, results


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = agq("run", make_config(folder))
    assert done.returncode == 0, done.stderr
    return results(folder / "run")


def test_all_stages_with_odd_names(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path / "a ü 'q\" $x; #y", delay_s=0.05)
    shown = run.agq("submit", run.config, "--dry-run")
    assert not run.run_dir.exists()
    said = run.agq("submit", run.config)
    assert said.count("submitted") == 3
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
    assert results(run.run_dir) == undisturbed
    status = json.loads(run.agq("status", run.run_dir, "--json"))
    assert status["state"] == "done"
    workers = status["stages"][0]["workers"]
    assert {w["host"] for w in workers} <= {"gpu1", "gpu2", "gpu3", "gpu4"}
    assert "attempt 1 begun by" in run.agq("logs", run.run_dir, "--block", "7")
    assert "workers-" in run.agq("logs", run.run_dir)
    for log in run.run_dir.rglob("*.log"):
        assert token not in log.read_text(errors="replace")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("slurm.partition=nope", ["slurm.partition", "'nope'", "gpu, scavenge, short"]),
        ("slurm.gpus=3", ["slurm.gpus", "gpu:fake:2"]),
        ("slurm.gres=gpu:a100", ["gpu:a100", "gpu:fake:2"]),
        ("slurm.mem=1T", ["slurm.mem", "4000M"]),
        ("slurm.cpus=5", ["slurm.cpus", "4"]),
        ("slurm.time='30-00:00:00'", ["slurm.time", "10080 minutes"]),
        ("slurm.workers=200000", ["slurm.workers", "100001"]),
        ("slurm.constraint=a100", ["slurm.constraint", "'a100'"]),
        ("slurm.partition='gpu; rm -rf x'", ["slurm.partition", "one word"]),
    ],
)
def test_what_the_cluster_lacks_is_said_before_submission(quiet, tmp_path, setting, words):
    run = ClusterRun(tmp_path)
    refused = agq("submit", run.config, "--set", setting)
    assert refused.returncode == 2
    for word in words:
        assert word in refused.stderr, refused.stderr
    assert not run.queue()


def test_scale_cancel_and_resume(quiet, tmp_path, undisturbed):
    run = ClusterRun(tmp_path, delay_s=1.0)
    run.agq("submit", run.config, "--stage", "predict", "--set", "slurm.workers=1")
    run.wait_until_begun(2)
    assert "1 -> 3" in run.agq("scale", run.run_dir, 3)
    workers = lambda: [line for line in run.queue() if line.split()[1] != "N/A"]  # noqa: E731
    wait_for(lambda: sum("RUNNING" in line for line in workers()) == 3)
    assert "3 -> 2" in run.agq("scale", run.run_dir, 2)
    wait_for(lambda: len(workers()) == 2)
    assert "the hard way" not in run.agq("cancel", run.run_dir)
    wait_for(lambda: not run.queue())
    done = run.done()
    assert 2 <= done < 60
    run.agq("resume", run.run_dir, "--stage", "predict", "--workers", "4")
    run.wait_until_done()
    assert chunks(run.run_dir) == {k: undisturbed[k] for k in chunks(run.run_dir)}


def test_stitch_with_dask_workers_in_jobs_of_their_own(quiet, tmp_path, undisturbed):
    stitch = {"cpus": 1, "mem": "2G", "jobs": 2, "time": "10"}
    run = ClusterRun(tmp_path, delay_s=0.05, slurm={"stitch": stitch})
    run.submit()
    wait_for(lambda: run.done() > 0)
    run.agq("submit", run.config, "--stage", "stitch", "--after", "predict")
    wait_for(lambda: any("dask" in line for line in run.queue("%j")))
    run.agq("attach", run.run_dir, "--interval", "1")
    wait_for(lambda: not run.queue())
    assert results(run.run_dir) == undisturbed, run.post_mortem()
