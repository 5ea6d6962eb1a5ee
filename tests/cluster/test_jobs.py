"""What a job is given (GPUs, a container), and a stitch whose workers are jobs."""

import json
import os
import shlex
import stat
import subprocess
import sys
import time

import pytest

from agq.blockwise.journal.reader import Journal
from tests.cluster.runs import N_BLOCKS, ClusterRun, chunks, wait_for
from tests.helpers.runs import results
from tests.helpers.strangers import attack, listening


@pytest.mark.parametrize(("workers", "gpus"), [(2, 2), (4, 1)])
def test_one_process_per_gpu_each_with_its_own(quiet, tmp_path, undisturbed, workers, gpus):
    slurm = {"workers": workers, "gpus": gpus, "mem": "900M"}
    run = ClusterRun(tmp_path, delay_s=2.0, slurm=slurm)
    run.submit()
    n = workers * gpus
    wait_for(lambda: len(run.processes("agq.blockwise.predict.worker")) == n, why=run.post_mortem)
    seen = [process.environ() for process in run.processes("agq.blockwise.predict.worker")]
    # What SLURM says that it has bound to the job is what its processes see, each a part of it.
    bound = {e["SLURM_JOB_ID"]: set(e["SLURM_JOB_GPUS"].split(",")) for e in seen}
    used = [(e["SLURM_JOB_ID"], e["CUDA_VISIBLE_DEVICES"]) for e in seen]
    assert len(bound) == workers
    assert all(len(devices) == gpus for devices in bound.values())
    assert sorted(used) == sorted((job, d) for job, devices in bound.items() for d in devices)
    assert len({(e["SLURMD_NODENAME"], e["CUDA_VISIBLE_DEVICES"]) for e in seen}) == n

    def all_have_worked() -> bool:
        return sum(worker.done > 0 for worker in run.journal().workers.values()) == n

    wait_for(lambda: all_have_worked() or run.done() == N_BLOCKS, why=run.post_mortem)
    assert all_have_worked(), run.post_mortem()
    run.wait_until_done()
    assert chunks(run.run_dir) == undisturbed
    names = {worker.info.name for worker in run.journal().workers.values()}
    job = run.jobs("workers")[0]
    tasks = [f"{job}_{task}" for task in range(workers)]
    assert names == ({f"{t}.{g}" for t in tasks for g in range(gpus)} if gpus > 1 else set(tasks))


# Stands in for apptainer, which Debian does not have: it checks its arguments, writes them down,
# and runs the command as in an image, which has Python but neither SLURM nor its configuration.
APPTAINER = """#!/bin/bash
set -eu
printf '%s\\n' "$(printf '%q ' "$@")" >> {said}
[ "$1" = exec ] || {{ echo "not exec but $1" >&2; exit 64; }}
shift
while [[ "$1" == --* ]]; do shift; done
[ -f "$1" ] || {{ echo "no image $1" >&2; exit 66; }}
shift
[ "$1" = python ] || {{ echo "not python but $1" >&2; exit 64; }}
unset SLURM_CONF
export PATH={inside} APPTAINER_CONTAINER=agq.sif
exec "$@"
"""


def test_jobs_run_in_a_container(quiet, tmp_path, segmented, monkeypatch):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    said = tmp_path / "said"
    (outside / "apptainer").write_text(APPTAINER.format(said=said, inside=inside))
    for program in (inside / "python", outside / "apptainer"):
        program.chmod(0o755)
    image = tmp_path / "my images" / "agq's.sif"
    image.parent.mkdir()
    image.touch()
    monkeypatch.setenv("PATH", f"{outside}:{os.environ['PATH']}")
    slurm = {
        "container": f"apptainer://{image}",
        "container_options": ["--bind=/some where:/data"],
        # Nobody can be asked in an image.
        "address": "127.0.0.1",
    }
    run = ClusterRun(tmp_path, slurm=slurm)
    run.agq("submit", run.config)
    run.agq("attach", run.run_dir, "--interval", "1")
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    assert results(run.run_dir) == segmented, run.post_mortem()
    called = [shlex.split(line) for line in said.read_text().splitlines()]
    expected = {
        role: ["exec", *gpu, "--bind=/some where:/data", str(image), "python", "-P", "-m",
               f"agq.pipeline.slurm.{role}", str(run.run_dir)]
        for role, gpu in (("coordinator", []), ("worker", ["--nv"]), ("stitch", []))
    }  # fmt: skip
    assert sorted(called) == sorted([*[expected["worker"]] * 3, expected["coordinator"],
                                     expected["stitch"]])  # fmt: skip


