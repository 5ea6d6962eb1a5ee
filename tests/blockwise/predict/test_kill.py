"""Runs that are killed anywhere end with the bytes of an undisturbed run. Real processes only."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict import local_processes
from agq.blockwise.predict.coordinator import PredictSpec, run_predict
from tests.helpers.predict_runs import (
    ROOT,
    make_grid,
    make_run,
    outputs,
    raw_volume,
    start_coordinator,
)

N = make_grid().n_blocks
SLOW = {"delay_s": 0.05}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    spec = make_run(tmp_path_factory.mktemp("undisturbed"), raw_volume())
    assert run_predict(spec, np.arange(N)).done == N
    return outputs(spec)


def journal(spec: PredictSpec) -> Journal:
    return Journal(Path(spec.run_dir) / "journal" / "predict")


def wait_for(condition, seconds: float = 120.0, every: float = 0.02):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(every)
    return result


def ended(spec: PredictSpec) -> int:
    return int(journal(spec).done(N).sum())


def processes_of(spec: PredictSpec, module: str = "agq.blockwise.") -> list[psutil.Process]:
    """Living processes of a run, however they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if alive and spec.run_dir in line and any(part.startswith(module) for part in line):
            found.append(process)
    return found


def finish(folder: Path, spec: PredictSpec) -> None:
    """Resume and let it end."""
    coordinator = start_coordinator(folder, spec)
    out, err = coordinator.communicate(timeout=180)
    assert coordinator.returncode == 0, err
    assert out.strip().endswith("()"), out


def kill_group(coordinator: subprocess.Popen[str]) -> None:
    os.killpg(coordinator.pid, signal.SIGKILL)
    coordinator.communicate(timeout=20)


def check_worker_kills(tmp_path, undisturbed, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    # Without retries, what one killed worker held is done by the session that is *alone*.
    retries = 0 if kills == 1 else kills
    spec = make_run(tmp_path, raw_volume(), options={"delay_s": 0.2}, workers=2, retries=retries)
    coordinator = start_coordinator(tmp_path, spec)
    killed = 0
    while killed < kills and ended(spec) < N - 4:
        before = ended(spec)
        wait_for(lambda n=before: ended(spec) > n)
        time.sleep(rng.random() * 0.4)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            rng.choice(processes_of(spec, "agq.blockwise.predict.worker")).kill()
            killed += 1
    out, err = coordinator.communicate(timeout=180)
    assert coordinator.returncode == 0, err
    assert out.split() == [str(N), "()"]
    assert killed > 0
    assert sum(worker.exit is None for worker in journal(spec).workers.values()) <= killed
    assert outputs(spec) == undisturbed
    assert journal(spec).conflicts == []


def check_group_kills(tmp_path, undisturbed, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    spec = make_run(tmp_path, raw_volume(), options=SLOW, workers=2)
    for _ in range(kills):
        before = ended(spec)
        if before == N:
            break
        coordinator = start_coordinator(tmp_path, spec)
        # At a random moment of the start-up, or of the work on any block after the first.
        if rng.random() < 0.8:
            wait_for(lambda n=before: ended(spec) > n)
        time.sleep(rng.random() * 0.4)
        kill_group(coordinator)
        assert outputs(spec).items() <= undisturbed.items()
    finish(tmp_path, spec)
    assert outputs(spec) == undisturbed
    assert journal(spec).conflicts == []


def test_killed_workers_are_replaced(tmp_path, undisturbed):
    check_worker_kills(tmp_path, undisturbed, seed=0, kills=1)


@pytest.mark.slow
def test_a_frozen_worker_is_replaced(tmp_path, undisturbed, monkeypatch):
    """Without another worker, nobody would take its block when it times out."""
    spec = make_run(tmp_path, raw_volume(), options={"delay_s": 0.2}, workers=1)

    def freeze() -> None:
        wait_for(lambda: ended(spec) > 0)
        (worker,) = processes_of(spec, "agq.blockwise.predict.worker")
        worker.suspend()
        monkeypatch.setattr(local_processes, "SILENT_S", 0.5)
        wait_for(lambda: not worker.is_running())
        monkeypatch.setattr(local_processes, "SILENT_S", 300.0)

    with ThreadPoolExecutor(1) as pool:
        frozen = pool.submit(freeze)
        report = run_predict(spec, np.arange(N))
        frozen.result()
    assert (report.done, report.workers_lost) == (N, 1)
    assert outputs(spec) == undisturbed


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, undisturbed):
    check_group_kills(tmp_path, undisturbed, seed=0, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_killed_workers(tmp_path, undisturbed, seed):
    check_worker_kills(tmp_path, undisturbed, seed, kills=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_killed_runs(tmp_path, undisturbed, seed):
    check_group_kills(tmp_path, undisturbed, seed, kills=6)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGKILL, signal.SIGINT)),
    ],
)
def test_nothing_outlives_the_coordinator(tmp_path, undisturbed, number):
    spec = make_run(tmp_path, raw_volume(), options={"delay_s": 0.3}, workers=2)
    coordinator = start_coordinator(tmp_path, spec)
    wait_for(lambda: ended(spec) > 0)
    assert len(processes_of(spec)) == 3
    sent = time.monotonic()
    os.kill(coordinator.pid, number)
    coordinator.communicate(timeout=30)
    wait_for(lambda: not processes_of(spec), seconds=10)
    assert time.monotonic() - sent < 10
    assert coordinator.returncode != 0
    assert 0 < ended(spec) < N
    assert outputs(spec).items() <= undisturbed.items()
    if number != signal.SIGKILL:
        reasons = {worker.exit for worker in journal(spec).workers.values()}
        assert reasons <= {"end", "terminated"}
    finish(tmp_path, spec.model_copy(update={"options": {}}))
    assert outputs(spec) == undisturbed


