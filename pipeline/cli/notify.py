"""The command `agq notify`: tell of a run now, or try whether messages arrive."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agq.errors import InputError
from agq.pipeline.cli.arguments import Target, Trust
from agq.pipeline.cli.main import EXIT_FAILED
from agq.pipeline.config.recorded import read_target, require_trusted
from agq.plain_text import say

if TYPE_CHECKING:
    from agq.pipeline.notify.settings import Event, NotifySettings
    from agq.pipeline.status.run_status import RunStatus


def notify(
    target: Target,
    test: Annotated[
        bool, typer.Option("--test", help="Send a message that says it is a test.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Tell that a run has ended, failed or stands still, if nobody has done so yet (for cron)."""
    from agq.pipeline.notify.deliver import deliver, ways
    from agq.pipeline.notify.message import compose
    from agq.pipeline.notify.notifier import Notifier
    from agq.pipeline.slurm.jobs import load, queue_status, record_path
    from agq.pipeline.status.monitor import load_status
    from agq.pipeline.status.notices import Notice

    if target.is_dir():
        require_trusted(target, "notify", trust=trust)
    config = read_target(target)
    settings, run_dir = config.notify, Path(config.run_dir)
    if settings is None or not ways(settings):
        raise InputError(f"{target}: notify names neither a command nor a webhook")
    settings.address()
    if test:
        message = compose("test", run_dir, "test")
        problems = {way: deliver(settings, way, message) for way in ways(settings)}
        what = "test"
    else:
        event, reason = _state(load_status(run_dir, queue=queue_status), settings)
        if event == "failure" and record_path(run_dir).exists() and load(run_dir).cancelled:
            event, reason = None, "agq cancel has ended it"
        if event is None:
            say(f"nothing to tell: {reason}")
            return
        sent: list[Notice] = Notifier(run_dir, settings).tell(event, reason)
        if not sent:
            say(f"nothing to tell: {event} was told, or is not in notify.events")
        problems, what = {notice.way: notice.problem for notice in sent}, event
    for way, problem in problems.items():
        say(f"{way}: {problem or f'told {what}'}", err=problem is not None)
    if any(problems.values()):
        raise typer.Exit(EXIT_FAILED)


def _state(status: "RunStatus", settings: "NotifySettings") -> "tuple[Event | None, str | None]":
    """Return what there is to tell of a run, and why; without an event, what it does."""
    if status.state == "done":
        return "end", None
    if status.state in ("failed", "stopped"):
        failed = sum(stage.failed for stage in status.stages)
        error = next((stage.error for stage in status.stages if stage.error), None)
        return "failure", error or (f"{failed} blocks failed" if failed else "its process is gone")
    still = [stage.still_since for stage in status.stages if stage.still_since is not None]
    if still and time.time() - max(still) >= 60 * settings.stall_minutes:
        return "stall", f"no block has been done for {settings.stall_minutes:g} minutes"
    return None, f"it is {status.state}"
