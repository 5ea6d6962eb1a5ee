"""Workers that join a prediction by `agq worker`, in real processes."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict.spec import Session
from agq.errors import InputError, RunStoppedError
from agq.pipeline.config.schema import load_config
from agq.pipeline.folder import RunFolder
from agq.pipeline.run import stages
from agq.pipeline.run.prepare import prepare
from agq.pipeline.slurm.join import join
from tests.helpers.runs import FAKE, agq, command, environment, make_config, results

HERE = {"count": 0, "host": "127.0.0.1"}


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def blocks_of(run_dir: Path) -> dict[str, int]:
    """Return how many blocks each worker has done."""
    journal = Journal(run_dir / "journal" / "predict")
    journal.refresh()
    return {w.info.name: w.done for w in journal.workers.values() if w.done}


@pytest.mark.slow
def test_workers_that_join_make_the_same_bytes_though_one_is_killed(tmp_path):
    model = {**FAKE, "options": {"delay_s": 0.2}}
    run_dir = tmp_path / "run"
    alone = make_config(tmp_path, model=model, run_dir=str(tmp_path / "alone"))
    assert agq("predict", alone).returncode == 0
    file = make_config(tmp_path, model=model, workers=HERE)
    coordinator = start("predict", file)
    deadline = time.monotonic() + 60
    while not (run_dir / "session.json").exists():
        assert time.monotonic() < deadline
        assert coordinator.poll() is None, coordinator.stdout.read()
        time.sleep(0.05)
    assert Session.load(run_dir).token, "nobody joins without the token"
    workers = [start("worker", run_dir, "--grace-s", "45") for _ in range(2)]
    while len(blocks_of(run_dir)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers[0].kill()
    output = [process.communicate(timeout=120)[0] for process in (coordinator, *workers)]
    codes = [process.returncode for process in (coordinator, *workers)]
    assert codes == [0, -signal.SIGKILL, 0], output
    assert len(blocks_of(run_dir)) == 2
    assert not (run_dir / "slurm").exists()
    assert results(run_dir) == results(tmp_path / "alone")
    # It has ended: the next one has nothing to do.
    done = agq("worker", run_dir)
    assert done.returncode == 0
    assert "is done: there is nothing to do" in done.stderr


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that was begun and not ended."""
    folder = RunFolder(tmp_path / "run")
    prepared = prepare(load_config(make_config(tmp_path)))
    folder.create({}, prepared.identity)
    return folder


def test_what_keeps_a_worker_from_joining(tmp_path, run):
    with pytest.raises(InputError, match=r"other is not there \(waited 0 s\)"):
        join(tmp_path / "other", 1, wait_s=0, grace_s=0)
    with pytest.raises(InputError, match="is not a run folder"):
        join(tmp_path, 1, wait_s=60, grace_s=0)
    with pytest.raises(RunStoppedError, match=r"no coordinator .* --set workers\.host="):
        join(run.path, 1, wait_s=0, grace_s=0)
    Session(id="", state="closed").save(run.path)
    with pytest.raises(RunStoppedError, match="no coordinator"):
        join(run.path, 1, wait_s=0, grace_s=0)
    Session(id="a", host="127.0.0.1", port=1, machine="elsewhere").save(run.path)
    with pytest.raises(InputError, match=r"which is elsewhere, not .*workers\.host=ADDRESS"):
        join(run.path, 1, wait_s=0, grace_s=0)
    Session(id="a", host="127.0.0.1", port=1, machine=socket.gethostname()).save(run.path)
    with pytest.raises(InputError, match=r"predict\.json is missing"):
        join(run.path, 1, wait_s=0, grace_s=0)
    # A coordinator that was killed after the end leaves its session open.
    run.update_stage("predict", state="done")
    assert join(run.path, 1, wait_s=0, grace_s=0) == 0


def test_a_worker_may_start_before_its_run(tmp_path, run):
    away = run.path.rename(tmp_path / "away")
    waiting = start("worker", run.path, "--wait-s", "60")
    assert "run is not there yet: waiting for it, at most 60 s" in waiting.stdout.readline()
    RunFolder(away).update_stage("predict", state="done")
    away.rename(run.path)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, output
    assert "is done: there is nothing to do" in output


def test_files_of_a_stranger_are_not_run(run):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    Session(id="a", host="127.0.0.1", port=1, token="t").save(run.path)
    os.chown(run.path / "session.json", 54321, 54321)
    with pytest.raises(InputError, match=r"belongs to uid 54321.*AGQ_TRUSTED_USERS"):
        join(run.path, 1, wait_s=0, grace_s=0)


def test_it_waits_for_its_coordinator(run):
    began = time.monotonic()
    with pytest.raises(RunStoppedError, match=r"waited 0\.3 s"):
        join(run.path, 1, wait_s=0.3, grace_s=0)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("192.0.2.7", "is no address of this machine"),
        ("no.such.host.invalid", "is no address of this machine"),
    ],
)
def test_addresses_at_which_no_worker_can_join(tmp_path, host, words):
    config = load_config(make_config(tmp_path, workers={"count": 0, "host": host}))
    with pytest.raises(InputError, match=words) as raised:
        stages._others(prepare(config))
    assert f"workers.host: {host!r}" in str(raised.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0", ""])
def test_an_address_to_connect_to_is_one(tmp_path, host):
    with pytest.raises(InputError, match=r"workers\.host: stands for all networks of a machine"):
        load_config(make_config(tmp_path, workers={"count": 0, "host": host}))


def test_none_of_its_own_workers_needs_others(tmp_path):
    with pytest.raises(InputError, match=r"workers\.count: 0 needs workers\.host"):
        load_config(make_config(tmp_path, workers={"count": 0}))
    one = make_config(tmp_path, workers={"count": 1, "host": "127.0.0.1"})
    assert stages._others(prepare(load_config(one))).workers == 1
