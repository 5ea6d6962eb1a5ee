"""Submit a short job that times one block, and wait for what it says."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pydantic import ValidationError

from agq.blockwise.predict.local_processes import termination_unwinds
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.storage.logs import log_end
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.forecast.timing import Timing
from agq.pipeline.slurm import check, client, jobs
from agq.pipeline.slurm.scripts import trial_folder, trial_script
from agq.pipeline.slurm.settings import SlurmSettings
from agq.pipeline.status.stages import NEVER_STARTS
from agq.plain_text import say
from agq.reading import read_record

_POLL_S: Final = 1.0
_LATE_S: Final = 15.0
"""How much later than the end of a job its files may be seen on shared storage."""
_MINUTES: Final = 20
_LINES: Final = 10
_LOG_BYTES: Final = 4000


@dataclass(frozen=True)
class TrialJob:
    """Times a block in a job; call it as `agq.pipeline.run.plan.Measure` says.

    Attributes
    ----------
    section, run_dir
        Of the configuration.
    tell
        Called with what the job does.
    """

    section: SlurmSettings
    run_dir: Path
    tell: Callable[[str], object]

    @classmethod
    def checked(cls, config: Config, tell: Callable[[str], object]) -> Self:
        """Compare the settings with the cluster before anything else is done.

        Raises
        ------
        InputError
            If there is no cluster here, or it does not have what the settings ask for.
        """
        section = jobs.section_of(config)
        tell("asking the cluster what it has")
        check.check(section, check.read_cluster())
        return cls(section, Path(config.run_dir).absolute(), tell)

    def __call__(self, spec: PredictSpec, number: int, key: str) -> Timing:
        """Submit the job and wait for it; Ctrl-C and every error cancel it.

        Raises
        ------
        InputError
            If it can never start, or ends without a result; the end of its log is printed.
        """
        folder = trial_folder(self.run_dir)
        make_folder(self.run_dir, own=True)
        make_folder(folder, own=True)
        spec.model_copy(update={"run_dir": str(folder)}).save()
        request = json.dumps({"block": number, "key": key})
        write_atomic(folder / "request.json", request.encode(), mode=0o644)
        limit = self.section.time
        if limit is not None and (check.limit_minutes(limit) or _MINUTES) > _MINUTES:
            limit = str(_MINUTES)  # a short job is put into gaps of the schedule
        script = trial_script(self.section, self.run_dir, Path.cwd(), limit)
        write_atomic(script.path(self.run_dir), script.text.encode(), mode=0o644)
        self.tell("submitting a job that times a block")
        with termination_unwinds():
            job = client.submit(
                [
                    f"--chdir={folder}",
                    *self.section.extra_of("workers"),
                    script.path(self.run_dir),
                ]
            )
            try:
                return self._wait(job)
            except BaseException:
                with suppress(client.SlurmError):
                    client.cancel([str(job)])
                raise

    def _wait(self, job: int) -> Timing:
        told, ended = "", 0.0
        while True:
            timing = self._result(job)
            if timing is not None:
                return timing
            said = self._state(job)
            if said is None and ended and time.monotonic() - ended > _LATE_S:
                raise InputError(self._why(job))
            ended = 0.0 if said is not None else ended or time.monotonic()
            text = f"job {job}, which times a block, {said or 'has ended'}"
            if text != told:
                self.tell(text)
                told = text
            time.sleep(_POLL_S)

    def _state(self, job: int) -> str | None:
        """Say what the job does; None if it has left the queue."""
        try:
            entries = client.queue([job])
        except client.SlurmMissingError:
            raise
        except client.SlurmError as error:
            return f"is where the queue is unknown: {error}"
        entry = next((e for e in entries if e.state not in jobs.ENDING), None)
        if entry is None:
            return None
        if entry.state != "PENDING":
            return f"is {entry.state.lower()}"
        if entry.reason in NEVER_STARTS:
            raise InputError(
                f"job {job}, which was to time a block, can never start: {entry.reason}, SLURM says"
                "; it was cancelled: change the slurm section"
            )
        return f"waits: {entry.reason}"

    def _result(self, job: int) -> Timing | None:
        with suppress(FileNotFoundError, ValidationError):
            return Timing.model_validate(read_record(trial_folder(self.run_dir) / f"{job}.json"))
        return None

    def _why(self, job: int) -> str:
        """Print the end of the log of a job without a result; return what happened in one line."""
        log = trial_folder(self.run_dir) / f"{job}.log"
        lines: list[str] = []
        with suppress(InputError, OSError):
            lines = log_end(self.run_dir, log, _LOG_BYTES).strip().splitlines()[-_LINES:]
        for line in lines:
            say(f"  {line}", err=True)
        last = f": {lines[-1]}" if lines else ", and without a word: was it cancelled?"
        return f"job {job}, which was to time a block, ended without a result ({log}){last}"
