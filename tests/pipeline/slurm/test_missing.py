"""Which jobs a submission or a resumption adds, and that it adds all of them or none."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agq.blockwise.journal.records import BlockRecord, this_worker
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.predict.spec import Session
from agq.errors import InputError
from agq.pipeline.cli import slurm as commands
from agq.pipeline.cli import watch
from agq.pipeline.folder import RunFolder
from agq.pipeline.slurm import check, client, jobs, missing
from agq.pipeline.slurm.client import QueueEntry, SlurmError
from agq.pipeline.status.monitor import load_status
from tests.helpers.runs import make_config

N_BLOCKS = 60


class Queue:
    """A stand-in for SLURM: jobs by id, as ``[role, count, state, reason]``."""

    def __init__(self) -> None:
        self.jobs: dict[int, list] = {}
        self.asked: list[str] = []
        self.refused = ""
        self.away = False
        self._ids = itertools.count(1)

    def submit(self, arguments) -> int:
        words = [str(word) for word in arguments]
        role = Path(words[-1]).stem
        if role == self.refused:
            raise SlurmError(f"sbatch: {role} is refused")
        array = next((w for w in words if w.startswith("--array=0-")), "--array=0-0")
        after = next((w.partition("=")[2] for w in words if "--dependency" in w), "")
        number = next(self._ids)
        count = int(array.partition("%")[0].rpartition("-")[2]) + 1
        self.jobs[number] = [role, count, "RUNNING", ""]
        self.asked.append(f"{role} {count} {after}".strip())
        return number

    def queue(self, ids, _users=()) -> list[QueueEntry]:
        self._answer()
        return [
            QueueEntry(n, tuple(range(count)) if role == "workers" else (), state, reason)
            for n, (role, count, state, reason) in self.jobs.items()
            if n in set(ids)
        ]

    def cancel(self, targets, *options) -> None:
        self._answer()
        for target in targets:
            number = int(target.partition("_")[0])
            if (
                "--state=PENDING" not in options
                or self.jobs.get(number, ["", 0, ""])[2] == "PENDING"
            ):
                self.jobs.pop(number, None)

    def _answer(self) -> None:
        if self.away:
            raise SlurmError("scancel: Unable to contact slurm controller")

    def roles(self) -> list[str]:
        return [role for role, *_ in self.jobs.values()]

    def drop(self, role: str) -> None:
        self.jobs = {n: job for n, job in self.jobs.items() if job[0] != role}

    def set(self, role: str, state: str, reason: str = "") -> None:
        for job in self.jobs.values():
            if job[0] == role:
                job[2:] = state, reason


@pytest.fixture
def slurm(monkeypatch) -> Queue:
    queue = Queue()
    for name in ("submit", "queue", "cancel"):
        monkeypatch.setattr(client, name, getattr(queue, name))
    monkeypatch.setattr(check, "read_cluster", lambda: check.Cluster({}, 1000, 30))
    monkeypatch.setattr(check, "check", lambda *_: [])
    monkeypatch.setattr(check, "short_limits", lambda *_: [])
    monkeypatch.setattr(check, "grace_s", lambda *_: 30)
    monkeypatch.setattr(missing, "_AGAIN_S", 0.0)
    return queue


@pytest.fixture
def submitted(tmp_path, slurm) -> Iterator[Path]:
    """The configuration of a run that has been submitted, all of it."""
    file = make_config(tmp_path, slurm={"workers": 3, "gpus": 0})
    commands.submit(file)
    assert slurm.asked == ["coordinator 1", "workers 3 after:1", "stitch 1 afterany:1"]
    slurm.asked.clear()
    return file


def end_prediction(run_dir: Path, blocks: int = N_BLOCKS, state: str = "done") -> None:
    journal = RunFolder(run_dir).journal("predict")
    with JournalWriter(journal, this_worker("w", "cpu")) as writer:
        writer.finish_many(BlockRecord(block=number, state="done") for number in range(blocks))
    RunFolder(run_dir).update_stage("predict", state=state, finished=time.time())


def end_stitch(run_dir: Path, state: str = "done") -> None:
    RunFolder(run_dir).update_stage("stitch", state=state, started=time.time())


def resume(run_dir: Path, slurm: Queue, **options) -> list[str]:
    """Return what a resumption submits."""
    slurm.asked.clear()
    commands.resume(run_dir, **{"stage": None, "workers": None, **options})
    return slurm.asked


def test_a_run_that_is_done_lacks_nothing(submitted, slurm, capsys):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir)
    end_stitch(run_dir)
    slurm.jobs.clear()
    assert resume(run_dir, slurm) == []
    assert "predict: done\nstitch: done" in capsys.readouterr().out
    assert resume(run_dir, slurm, stage="predict", workers=7) == []
    commands.submit(submitted, stage="predict")
    assert slurm.asked == []
    # Other settings: the stitch itself finds out what of it is there.
    commands.submit(submitted, settings=["stitch.across=0.6"])
    assert slurm.asked == ["stitch 1"]
    # It has not begun: what is there is of the settings before.
    slurm.jobs.clear()
    assert resume(run_dir, slurm) == ["stitch 1"]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_stitch_in_the_queue_goes_on(submitted, slurm, capsys, state):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir)
    slurm.drop("coordinator")
    slurm.drop("workers")
    slurm.set("stitch", state, "Resources" if state == "PENDING" else "")
    assert resume(run_dir, slurm) == []
    assert f"stitch: job 3 is in the queue ({state}) and goes on" in capsys.readouterr().out
    assert list(slurm.jobs) == [3]
    with pytest.raises(InputError, match=r"jobs in the queue \(3\)"):
        commands.submit(submitted)


def test_a_lost_stitch_is_submitted_alone_and_idle_workers_end(submitted, slurm):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir)
    end_stitch(run_dir, "stopped")
    slurm.drop("coordinator")
    slurm.drop("stitch")
    assert resume(run_dir, slurm) == ["stitch 1"]
    assert slurm.roles() == ["stitch"]


def test_workers_that_wait_for_a_coordinator_are_kept(submitted, slurm):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir, 20, "stopped")
    Session(id="x", host="h", port=1).save(run_dir)
    slurm.drop("coordinator")
    slurm.set("stitch", "PENDING", "DependencyNeverSatisfied")
    asked = resume(run_dir, slurm, workers=5)
    assert asked == ["coordinator 1", "workers 2 after:4", "stitch 1 afterany:4"]
    assert slurm.roles() == ["workers", "coordinator", "workers", "stitch"]
    assert jobs.load(run_dir).workers == 5


def test_workers_that_have_read_the_end_are_replaced(submitted, slurm):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir, 20, "stopped")
    Session(id="", state="closed").save(run_dir)
    slurm.drop("coordinator")
    slurm.drop("stitch")
    asked = resume(run_dir, slurm)
    assert asked == ["coordinator 1", "workers 3 after:4", "stitch 1 afterany:4"]
    assert slurm.roles() == ["coordinator", "workers", "stitch"]
    assert Session.load(run_dir) is None


def test_a_coordinator_alone_ends_a_prediction_without_blocks_left(submitted, slurm):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir, state="stopped")
    slurm.jobs.clear()
    assert resume(run_dir, slurm) == ["coordinator 1", "stitch 1 afterany:4"]
    slurm.jobs.clear()
    slurm.asked.clear()
    commands.submit(submitted)
    assert slurm.asked == ["coordinator 1", "stitch 1 afterany:6"]


def test_a_coordinator_in_the_queue_gets_what_it_lacks(submitted, slurm, capsys):
    run_dir = submitted.parent / "run"
    assert resume(run_dir, slurm) == []
    assert "coordinator: job 1 is in the queue (RUNNING)" in capsys.readouterr().out
    slurm.drop("stitch")
    assert resume(run_dir, slurm, stage="predict") == []
    assert resume(run_dir, slurm) == ["stitch 1 afterany:1"]
    slurm.set("stitch", "PENDING", "DependencyNeverSatisfied")
    assert resume(run_dir, slurm) == ["stitch 1 afterany:1"]
    assert slurm.roles().count("stitch") == 1
    assert resume(run_dir, slurm, workers=5) == ["workers 2 after:1"]
    slurm.drop("workers")
    assert resume(run_dir, slurm) == ["workers 5 after:1"]


def test_none_wanted_and_then_resumed(submitted, slurm):
    run_dir = submitted.parent / "run"
    commands.scale(run_dir, 0)
    slurm.drop("workers")
    assert resume(run_dir, slurm) == ["workers 3 after:1"]
    commands.scale(run_dir, 0)
    slurm.jobs.clear()
    asked = resume(run_dir, slurm)
    assert [words.partition(" after")[0] for words in asked] == [
        *("coordinator 1", "workers 3", "stitch 1")
    ]
    assert jobs.load(run_dir).workers == 3


def test_a_stitch_that_works_while_blocks_are_left(submitted, slurm):
    """As one with stitch.allow_missing: a prediction beside it would change what it reads."""
    run_dir = submitted.parent / "run"
    end_prediction(run_dir, 50, "failed")
    slurm.drop("coordinator")
    with pytest.raises(InputError, match=r"10 blocks of .*stitch is in the queue \(job 3, RUNNING"):
        resume(run_dir, slurm)
    assert 3 in slurm.jobs


def test_a_changed_mask_is_for_the_coordinator(submitted, slurm, monkeypatch):
    run_dir = submitted.parent / "run"
    end_prediction(run_dir)
    slurm.jobs.clear()
    monkeypatch.setattr(missing, "mask_changed", lambda prepared: prepared.raw is not None)
    slurm.asked.clear()
    commands.submit(submitted)
    assert slurm.asked == ["coordinator 1", "workers 3 after:4", "stitch 1 afterany:4"]


@pytest.mark.parametrize("refused", ["coordinator", "workers", "stitch"])
def test_a_submission_is_made_whole_or_not_at_all(tmp_path, slurm, refused):
    file, run_dir = make_config(tmp_path, slurm={"workers": 3, "gpus": 0}), tmp_path / "run"
    slurm.refused = refused
    with pytest.raises(SlurmError, match=f"{refused} is refused"):
        commands.submit(file)
    assert not slurm.jobs
    assert jobs.load(run_dir).jobs == []
    # The same where there is a record, with the end of an earlier submission.
    slurm.refused = ""
    commands.submit(file)
    slurm.jobs.clear()
    Session(id="", state="closed").save(run_dir)
    record = jobs.record_path(run_dir).read_bytes()
    slurm.refused = refused
    with pytest.raises(SlurmError, match=f"{refused} is refused"):
        commands.resume(run_dir, stage=None, workers=9)
    assert not slurm.jobs
    assert jobs.record_path(run_dir).read_bytes() == record
    assert Session.load(run_dir).state == "closed"


def test_jobs_that_cannot_be_cancelled_are_named(tmp_path, slurm, monkeypatch):
    file = make_config(tmp_path, slurm={"workers": 3, "gpus": 0})
    slurm.refused = "stitch"
    submit = slurm.submit

    def then_away(arguments):
        try:
            return submit(arguments)
        except SlurmError:
            slurm.away = True
            raise

    monkeypatch.setattr(client, "submit", then_away)
    with pytest.raises(
        SlurmError, match=r"stitch is refused.*jobs 1, 2 are in the queue.*scancel 1 2"
    ):
        commands.submit(file)
    assert jobs.load(tmp_path / "run").ids() == [1, 2]


def test_a_cancel_that_fails_changes_nothing(submitted, slurm, monkeypatch):
    run_dir = submitted.parent / "run"
    record = jobs.record_path(run_dir).read_bytes()
    slurm.away = True
    with pytest.raises(SlurmError, match="Unable to contact"):
        commands.cancel(run_dir, wait=0)
    assert jobs.record_path(run_dir).read_bytes() == record
    # It goes away between the question and the request.
    slurm.away = False

    def refuse(*_) -> None:
        raise SlurmError("scancel: refused")

    monkeypatch.setattr(client, "cancel", refuse)
    with pytest.raises(SlurmError, match="refused"):
        commands.cancel(run_dir, wait=0)
    assert jobs.record_path(run_dir).read_bytes() == record


@pytest.mark.parametrize(
    ("wanted", "alive", "limit", "lacking"),
    [(10, 4, None, 6), (2, 4, None, 0), (10, 0, 3, 10), (10, 4, 3, 0), (10, 2, 3, 1)],
)
def test_beside_other_jobs_no_more_are_submitted_than_may_run(wanted, alive, limit, lacking):
    assert jobs.lacking(wanted, alive, limit) == lacking


def elsewhere(run_dir: Path) -> tuple[str, str, str | None]:
    """State of the run, what is said of its stitch, and the note, where there is no squeue."""
    status = load_status(run_dir, queue=lambda _: None)
    stitch = next(stage for stage in status.stages if stage.name == "stitch")
    return status.state, stitch.error or stitch.state, status.note


def test_a_lost_stitch_is_recorded_by_whoever_sees_it(submitted, slurm, monkeypatch):
    run_dir = submitted.parent / "run"
    monkeypatch.setattr(jobs, "_AGAIN_S", 0.0)
    end_prediction(run_dir)
    slurm.drop("coordinator")
    slurm.drop("workers")
    slurm.set("stitch", "PENDING")
    watch._status_of(run_dir)
    state, stitch, note = elsewhere(run_dir)
    assert (state, stitch) == ("waiting", "waiting")
    assert "on the cluster" in note
    slurm.drop("stitch")
    slurm.away = True
    watch._status_of(run_dir)
    assert elsewhere(run_dir)[0] == "waiting"
    slurm.away = False
    said = watch._status_of(run_dir).stages[1].error
    assert "not in the queue any more" in said
    assert elsewhere(run_dir) == ("stopped", said, None)
    assert resume(run_dir, slurm) == ["stitch 1"]
    assert elsewhere(run_dir)[0] == "waiting"


def test_stages_that_were_cancelled_before_they_began_say_so(submitted, slurm):
    run_dir = submitted.parent / "run"
    for role in ("coordinator", "workers", "stitch"):
        slurm.set(role, "PENDING")
    jobs.cancel(run_dir, wait_s=0)
    assert elsewhere(run_dir) == (
        "stopped",
        "agq cancel has ended its job; agq resume goes on",
        None,
    )
