"""The program of the stitch job: stitch, pyramid, scores and picture.

A requeued job goes on after the steps that are done. It ends with 75 before its time limit
(SIGUSR1): the batch script then requeues the job.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agq.blockwise.predict.local_processes import Terminated
from agq.blockwise.storage.files import FATAL_ERRNOS
from agq.blockwise.storage.logs import cap_output
from agq.credentials import log_to_stderr
from agq.errors import InputError, RunStoppedError, machine_fault
from agq.pipeline.folder import RunLockedError
from agq.pipeline.notify.notifier import Notifier, reason_of
from agq.pipeline.run import stages
from agq.pipeline.run.prepare import prepare_stitch
from agq.pipeline.run.session import Session, open_session
from agq.pipeline.slurm.coordinator import (
    notifier_of,
    record_end,
    tell_of_signal,
    wait_for_storage,
)
from agq.pipeline.slurm.jobs import load_config, section_of
from agq.pipeline.slurm.scripts import EXIT_REQUEUE

_LOCKED_S = 5.0

_logger = logging.getLogger(__name__)


def _own_cores() -> int | None:
    """Return the cores of the job, which may be fewer than those of the node."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    return None if cores is None else int(cores)


def _stitch(run_dir: Path, notifier: Notifier) -> None:
    config = load_config(run_dir)
    section = section_of(config)
    prepared = prepare_stitch(config, trust=True)
    while True:
        try:
            with open_session(prepared) as session:
                session.on_move = notifier.moved
                client = None
                if section.stitch.jobs:
                    from agq.pipeline.slurm.dask_jobs import jobqueue_client

                    client = jobqueue_client(section, run_dir)
                stages.stitch(session, client=client, cores=_own_cores())
                stages.score(session)
                _picture(session)
            return
        except RunLockedError as error:
            _logger.warning("%s", error)
            time.sleep(_LOCKED_S)
        except OSError as error:
            if error.errno not in FATAL_ERRNOS:
                raise
            wait_for_storage(run_dir, section.wait_s, error)


def _picture(session: Session) -> None:
    try:
        stages.picture(session)
    except InputError as error:
        # The raw volume may be gone by now; the segmentation needs none.
        _logger.warning("no picture: %s", error)


def _requeue_before_limit(signum: int, _frame: Any) -> None:
    raise Terminated(signum, EXIT_REQUEUE, "requeued before the time limit of its job")


def main(arguments: list[str]) -> int:
    """Stitch; see the module."""
    log_to_stderr()
    cap_output()
    signal.signal(signal.SIGUSR1, _requeue_before_limit)
    run_dir = Path(arguments[0])
    with notifier_of(run_dir) as notifier:
        return _watched(run_dir, notifier)


def _watched(run_dir: Path, notifier: Notifier) -> int:
    begun = time.time()
    try:
        _stitch(run_dir, notifier)
    except SystemExit as end:
        tell_of_signal(run_dir, notifier, end)
        raise
    except Exception as error:
        known = isinstance(error, InputError | RunStoppedError)
        line = str(error) if known else machine_fault(error) if isinstance(error, OSError) else None
        if line is not None:
            line = " ".join(line.split())
            _logger.error("%s", line)
            record_end(run_dir, "stitch", line, begun)
        notifier.tell("failure", reason_of(error))
        if line is None:
            raise
        return 1
    notifier.tell("end")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
