"""What SLURM's commands print, in every form, and what they are asked."""

import itertools
import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agq.pipeline.folder import RunFolder
from agq.pipeline.slurm import client, jobs
from agq.pipeline.slurm.client import QueueEntry, SlurmError, array_tasks, target
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.text import render
from agq.terminal import console

CUT = "1-2,4,6,8,10,12,14,16,18,20,22,24,26,28,30,32,34,36,38,40,42...%1"


def words(tasks: list[int]) -> list[str]:
    """Write tasks one by one, as ranges and as steps, as far as each form can say them."""
    ascending = sorted(set(tasks))
    texts = [",".join(map(str, ascending)), target(1, ascending).removeprefix("1_")]
    first, last = ascending[0], ascending[-1]
    steps = {b - a for a, b in itertools.pairwise(ascending)}
    if len(steps) == 1:
        texts.append(f"{first}-{last}:{steps.pop()}")
    return texts


@given(
    st.lists(st.integers(0, 4_000_000), min_size=1, max_size=50)
    | st.builds(lambda a, n, s: list(range(a, a + n * s, s)), *[st.integers(1, 400)] * 3),
    st.sampled_from(["", "%1", "%200"]),
    st.booleans(),
)
def test_array_tasks_in_every_form(tasks, limit, brackets):
    for text in words(tasks):
        plain = text.strip("[]") + limit
        assert array_tasks(f"[{plain}]" if brackets else plain) == tuple(sorted(set(tasks)))


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("7", (7,)),
        ("[7%2]", (7,)),
        ("4-7%2", (4, 5, 6, 7)),
        ("[0-15:4]", (0, 4, 8, 12)),
        ("0-28:4%2", (0, 4, 8, 12, 16, 20, 24, 28)),
        ("1,3-4,9-13:2", (1, 3, 4, 9, 11, 13)),
    ],
)
def test_array_tasks_as_seen(text, tasks):
    assert array_tasks(text) == tasks
    assert QueueEntry(5, tasks, "PENDING", "").count == len(tasks)


@pytest.mark.parametrize("text", [CUT, f"[{CUT}]", "1-2,4...", "", "[]", "x", "1-", "-1", "1,,2"])
def test_array_tasks_that_are_cut_or_unknown(text):
    with pytest.raises(SlurmError, match="cannot be read"):
        array_tasks(text)


def test_targets_of_scancel():
    assert target(7, ()) == "7"
    assert target(7, [3]) == "7_3"
    assert target(7, [5, 1, 2, 3]) == "7_[1-3,5]"
    assert QueueEntry(7, (8, 9), "PENDING", "").target == "7_[8-9]"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Make a stand-in for one of SLURM's commands, which writes down how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, stdout: str = "", stderr: str = "", code: int = 0) -> Path:
        said = folder / f"{name}.said"
        (folder / name).write_text(
            "#!/bin/bash\n"
            f"{{ printf '%q ' \"$@\"; echo; env; }} >> {said}\n"
            f"printf %s {shlex.quote(stdout)}; printf %s {shlex.quote(stderr)} >&2; exit {code}\n"
        )
        (folder / name).chmod(0o755)
        return said

    return make


def lines(*rows: tuple[str, ...]) -> str:
    return "".join("\x1f".join(row) + "\n" for row in rows)


DOWN = "Nodes required for job are DOWN, DRAINED (or reserved)"


def test_queue_lists_the_jobs_asked_for(program, monkeypatch):
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SBATCH_PARTITION", "SCANCEL_STATE"):
        monkeypatch.setenv(name, "x")
    said = program(
        "squeue",
        lines(
            ("5", "N/A", "RUNNING", "None", "n1", "1-02:03:04"),
            ("6", "0-4:2%1", "PENDING", DOWN, "", "0:00"),
            ("6", "7", "SPECIAL_EXIT", "job_requeued_in_held_state", "", "INVALID"),
            ("6", "8", "A_STATE_OF_TOMORROW", "", "n[1-2]", "1:40"),
            ("9", "N/A", "PENDING", "Priority", "", "0:00"),
        ),
    )
    entries = client.queue([5, 6])
    assert entries == [
        QueueEntry(5, (), "RUNNING", "None", "n1", 93784),
        QueueEntry(6, (0, 2, 4), "PENDING", DOWN),
        QueueEntry(6, (7,), "SPECIAL_EXIT", "job_requeued_in_held_state"),
        QueueEntry(6, (8,), "A_STATE_OF_TOMORROW", "", "n[1-2]", 100),
    ]
    text = said.read_text()
    assert f"--user={os.getuid()} " in text
    assert "SLURM_BITSTR_LEN=0" in text
    assert not {line.partition("=")[0] for line in text.splitlines()} & {
        *("SQUEUE_FORMAT", "SQUEUE_STATES", "SBATCH_PARTITION", "SCANCEL_STATE")
    }
    client.queue([5], [12, 11])
    assert "--user=11\\,12 " in said.read_text()


