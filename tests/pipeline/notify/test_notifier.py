"""Messages of a run: each event once in an attempt, and never at the cost of the run."""

import contextlib
import json
import shutil
import stat
import sys
import threading
import time

import pytest

import agq
from agq.blockwise.predict.local_processes import CANCELLED
from agq.errors import InputError
from agq.pipeline.api import BlocksFailedError, Run
from agq.pipeline.config.schema import load_config
from agq.pipeline.folder import RunFolder
from agq.pipeline.notify import deliver as delivering
from agq.pipeline.notify.kept import begin_attempt
from agq.pipeline.notify.notifier import Notifier
from agq.pipeline.notify.settings import NotifySettings
from agq.pipeline.slurm import coordinator, jobs, stitch
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.notices import read_notices
from tests.helpers import fakes
from tests.helpers.runs import blobs, make_config
from tests.pipeline.notify.conftest import PATH


def told(run_dir):
    return [(n.event, n.way, n.problem) for n in load_status(run_dir).notices]


@pytest.fixture
def run_dir(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock():
        run.create({"run_dir": str(run.path), "input": {"raw": {"path": "x.zarr"}}}, {"grid": {}})
    run.update_stage("predict", state="running", blocks_total=9)
    return run.path


def test_a_run_tells_of_its_end_and_its_failure(tmp_path, monkeypatch, hook):
    monkeypatch.setenv("AGQ_TEST_HOOK", hook.address)
    said = tmp_path / "said"
    command = [sys.executable, "-c", f"open({str(said)!r}, 'a').write(input() + '\\n')"]
    notify = {"webhook": "${AGQ_TEST_HOOK}", "command": command}
    data = blobs((9, 17, 33))
    data[4, 8, 8] = fakes.RAISE
    faults = {"factory": "tests.helpers.fakes:threshold", "options": {"marks": True}}
    workers = {"count": 1, "retries": 0}
    config = make_config(tmp_path, data, notify=notify, model=faults, workers=workers)
    run_dir = tmp_path / "run"
    with pytest.raises(BlocksFailedError):
        Run(load_config(config)).run()
    ways = ("command", "webhook")
    assert told(run_dir) == [("failure", way, None) for way in ways]
    # The next command is another attempt.
    Run(load_config(config, ["stitch.allow_missing=true"])).run()
    assert told(run_dir) == [("end", way, None) for way in ways]
    assert hook.events() == ["failure", "end"]
    assert [json.loads(line) for line in said.read_text().splitlines()] == [
        message for _, message, _ in hook.heard
    ]
    failure, end = (message for _, message, _ in hook.heard)
    assert failure["stage"] == "predict"
    # The marked voxel is in the window of four blocks.
    assert failure["blocks_failed"] == 4
    assert failure["blocks_done"] == failure["blocks_total"] - 4
    assert "4 blocks of" in failure["reason"]
    assert (end["stage"], end["reason"]) == ("stitch", None)
    assert end["way_on"] == f"agq view {run_dir}"
    assert end["id"] == RunFolder(run_dir).record()["id"]
    assert end["key"] != failure["key"]
    # The address is in no file but its own, which only its owner can read.
    assert hook.address not in repr(load_config(config))
    kept = run_dir / "notify" / "webhook"
    assert kept.read_text() == hook.address
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    others = (file for file in run_dir.rglob("*") if file.is_file() and file != kept)
    assert not [file for file in others if PATH.encode() in file.read_bytes()]
    # A command on the folder tells, too: the record names the file.
    agq.Run(run_dir).stitch()
    assert hook.events() == ["failure", "end", "end"]


def test_an_event_is_told_once_though_processes_come_again(run_dir, hook):
    settings = NotifySettings(webhook=hook.address)
    threads = [
        threading.Thread(target=Notifier(run_dir, settings).tell, args=("failure", f"{n}"))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hook.events() == ["failure"]
    Notifier(run_dir, settings).tell("end")
    assert hook.events() == ["failure", "end"]
    begin_attempt(run_dir)
    Notifier(run_dir, settings).tell("failure")
    assert hook.events() == ["failure", "end", "failure"]
    assert len({message["key"] for _, message, _ in hook.heard}) == 3


def test_who_is_killed_before_it_can_record_is_told_of_twice_with_one_key(
    run_dir, hook, monkeypatch
):
    def send_and_die(*arguments):
        delivering.deliver(*arguments)
        raise KeyboardInterrupt

    settings = NotifySettings(webhook=hook.address)
    with monkeypatch.context() as patched:
        patched.setattr("agq.pipeline.notify.notifier.deliver", send_and_die)
        with pytest.raises(KeyboardInterrupt):
            Notifier(run_dir, settings).tell("end")
    Notifier(run_dir, settings).tell("end")
    assert hook.events() == ["end", "end"]
    assert len({message["key"] for _, message, _ in hook.heard}) == 1


def test_a_way_that_failed_is_tried_again_by_the_next_process_and_no_other(
    run_dir, hook, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(delivering, "_PAUSE_S", 0.01)
    said = tmp_path / "said"
    command = (sys.executable, "-c", f"open({str(said)!r}, 'a').write('x')")
    settings = NotifySettings(webhook=hook.address, command=command)
    hook.answer = 500
    Notifier(run_dir, settings).tell("end")
    problem = f"{hook.url.partition('//')[2]}: answered with status 500"
    assert told(run_dir) == [("end", "command", None), ("end", "webhook", problem)]
    assert caplog.messages == [f"notify: end not told by the webhook: {problem}"]
    hook.answer = 200
    Notifier(run_dir, settings).tell("end")
    assert told(run_dir) == [("end", "command", None), ("end", "webhook", None)]
    assert said.read_text() == "x"


def test_nothing_that_goes_wrong_is_an_error_of_the_run(run_dir, hook, caplog, monkeypatch):
    settings = NotifySettings(webhook=hook.address)
    (run_dir / "notify").write_text("in the way of its folder")
    Notifier(run_dir, settings).tell("end")  # as on a full disk: told all the same
    assert hook.events() == ["end"]
    (run_dir / "notify").unlink()
    (run_dir / "run.json").write_text("{")
    Notifier(run_dir, settings).tell("failure", "no record")
    assert hook.heard[-1][1]["reason"] == "no record"
    shutil.rmtree(run_dir)
    monkeypatch.setattr("agq.pipeline.notify.notifier.compose", lambda *_: 1 / 0)
    assert Notifier(run_dir, settings).tell("end") == []
    assert not run_dir.exists()
    assert caplog.messages == ["notify: end: ZeroDivisionError: division by zero"]


def test_a_run_that_stands_still_tells_so_once(run_dir, hook):
    settings = NotifySettings(webhook=hook.address, stall_minutes=1 / 60)
    with Notifier(run_dir, settings) as notifier:
        for step in range(10):
            notifier.moved("predict", step)
            time.sleep(0.2)
        assert hook.events() == []
        for _ in range(10):
            notifier.moved("predict", 9)
            time.sleep(0.2)
        hook.wait_for("stall")
    # Requeued: the next process starts from nothing, and tells nothing again.
    with Notifier(run_dir, settings):
        time.sleep(1.5)
    assert hook.events() == ["stall"]
    assert "no block has been done for" in hook.heard[0][1]["reason"]
    assert hook.heard[0][1]["stage"] == "predict"


def test_a_webhook_that_hangs_holds_up_the_end_for_its_tries_alone(run_dir, hook):
    hook.answer = "hang"
    settings = NotifySettings(webhook=hook.address, timeout_s=0.5, stall_minutes=1 / 600)
    began = time.monotonic()
    with Notifier(run_dir, settings) as notifier:
        time.sleep(0.2)
        notifier.tell("end")
    assert time.monotonic() - began < 15


def test_events_are_chosen(run_dir, hook):
    settings = NotifySettings(webhook=hook.address, events=["failure"], stall_minutes=1 / 6000)
    with Notifier(run_dir, settings) as notifier:
        time.sleep(0.1)
        notifier.tell("end")
        notifier.tell("failure")
    assert hook.events() == ["failure"]
    assert read_notices(run_dir).notices[0].event == "failure"


@pytest.fixture
def submitted(tmp_path, hook):
    """A run with jobs, whose configuration they read."""

    def make(requeue: bool = True, cancelled: bool = False, roles=("coordinator", "stitch")):
        notify = {"webhook": hook.address}
        config = load_config(make_config(tmp_path, notify=notify, slurm={"requeue": requeue}))
        run_dir = tmp_path / "run"
        (run_dir / "slurm").mkdir(parents=True)
        jobs.save_config(config)
        entries = [jobs.Job(id=n, role=role, submitted=1.0) for n, role in enumerate(roles)]
        record = jobs.Jobs(here="/", grace_s=30, workers=1, cancelled=cancelled, jobs=entries)
        jobs.save(run_dir, record)
        return run_dir

    return make


@pytest.mark.parametrize(
    ("program", "work"), [(coordinator, "_predict"), (stitch, "_stitch")], ids=["predict", "stitch"]
)
@pytest.mark.parametrize(
    ("fault", "state", "events"),
    [
        (InputError("no input"), {}, ["failure"]),
        (ZeroDivisionError("x"), {}, ["failure"]),
        # It comes again, or nobody wants it.
        (SystemExit(75), {}, []),
        (SystemExit(143), {"cancelled": True}, []),
        (SystemExit(75), {"requeue": False}, ["failure"]),
        (SystemExit(f"its batch job was {CANCELLED} (SIGTERM)"), {}, ["failure"]),
    ],
    ids=str,
)
def test_what_jobs_tell(submitted, hook, monkeypatch, program, work, fault, state, events):
    def fail(*_):
        raise fault

    monkeypatch.setattr(program, work, fail)
    monkeypatch.setattr(program, "cap_output", lambda: None)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    run_dir = submitted(roles=("stitch", "coordinator"), **state)
    assert hook.address not in (run_dir / "slurm" / "config.json").read_text()
    for _ in range(2):
        with contextlib.suppress(SystemExit, ZeroDivisionError):
            program.main([str(run_dir)])
    assert hook.events() == events


@pytest.mark.parametrize(
    ("roles", "failed", "gone", "events"),
    [
        (("coordinator", "workers", "stitch"), (), False, []),
        (("coordinator", "workers", "stitch"), (), True, ["failure"]),
        (("coordinator", "workers"), (), True, ["end"]),
        (("coordinator", "stitch", "coordinator"), (), False, ["end"]),
        (("coordinator", "workers", "stitch"), (7,), False, ["failure"]),
    ],
)
def test_a_coordinator_leaves_the_end_to_the_stitch(submitted, hook, roles, failed, gone, events):
    run_dir = submitted(roles=roles)
    run = RunFolder(run_dir)
    with run.lock():
        run.create({"run_dir": str(run_dir)}, {"grid": {}})
    run.update_stage("stitch", state="stopped" if gone else "waiting", finished=2.0)
    coordinator._tell_of_end(run_dir, coordinator.notifier_of(run_dir), failed)
    assert hook.events() == events


def test_the_command_tells_what_nobody_lived_to_tell(run_dir, tmp_path, hook, main, monkeypatch):
    monkeypatch.setenv("AGQ_TEST_HOOK", hook.address)
    config = make_config(tmp_path, notify={"webhook": "${AGQ_TEST_HOOK}"})
    code, said, _ = main("notify", config, "--test")
    assert (code, said) == (0, "webhook: told test\n")
    run = RunFolder(run_dir)
    for state, event in (("done", "end"), ("running", "failure")):
        run.update_stage("predict", state=state)
        assert main("notify", config)[:2] == (0, f"webhook: told {event}\n")
        assert "was told" in main("notify", config)[1]
    assert hook.events() == ["test", "end", "failure"]
    hook.answer = 404
    code, _, error = main("notify", config, "--test")
    assert code == 1
    assert error.endswith("answered with status 404\n")
    refused = main("notify", make_config(tmp_path, notify={"events": ["end"]}), "--test")
    assert refused[0] == 2
    assert "neither a command nor a webhook" in refused[2]
