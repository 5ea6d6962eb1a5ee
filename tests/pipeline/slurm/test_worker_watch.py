"""What the coordinator does about lost worker jobs, with a stand-in for SLURM's answers."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from agq.blockwise.predict.coordinator import PredictProgress
from agq.errors import RunStoppedError
from agq.pipeline.slurm import client, jobs, worker_watch
from agq.pipeline.slurm.client import QueueEntry
from agq.pipeline.slurm.scripts import folder, log_folder
from agq.pipeline.slurm.settings import SlurmSettings
from agq.pipeline.slurm.worker_watch import WorkerWatch
from agq.pipeline.status.run_status import RunStatus


class Cluster:
    """SLURM's answers, and a clock.

    Attributes
    ----------
    tasks
        State of each task by job and number.
    submitted
        How many tasks each submission has had.
    excluded
        What the last submission has excluded.
    node
        Node of each task by job and number; default: one of its own for each number.
    """

    def __init__(self, run_dir: Path, workers: int, **settings: Any) -> None:
        self.run_dir = run_dir
        self.now = 0.0
        self.done = 0
        self.tasks: dict[tuple[int, int], str] = {}
        self.submitted: list[int] = []
        self.excluded = ""
        self.node: dict[tuple[int, int], str] = {}
        log_folder(run_dir).mkdir(parents=True)
        folder(run_dir).mkdir()
        record = jobs.Jobs(here="/", grace_s=5, workers=workers)
        jobs.record_path(run_dir).write_text(record.model_dump_json())
        with jobs.changing(run_dir) as changed:
            jobs.submit_workers(changed, run_dir, SlurmSettings(), workers)
        self.watch = WorkerWatch(run_dir, SlurmSettings(**settings))

    def submit(self, arguments: list[object]) -> int:
        words = [str(a) for a in arguments]
        array = next(word for word in words if word.startswith("--array=0-"))
        self.excluded = next((word for word in words if word.startswith("--exclude=")), "")
        count = int(array.removeprefix("--array=0-").partition("%")[0]) + 1
        self.submitted.append(count)
        job = len(self.submitted)
        self.tasks |= {(job, task): "RUNNING" for task in range(count)}
        return job

    def queue(self, _ids: object, _users: object = (), *, states: Any = ()) -> list[QueueEntry]:
        wanted = states or ["RUNNING", "PENDING"]
        held = {"PENDING": "launch_failed_requeued_held"}
        return [
            QueueEntry(
                *(job, (task,), state, held.get(state, "None")),
                node=self.node.get((job, task), f"n{task}"),
                seconds=30,
            )
            for (job, task), state in self.tasks.items()
            if state in wanted
        ]

    def end(self, job: int, task: int, state: str = "FAILED") -> None:
        self.tasks[job, task] = state

    def wait(self, seconds: float) -> None:
        """Let time pass, as the coordinator sees it."""
        until = self.now + seconds
        while self.now < until:
            self.now += 1.0
            self.watch(PredictProgress(60, self.done, 0, 0, 0, 0, self.now))

    def fail_all(self, state: str = "FAILED") -> None:
        """End each job at once."""
        for _ in range(1000):
            for job, task in self.tasks:
                self.end(job, task, state)
            self.wait(1)

    @property
    def wanted(self) -> int:
        return jobs.load(self.run_dir).workers


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    made: list[Cluster] = []
    clock = SimpleNamespace(monotonic=lambda: made[0].now if made else 0.0, time=time.time)
    monkeypatch.setattr(worker_watch, "time", clock)
    monkeypatch.setattr(client, "queue", lambda *a, **k: made[0].queue(*a, **k))
    monkeypatch.setattr(client, "submit", lambda arguments: made[0].submit(arguments))

    def make(workers: int, **settings: Any) -> Cluster:
        made.append(Cluster.__new__(Cluster))
        made[0].__init__(tmp_path / "run", workers, **settings)
        return made[0]

    return make


def test_each_lost_job_is_replaced_with_growing_pauses(cluster):
    it = cluster(3)
    it.wait(60)
    assert it.submitted == [3]
    it.end(1, 1)
    it.wait(60)
    assert it.submitted == [3, 1]
    # A node on which every job ends at once: the others go on.
    times = []
    for _ in range(6):
        before = len(it.submitted)
        it.end(before, 0)
        since = it.now
        while len(it.submitted) == before:
            it.wait(1)
        times.append(it.now - since)
    assert times == sorted(times)
    assert times[0] < 60
    assert times[-1] > 500
    assert sum(s == "RUNNING" for s in it.tasks.values()) == it.wanted == 3


def test_after_a_calm_time_a_lost_job_is_replaced_at_once_again(cluster):
    it = cluster(2)
    for _ in range(4):
        it.end(len(it.submitted), 0)
        it.wait(600)
    before = len(it.submitted)
    it.wait(400)
    it.end(before, 0)
    it.wait(60)
    assert len(it.submitted) == before + 1


def test_several_lost_jobs_are_one_submission(cluster):
    it = cluster(5)
    for task, state in enumerate(["FAILED", "NODE_FAIL", "COMPLETED"]):
        it.end(1, task, state)
    it.wait(60)
    assert it.submitted == [5, 3]


def test_a_node_on_which_workers_do_not_start_is_excluded(cluster):
    it = cluster(3, extra=("--exclude=x1",))
    it.end(1, 2)
    it.wait(60)
    assert (it.submitted, it.excluded) == ([3, 1], "--exclude=x1")
    it.node[2, 0] = "n2"
    it.end(2, 0)
    it.wait(60)
    assert (it.submitted, it.excluded) == ([3, 1, 1], "--exclude=x1,n2")
    # One node works and one is excluded: as many as may be.
    it.node |= {(3, 0): "n1", (4, 0): "n1"}
    for job in (3, 4):
        it.end(job, 0)
        it.wait(600)
    it.end(1, 1)
    it.wait(1200)
    assert (it.submitted[3:], it.excluded) == ([1, 1, 1], "--exclude=x1,n2")
    found = jobs.load(it.run_dir)
    assert found.excluded == ["n2"]


def test_no_node_is_excluded_where_none_works(cluster):
    it = cluster(2)
    it.node = {(job, task): "n1" for job in range(1, 9) for task in range(2)}
    with pytest.raises(RunStoppedError):
        it.fail_all()
    assert it.excluded == ""


def test_the_limit_holds_for_all_worker_jobs_together(cluster):
    it = cluster(6, limit=3)
    for task in range(3):
        it.end(1, task)
    it.wait(60)
    assert it.submitted == [6]
    it.end(1, 3)
    it.wait(60)
    assert it.submitted == [6, 1]
    it.end(1, 4, "CANCELLED")
    it.wait(60)
    assert (it.submitted, it.wanted) == ([6, 1, 1], 5)


def test_a_job_that_a_broken_node_leaves_in_the_queue_is_lost(cluster):
    it = cluster(3)
    it.end(1, 2, "PENDING")
    it.wait(60)
    assert it.submitted == [3, 1]


def test_a_job_that_somebody_cancelled_is_wanted_no_more(cluster):
    it = cluster(4)
    it.wait(30)
    it.end(1, 0, "CANCELLED")
    it.end(1, 2, "CANCELLED")
    it.wait(300)
    assert (it.submitted, it.wanted) == ([4], 2)
    it.end(1, 3)
    it.wait(60)
    assert (it.submitted, it.wanted) == ([4, 1], 2)


def test_fewer_that_the_user_asked_for_are_not_fewer_still(cluster):
    """`agq scale` cancels what it takes back, and says how many it wants."""
    it = cluster(4)
    it.wait(30)
    with jobs.changing(it.run_dir) as changed:
        changed.workers = 2
    it.end(1, 0, "CANCELLED")
    it.end(1, 2, "CANCELLED")
    it.wait(300)
    assert (it.submitted, it.wanted) == ([4], 2)


def test_none_is_left_and_none_works(cluster):
    it = cluster(2)
    with pytest.raises(RunStoppedError, match="no worker job is left, and 60 blocks remain"):
        it.fail_all()
    assert it.submitted == [2] * 5


@pytest.mark.parametrize(
    ("state", "log", "end", "words"),
    [
        (
            "FAILED",
            "slurm.sh: line 9: /envs/agq/bin/python: No such file or directory\n",
            None,
            ["FAILED", "bin/python: No such file", "workers-9_0.log", "slurm.python"],
        ),
        (
            "FAILED",
            "\x1b[31mModuleNotFoundError: No module named 'agq'\n",
            None,
            ["slurm.prologue"],
        ),
        ("OUT_OF_MEMORY", "", None, ["OUT_OF_MEMORY", "raise slurm.mem (7G)"]),
        (
            "FAILED",
            "slurmstepd: error: Detected 1 oom_kill event in StepId=9.batch.\n\n",
            None,
            ["oom_kill", "raise slurm.mem (7G)"],
        ),
        (
            "TIMEOUT",
            "slurmstepd: error: *** JOB 9 ON n CANCELLED DUE TO TIME LIMIT ***\n",
            None,
            ["raise slurm.time (0:05:00)", "slurm.lead_s (120)"],
        ),
        (
            "FAILED",
            "leaving with status 1\n",
            "it keeps ending with SIGKILL (out of memory?)",
            ["worker 9_0 on gpu7", "SIGKILL", "raise slurm.mem (7G)"],
        ),
        ("FAILED", "", None, ["workers-9_0.log: nothing"]),
    ],
)
def test_the_cause_is_named(cluster, state, log, end, words):
    it = cluster(1, mem="7G", time="0:05:00")
    (log_folder(it.run_dir) / "workers-9_0.log").write_text(log)
    if end is not None:
        said = {"worker": "9_0", "node": "gpu7", "message": end, "log": "w.log"}
        (folder(it.run_dir) / "ends").mkdir()
        (folder(it.run_dir) / "ends" / "9_0.json").write_text(json.dumps(said))
    with pytest.raises(RunStoppedError) as raised:
        it.fail_all(state)
    text = str(raised.value)
    for word in words:
        assert word in text
    assert text.isprintable()


def test_a_scale_between_two_looks_is_not_doubled(cluster, monkeypatch):
    it = cluster(1)
    it.end(1, 0)
    it.wait(20)
    changing = jobs.changing

    def late(run_dir: Path) -> Any:
        """What `agq scale RUN 3` does just before the coordinator has the lock."""
        monkeypatch.setattr(worker_watch, "changing", changing)
        with changing(run_dir) as changed:
            changed.workers = 3
            jobs.submit_workers(changed, run_dir, SlurmSettings(), 3)
        return changing(run_dir)

    monkeypatch.setattr(worker_watch, "changing", late)
    it.wait(100)
    assert it.submitted == [1, 3]


def test_status_tells_wanted_and_missing_jobs(tmp_path, monkeypatch):
    folder(tmp_path).mkdir()
    submitted = [jobs.Job(id=1, role="coordinator", submitted=0.0)]
    submitted.append(jobs.Job(id=2, role="workers", count=5, submitted=0.0))
    record = jobs.Jobs(here="/", grace_s=5, workers=5, jobs=submitted, excluded=["n7"])
    jobs.record_path(tmp_path).write_text(record.model_dump_json())
    monkeypatch.setattr(jobs, "are_of_another", lambda _: False)
    entries = [
        QueueEntry(1, (), "RUNNING", "None"),
        QueueEntry(2, (0,), "RUNNING", "None"),
        QueueEntry(2, (1, 2), "PENDING", "Resources"),
    ]
    monkeypatch.setattr(client, "queue", lambda *_: entries)
    found = jobs.queue_status(tmp_path)
    assert found is not None
    counts = {entry.state: entry.count for entry in found if entry.role == "workers"}
    assert counts == {"RUNNING": 1, "PENDING": 2, "MISSING": 2}
    assert {entry.wanted for entry in found if entry.role == "workers"} == {5}
    status = RunStatus(
        id="a", name="a", run_dir="/a", state="running", source="journal", updated=0.0, queue=found
    )
    console = Console(width=200)
    with console.capture() as capture:
        console.print(status.table())
    assert "2 workers missing, 5 workers wanted" in capture.get()
    assert "no workers on n7" in capture.get()
    # Without a coordinator nobody submits them.
    entries.pop(0)
    left = jobs.queue_status(tmp_path)
    assert left is not None
    assert {entry.wanted for entry in left} == {None}