def test_a_job_is_not_told_of_the_job_that_submits_it(program, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SBATCH_QOS"):
        monkeypatch.setenv(name, "77")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("AGQ_MONGO_URI", "mongodb://me:s3cr3t@db/")
    said = program("sbatch", "12;cluster\n")
    assert client.submit(["x.sh"]) == 12
    text = said.read_text()
    assert "SLURM_CONF=/etc/slurm.conf" in text
    assert "77" not in text
    assert "s3cr3t" not in text
    assert client.environment_options() == ["SBATCH_QOS"]


@pytest.mark.parametrize(
    "stdout",
    [
        lines(("6", CUT, "PENDING", "x", "", "0:00")),
        "slurm_load: odd\n",
        lines(("6", "1", "RUNNING")),
    ],
)
def test_a_queue_that_cannot_be_read_is_an_error(program, stdout):
    program("squeue", stdout)
    with pytest.raises(SlurmError, match="cannot be read"):
        client.queue([6])


@pytest.mark.parametrize("private", ["none", "jobs,usage", "accounts,jobs"])
def test_jobs_that_a_cluster_hides_are_not_taken_for_none(program, monkeypatch, private):
    program("squeue")
    program("scontrol", f"Configuration data\nPrivateData             = {private}\n")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert client.queue([6], [1000]) == []
    if private == "none":
        assert client.queue([6], [1001]) == []
    else:
        with pytest.raises(SlurmError, match="shows jobs to the user who submitted them alone"):
            client.queue([6], [1001])
    # root sees all jobs.
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert client.queue([6], [1001]) == []


FAILED = "scancel: error: Kill job error on job id 5"


@pytest.mark.parametrize(
    ("stderr", "refused"),
    [
        (f"{FAILED}: Invalid job id specified", None),
        (f"{FAILED}_1: Job/step already completing or completed", None),
        (f"{FAILED}: Access/permission denied", "permission denied"),
        (f"{FAILED}: Invalid job id\nscancel: error: Unable to contact slurm", "Unable to contact"),
    ],
)
def test_scancel_that_fails_is_an_error_and_jobs_that_have_ended_are_none(program, stderr, refused):
    said = program("scancel", stderr=stderr, code=1)
    targets = [f"5_{n}" for n in range(200)]
    if refused is None:
        client.cancel(targets, "--state=PENDING")
    else:
        with pytest.raises(SlurmError, match=refused):
            client.cancel(targets)
    assert said.read_text().count("5_199") == 1


def test_status_says_that_the_queue_is_unknown(program, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    run_dir = run.path
    with run.lock():
        run.create({"run_dir": str(run_dir)}, {"grid": 1})
    (run_dir / "slurm").mkdir()
    record = jobs.Jobs(here="/", grace_s=1, workers=1, jobs=[])
    record.jobs.append(jobs.Job(id=6, role="workers", count=40, submitted=0.0))
    jobs.record_path(run_dir).write_text(record.model_dump_json())
    program("squeue", stderr="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    status = load_status(run_dir, queue=jobs.queue_status)
    assert status.queue is None
    assert "Unable to contact" in status.queue_error
    console().print(render(status))
    assert "queue: unknown (squeue: slurm_load_jobs error" in capsys.readouterr().out
    program("squeue", lines(("6", "0-39%2", "PENDING", "Resources", "", "0:00")))
    status = load_status(run_dir, queue=jobs.queue_status)
    assert [(q.role, q.state, q.reason, q.count) for q in status.queue] == [
        ("workers", "PENDING", "Resources", 40)
    ]
    assert status.queue_error is None
