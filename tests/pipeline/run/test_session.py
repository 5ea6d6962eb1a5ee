"""What the record says of a stage after it ended one way and was run again."""

import io
import signal
import uuid
from datetime import datetime, timedelta

import pytest
from pydantic import SecretStr
from rich.console import Console

from agq.blockwise.journal.records import BlockRecord
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.ledger.database import connect
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict import local_processes
from agq.blockwise.predict.local_processes import Terminated
from agq.pipeline.config.schema import load_config
from agq.pipeline.run.prepare import prepare
from agq.pipeline.run.session import feeder_of, open_session
from agq.pipeline.run.stages import predict
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.text import render
from tests.helpers.ledgers import WORKER
from tests.helpers.runs import make_config


@pytest.fixture
def prepared(tmp_path):
    roi = {"units": "voxels", "offset": [0, 0, 0], "shape": [7, 15, 15]}
    return prepare(load_config(make_config(tmp_path, input={"roi": roi}, workers={"count": 1})))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted (Ctrl-C)"),
        (Terminated(signal.SIGTERM), "told to end (SIGTERM)"),
        (Terminated(signal.SIGUSR1, 75, "requeued"), "requeued"),
        (OSError(28, "full", "x"), "OSError: [Errno 28] full: 'x'"),
    ],
)
def test_why_a_stage_stopped_is_said_until_it_is_done(prepared, error, said):
    with open_session(prepared, on_progress=None) as session:

        def end(error):
            with session.stage("stitch", 1):
                if error is not None:
                    raise error

        with pytest.raises(type(error)):
            end(error)
        record = prepared.run.record()["stages"]["stitch"]
        assert (record["state"], record["error"]) == ("stopped", said)
        end(None)
    record = prepared.run.record()["stages"]["stitch"]
    assert (record["state"], record["error"]) == ("done", None)


# Words for times: the names of tests must be the same in all processes.
LATER, EARLIER = "LATER", "EARLIER"
SLURM_SAYS = "slurmstepd-n1: error: *** JOB {} ON n1 CANCELLED AT {}{} ***\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (SLURM_SAYS.format(7, LATER, ""), "cancelled (scancel)"),
        (SLURM_SAYS.format(7, LATER, " DUE TO PREEMPTION"), "pre-empted"),
        (SLURM_SAYS.format(7, LATER, " DUE TO JOB REQUEUE") + "more\n", "requeued"),
        (SLURM_SAYS.format(7, LATER, " DUE TO TIME LIMIT"), "ended at its time limit"),
        (SLURM_SAYS.format(7, LATER, " DUE TO SOMETHING NEW"), "ended (something new)"),
        (SLURM_SAYS.format("7.batch", LATER, " DUE TO PREEMPTION"), "pre-empted"),
        # An earlier run of the job, another job, and a time that cannot be read.
        (SLURM_SAYS.format(7, EARLIER, " DUE TO PREEMPTION"), "told to end"),
        (SLURM_SAYS.format(77, LATER, " DUE TO PREEMPTION"), "told to end"),
        (SLURM_SAYS.format(7, "noon", " DUE TO PREEMPTION"), "told to end"),
        ("", "told to end"),
        (None, "pre-empted, requeued or cancelled"),
    ],
)
def test_what_slurm_has_done_to_a_job_is_called_that(monkeypatch, output, said):
    for word, hours in ((LATER, 1), (EARLIER, -1)):
        at = (datetime.now() + timedelta(hours=hours)).isoformat(timespec="seconds")
        output = output and output.replace(word, at)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(local_processes, "own_output_end", lambda _size: output)
    assert str(Terminated(signal.SIGTERM)) == f"its batch job was {said} (SIGTERM)"
    assert str(Terminated(signal.SIGUSR1, 75, "requeued")) == "requeued"


def test_the_report_outlives_a_command_that_had_nothing_to_do(prepared):
    with open_session(prepared, on_progress=None) as session:
        first = predict(session)
        assert first.done
        assert predict(session).blocks == 0
    assert prepared.run.record()["stages"]["predict"]["report"] == first.to_dict()


def test_a_stitch_shows_how_far_it_is_from_its_first_step(prepared):
    def stage():
        return next(s for s in load_status(prepared.run.path).stages if s.name == "stitch")

    with open_session(prepared, on_progress=None) as session:
        with session.stage("stitch", 60):
            assert stage().step is None
            # Many in a moment: written once, and again with the next step.
            for done in range(50):
                session.update_step("stitch", "contacts", done, 50)
            assert (stage().step, stage().step_done, stage().step_total) == ("contacts", 0, 50)
            session.update_step("stitch", "agglomerate 1/3", 2, 9)
            assert (stage().step, stage().step_done) == ("agglomerate 1/3", 2)
            console = Console(file=io.StringIO(), width=80)
            console.print(render(load_status(prepared.run.path)))
            assert "agglomerate 1/3 2/9" in console.file.getvalue()
        assert stage().step is None


def test_a_command_delivers_what_earlier_ones_did(prepared, mongo_uri):
    """The database may be new, or have lost the run."""
    with open_session(prepared, on_progress=None) as session:
        session.update_stage("predict", state="done", blocks_total=1, report={"done": 1})
    with JournalWriter(prepared.run.journal("predict"), WORKER) as writer:
        writer.finish(BlockRecord(0, "done"))
    settings = LedgerSettings(uri=SecretStr(mongo_uri), database=f"t{uuid.uuid4().hex}")
    ledger = connect(settings)
    feeder = feeder_of(prepared.run, ledger)
    feeder.update_stage("stitch", state="running")
    feeder.start()
    assert feeder.stop(60).complete
    record = prepared.run.record()
    document = ledger.find_run(record["id"])
    for name in ("name", "created", "config"):
        assert document[name] == record[name]
    assert document["grid"] == record["identity"]["grid"]
    assert document["host"] == record["commands"][-1]["host"]
    predicted, stitched = document["stages"]["predict"], document["stages"]["stitch"]
    assert {n: predicted[n] for n in record["stages"]["predict"]} == record["stages"]["predict"]
    assert (predicted["totals"]["done"], stitched["state"]) == (1, "running")
    ledger.runs.database.client.drop_database(settings.database)
    ledger.close()
