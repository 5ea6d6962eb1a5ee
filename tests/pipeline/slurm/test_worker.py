"""The program of a worker job, with real workers that it starts."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from agq.blockwise.predict import local_processes
from agq.blockwise.predict.spec import Session
from agq.pipeline.slurm import worker as program
from tests.helpers.predict_runs import make_run, raw_volume


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)


class Job:
    """A host of one worker in a thread, as in a job without a time limit."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.place = program.Place("job_0", None)
        self.host = program.Host(run_dir, wait_s=600, term_s=0, usr1_s=0)
        self.host.places = [self.place]
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.status = self.host.run()

    @property
    def worker(self) -> psutil.Process:
        """The worker process once it has loaded all."""
        wait_for(lambda: (worker := self.place.process) is not None and worker.token is not None)
        return psutil.Process(self.place.process.process.pid)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Waits for the next coordinator: the last one has gone, and its session is open."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.sys.path))
    monkeypatch.setattr(program, "_END_S", 0.5)
    monkeypatch.setattr(program, "_LOOK_S", 0.1)
    spec = make_run(tmp_path, raw_volume())
    spec.save()
    Session(id="a", host="127.0.0.1", port=1).save(spec.run_dir)
    job = Job(Path(spec.run_dir))
    try:
        yield job
    finally:
        job.host.kill_at = time.monotonic()
        job.host.signals.append(signal.SIGTERM)
        job.thread.join(60)
        assert not job.thread.is_alive()


@pytest.mark.parametrize("end", ["closed", pytest.param("gone", marks=pytest.mark.slow)])
def test_a_frozen_worker_does_not_outlive_the_run(job, end):
    worker = job.worker
    worker.suspend()
    if end == "closed":
        Session(id="", state="closed").save(job.run_dir)
    else:
        shutil.rmtree(job.run_dir)
    wait_for(lambda: not job.thread.is_alive())
    assert job.status == 0
    assert not worker.is_running()


@pytest.mark.slow
def test_a_frozen_worker_is_replaced_while_the_run_goes_on(job, monkeypatch):
    worker = job.worker
    worker.suspend()
    monkeypatch.setattr(local_processes, "SILENT_S", 0.3)
    wait_for(lambda: not worker.is_running())
    monkeypatch.setattr(local_processes, "SILENT_S", 300.0)
    assert job.worker != worker
    assert job.status is None


@pytest.mark.slow
def test_a_worker_that_cannot_be_killed_does_not_hold_the_job(job, monkeypatch):
    """As one in a call of the kernel to a disk that hangs."""
    job.worker.suspend()
    worker = job.place.process
    with monkeypatch.context() as patch:
        patch.setattr(local_processes.LocalWorker, "kill", lambda _: None)
        Session(id="", state="closed").save(job.run_dir)
        wait_for(lambda: not job.thread.is_alive())
    assert job.status == 1
    worker.kill()
    worker.close()


@pytest.mark.parametrize(
    ("restarts", "ready", "status"), [("0", False, 75), ("1", False, 1), ("1", True, 75)]
)
def test_a_time_limit_before_the_predictor_is_loaded(
    tmp_path, monkeypatch, restarts, ready, status
):
    """Requeued once, as the disk may have been slow; then it would never end."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    (tmp_path / "slurm").mkdir()
    host = program.Host(tmp_path, wait_s=600, term_s=0, usr1_s=0, ends=tmp_path / "slurm" / "ends")
    host.places = [program.Place("7_0", None, started=1.0, ready=ready, result=0)]
    host.signals.append(signal.SIGUSR1)
    assert host.run() == status
    ends = list((tmp_path / "slurm" / "ends").glob("*.json"))
    assert len(ends) == (status == 1)
    if ends:
        assert "before the predictor is loaded" in ends[0].read_text()