def test_a_killed_dispatcher_is_replaced(tmp_path, undisturbed):
    spec = make_run(tmp_path, raw_volume(), options=SLOW)
    coordinator = start_coordinator(tmp_path, spec)
    wait_for(lambda: ended(spec) > 0)
    (dispatcher,) = processes_of(spec, "agq.blockwise.predict.dispatcher")
    dispatcher.kill()
    out, err = coordinator.communicate(timeout=180)
    assert out.split() == [str(N), "()"], err
    assert outputs(spec) == undisturbed
    assert len(journal(spec).workers) == 1, "the worker should have stayed"


def test_workers_join_late_and_leave_by_themselves(tmp_path, undisturbed):
    spec = make_run(tmp_path, raw_volume(), workers=0)
    coordinator = start_coordinator(tmp_path, spec)
    wait_for(lambda: (Path(spec.run_dir) / "session.json").exists())
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "agq.blockwise.predict.worker", spec.run_dir, "--wait", "30"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    out, err = coordinator.communicate(timeout=180)
    assert out.split() == [str(N), "()"], err
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    assert outputs(spec) == undisturbed
    late = subprocess.run(
        [sys.executable, "-m", "agq.blockwise.predict.worker", spec.run_dir, "--wait", "0.5"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    assert late.returncode == 0


@pytest.mark.slow
def test_a_frozen_worker_loses_its_blocks_and_harms_nothing(tmp_path, undisturbed):
    spec = make_run(tmp_path, raw_volume(), options=SLOW, workers=2, timeout_s=3)
    coordinator = start_coordinator(tmp_path, spec)
    wait_for(lambda: ended(spec) > 0)
    frozen = processes_of(spec, "agq.blockwise.predict.worker")[0]
    frozen.suspend()
    wait_for(lambda: ended(spec) == N)
    frozen.resume()
    out, err = coordinator.communicate(timeout=180)
    assert out.split() == [str(N), "()"], err
    assert outputs(spec) == undisturbed
    assert journal(spec).conflicts == []


@pytest.mark.parametrize("fate", ["renamed", "deleted"])
def test_a_run_folder_that_goes_away_is_not_made_anew(tmp_path, undisturbed, fate):
    spec = make_run(tmp_path, raw_volume(), options=SLOW, workers=2)
    run, away = Path(spec.run_dir), tmp_path / "away"
    coordinator = start_coordinator(tmp_path, spec)
    wait_for(lambda: ended(spec) > 3)
    run.rename(away)
    if fate == "deleted":
        shutil.rmtree(away, ignore_errors=True)
    _, err = coordinator.communicate(timeout=60)
    assert coordinator.returncode != 0
    assert f"{run} is gone" in err.strip().splitlines()[-1]
    wait_for(lambda: not processes_of(spec))
    assert not run.exists()
    late = subprocess.run(
        [sys.executable, "-m", "agq.blockwise.predict.worker", spec.run_dir, "--wait", "0.5"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert late.returncode != 0
    assert "is missing" in late.stderr
    assert not run.exists()
    if fate == "renamed":
        moved = spec.model_copy(update={"run_dir": str(away)})
        todo = (~journal(moved).done(N)).nonzero()[0]
        assert 0 < todo.size < N
        run_predict(moved, todo)
        assert outputs(moved) == undisturbed