def test_stitch_with_dask_workers_in_jobs_of_their_own(quiet, tmp_path, segmented):
    stitch = {"cpus": 1, "mem": "2G", "jobs": 2, "time": "10"}
    # Slow enough that the coordinator still holds the run when the stitch is submitted.
    run = ClusterRun(tmp_path / "of 'mine'\n$HOME", delay_s=1.0, slurm={"stitch": stitch})
    run.submit()
    wait_for(lambda: run.done() > 0, why=run.post_mortem)
    run.agq("submit", run.config, "--stage", "stitch", "--after", "predict")
    assert run.done() < N_BLOCKS
    helpers = wait_for(
        lambda: {line.split()[0] for line in run.queue("%i %j") if "dask" in line},
        why=run.post_mortem,
    )

    def listed() -> int:
        seen = json.loads(run.agq("status", run.run_dir, "--json"))["queue"]
        return sum(entry["count"] for entry in seen if entry["role"] == "dask")

    wait_for(lambda: listed() == 2, 30, why=run.post_mortem)
    assert 'agq_batch_jobs{run="run"' in run.agq("metrics", run.run_dir)
    secrets = run.run_dir / "slurm" / "dask"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700

    # A job's program is a nanny, its child the worker: each has a port that answers nobody else.
    def ports() -> set[str] | None:
        programs = run.processes("agq.pipeline.slurm.dask_worker")
        return next((p for p in map(listening, (p.pid for p in programs)) if len(p) == 2), None)

    assert attack(wait_for(ports, why=run.post_mortem)) == []
    run.agq("attach", run.run_dir, "--interval", "1")
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    assert results(run.run_dir) == segmented, run.post_mortem()
    # Every block was relabelled by a worker in one of these jobs, none by the stitch job itself.
    workers = Journal(run.run_dir / "journal" / "relabel").workers.values()
    jobs = {worker.info.job for worker in workers if worker.done}
    assert helpers <= {str(job) for job in run.jobs("dask")}
    logs = (run.run_dir / "logs" / "slurm").glob("dask-worker-*.err")
    helpers |= {log.stem.rpartition("-")[2].partition(".")[0] for log in logs}
    assert jobs
    assert jobs <= helpers
    assert str(run.jobs("stitch")[0]) not in jobs
    status = json.loads(run.agq("status", run.run_dir, "--json"))
    assert {stage["name"]: stage["state"] for stage in status["stages"]}["stitch"] == "done"


def test_a_lost_job_of_dask_workers_is_replaced(quiet, tmp_path, segmented, note):
    """dask-jobqueue submits a job once; without its only worker the stitch would wait for ever."""
    # What the environment of the stitch's job asks sbatch for does not count.
    slurm = {"stitch": {"cpus": 1, "mem": "2G", "jobs": 1}, "prologue": ["export SBATCH_QOS=none"]}
    run = ClusterRun(tmp_path, slurm=slurm)
    run.submit()
    run.wait_until_done()
    run.agq("submit", run.config, "--stage", "stitch")

    def worker_job() -> str:
        return "".join(line.split()[0] for line in run.queue("%i %j") if "dask-worker" in line)

    lost = wait_for(worker_job, why=run.post_mortem)
    since = time.monotonic()
    subprocess.run(["scancel", lost], check=True)
    wait_for(lambda: worker_job() not in ("", lost), why=run.post_mortem)
    note("dask worker job: scancel", "the stitch's job submits another", since)
    run.agq("cancel", run.run_dir, "--wait", "5")
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    run.agq("resume", run.run_dir)
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    assert results(run.run_dir) == segmented, run.post_mortem()


@pytest.mark.parametrize(
    ("prologue", "reason", "logs"),
    [
        (
            'case "$SLURM_JOB_NAME" in dask*) echo no module cuda; exit 3;; esac',
            "no module cuda",
            "dask-worker-*",
        ),
        # sbatch refuses what the stitch's job submits.
        ("PATH=REFUSING:$PATH", "no more jobs", "stitch-*"),
    ],
    ids=["end at once", "refused"],
)
def test_a_stitch_whose_worker_jobs_never_work_says_so(quiet, tmp_path, prologue, reason, logs):
    sbatch = tmp_path / "refusing" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho no more jobs >&2\nexit 1\n")
    sbatch.chmod(0o755)
    prologue = prologue.replace("REFUSING", str(sbatch.parent))
    slurm = {"stitch": {"cpus": 1, "mem": "2G", "jobs": 1}, "prologue": [prologue]}
    run = ClusterRun(tmp_path, slurm=slurm)
    run.submit()
    run.wait_until_done()
    run.agq("submit", run.config, "--stage", "stitch")
    wait_for(lambda: not run.queue(), why=run.post_mortem)
    stage = json.loads((run.run_dir / "run.json").read_text())["stages"]["stitch"]
    assert stage["state"] == "stopped"
    assert "ended before their workers joined" in stage["error"]
    folder = run.run_dir / "logs" / "slurm"
    log = (folder / f"stitch-{run.jobs('stitch')[0]}.log").read_text()
    assert "ended before their workers joined" in log.splitlines()[-1]
    assert any(reason in file.read_text() for file in folder.glob(logs))
