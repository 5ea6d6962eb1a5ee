"""Commands that watch: `agq status` and `watch`, Prometheus metrics, messages, the ledger."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args

import typer

from agq import waiting
from agq.errors import InputError, RunStoppedError
from agq.pipeline.cli.arguments import AsJson, RunDir, Target, Trust, watched
from agq.pipeline.cli.main import EXIT_FAILED
from agq.pipeline.config.recorded import read_target, require_trusted
from agq.pipeline.folder import RunFolder
from agq.plain_text import printable, say

if TYPE_CHECKING:
    from agq.blockwise.ledger.database import Ledger
    from agq.blockwise.ledger.settings import LedgerSettings
    from agq.pipeline.notify.settings import Event, NotifySettings
    from agq.pipeline.status.run_status import QueueStatus, RunStatus, StageStatus

_START_S: Final = 8.0
"""How long `agq watch` waits for a run that has just been started: it checks its input first."""

ledger_app = typer.Typer(no_args_is_help=True, help="Look after the database of block progress.")


def status(
    target: Annotated[
        Path | None,
        typer.Argument(
            readable=False,
            help="Run folder, YAML configuration file, or a folder of run folders.",
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="All runs of a folder, or the newest 100 in the database of AGQ_MONGO_URI.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, once."""
    if every:
        show_all(as_json, target)
        return
    if target is None:
        raise InputError("name a run folder or a configuration, or give --all")
    if target.is_dir() and not RunFolder(target).exists() and next(target.glob("*/run.json"), None):
        show_all(as_json, target)
        return
    found = _status_of(target)
    if as_json:
        say(found.model_dump_json(indent=1))
        return

    from agq.pipeline.status.text import render
    from agq.terminal import console

    console().print(render(found))


def _queue(run_dir: Path) -> "tuple[QueueStatus, ...] | None":
    # Imported only for a run that was submitted.
    from agq.pipeline.slurm.jobs import queue_status

    return queue_status(run_dir)


def _status_of(target: Path) -> "RunStatus":
    from agq.pipeline.status.monitor import load_status

    run_dir, ledger = watched(target)
    try:
        status = load_status(run_dir, ledger, _queue)
    finally:
        if ledger is not None:
            ledger.leave()
    _record_gone(run_dir, status)
    return status


def _record_gone(run_dir: Path, status: "RunStatus") -> None:
    if status.queue is not None and status.state == "stopped":
        from agq.pipeline.slurm.jobs import record_gone

        record_gone(run_dir)


def watch(
    target: Target,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between updates.")] = 2.0,
) -> None:
    """Follow a run until it ends; the exit status is 1 if it stopped or blocks failed."""
    from agq.pipeline.status import monitor

    run_dir, ledger = _started(target)
    status = monitor.watch(run_dir, ledger, queue=_queue, interval_s=interval)
    _record_gone(run_dir, status)
    if status.state != "done":
        raise typer.Exit(EXIT_FAILED)


def _started(target: Path) -> "tuple[Path, Ledger | None]":
    """Return what `watched` does, after some seconds if need be: the run may just be starting."""
    if target.is_dir() or not target.parent.is_dir():
        return watched(target)
    until = time.monotonic() + _START_S
    waiting.doing(f"waiting for the run of {target} to start")
    while True:
        try:
            run_dir, ledger = watched(target)
            if ledger is not None or RunFolder(run_dir).exists():
                return run_dir, ledger
            problem = f"{run_dir} is not a run folder yet; start it: agq run {target}"
        except InputError as error:
            if target.exists():  # a configuration that is wrong
                raise
            problem = str(error)
        if time.monotonic() > until:
            raise InputError(f"{problem} (waited {_START_S:.0f} s)")
        time.sleep(0.3)


def open_ledger(settings: "LedgerSettings | None" = None) -> "Ledger":
    """Open the database that the settings or the environment name.

    Raises
    ------
    InputError
        If none is named, or it does not answer.
    """
    from agq.blockwise.ledger.database import connect
    from agq.blockwise.ledger.settings import LedgerSettings

    ledger = connect(
        (settings or LedgerSettings.of_environment()).model_copy(update={"required": True})
    )
    assert ledger is not None
    return ledger


def show_all(as_json: bool, folder: Path | None = None) -> None:
    """Print the runs of a folder, or else of the database that AGQ_MONGO_URI names."""
    from agq.pipeline.status.listing import folder_lines
    from agq.pipeline.status.text import duration
    from agq.terminal import WholeTable, console

    runs = _ledger_runs() if folder is None else folder_lines(folder, _queue)
    if as_json:
        say(json.dumps({"format": 1, "runs": runs}, indent=1))
        return
    where = "AGQ_MONGO_URI" if folder is None else str(folder)
    columns = ("run", "id", "user", "state", "stage", "failed", "rate", "left", "heard")
    table = WholeTable(f"Runs of {where}", columns, numbers=("failed", "rate", "left", "heard"))
    several = len({run["user"] for run in runs}) > 1
    for run in runs:
        stage = run["stages"].get(run["stage"], {})
        ended, total = stage.get("done", 0) + stage.get("skipped", 0), stage.get("blocks_total")
        counted = (f" {ended}/{total}" if total else f" {ended}") if ended else ""
        heard = run["updated"] or run["created"]
        table.add_row(
            str(run["name"] or run["run_dir"] or ""),
            str(run["id"])[:8],
            str(run["user"] or "") if several else "",
            str(run["state"]),
            f"{run['stage'] or ''}{counted}",
            str(stage.get("failed") or ""),
            "" if run["blocks_per_s"] is None else f"{run['blocks_per_s']:.3g}",
            "" if run["eta_s"] is None else duration(run["eta_s"]),
            "" if heard is None else duration(max(0.0, time.time() - heard)),
        )
    legend = ["rate: blocks/s; left: at that rate; heard: time since the last sign of life"]
    legend += [f"{str(run['id'])[:8]:8}  {run['run_dir']}" for run in runs if run["run_dir"]]
    table.legend = "\n".join(legend + [run["problem"] for run in runs if run["problem"]])
    console().print(table)


def _ledger_runs() -> list[dict[str, Any]]:
    from agq.blockwise.ledger.settings import LedgerSettings

    if LedgerSettings.of_environment().resolve() is None:
        raise InputError(
            "--all lists the runs of a database, and AGQ_MONGO_URI names none; for the runs of a "
            "folder: agq status --all FOLDER"
        )
    from pymongo.errors import PyMongoError

    from agq.pipeline.status.listing import ledger_lines

    ledger = open_ledger()
    try:
        return ledger_lines(ledger)
    except PyMongoError as error:
        raise ledger.error(error) from None
    finally:
        ledger.close()


def prometheus(status: "RunStatus") -> str:
    """Write the state of a run in Prometheus' text format."""
    from agq.pipeline.status.run_status import RunState

    lines: list[str] = []
    whose = {"run": status.name, "id": status.id, "user": status.user or ""}

    def metric(name: str, text: str, values: Iterable[tuple[dict[str, str], float | None]]) -> None:
        samples = [(labels, value) for labels, value in values if value is not None]
        if samples:
            lines.append(f"# HELP agq_{name} {text}")
            lines.append(f"# TYPE agq_{name} gauge")
        for labels, value in samples:
            inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in (whose | labels).items())
            lines.append(f"agq_{name}{{{inner}}} {float(value)!r}")

    def stages(name: str, text: str, value: "Callable[[StageStatus], float | None]") -> None:
        metric(name, text, [({"stage": s.name}, value(s)) for s in status.stages])

    def by_state(
        name: str, text: str, states: tuple[str, ...], value: "Callable[[StageStatus, str], float]"
    ) -> None:
        pairs = [(s, state) for s in status.stages for state in states]
        metric(name, text, [({"stage": s.name, "state": x}, value(s, x)) for s, x in pairs])

    metric("run_running", "1 while a coordinator lives.", [({}, status.state == "running")])
    words = get_args(RunState)
    metric("run_state", "1 for the state.", [({"state": w}, w == status.state) for w in words])
    by_state("blocks", "Blocks by state.", ("done", "skipped", "failed", "running"), getattr)
    stages("stage_blocks", "Blocks of the stage.", lambda s: s.blocks_total or None)
    stages("voxels_done", "Voxels of the done blocks.", lambda s: s.voxels)
    stages("voxels_per_second", "Over the last minute.", lambda s: s.voxels_per_s_now)
    stages("eta_seconds", "Time left at the present rate.", lambda s: s.eta_s)
    by_state(
        "workers",
        "Workers that have not ended.",
        ("running", "silent"),
        lambda s, state: sum(worker.state == state for worker in s.workers),
    )
    jobs: Counter[tuple[str, str]] = Counter()
    for entry in status.queue or ():
        jobs[entry.role, entry.state.lower()] += entry.count
    pairs = [({"role": role, "state": state}, n) for (role, state), n in sorted(jobs.items())]
    metric("batch_jobs", "Batch jobs in the queue by kind and state.", pairs)
    metric("updated_timestamp_seconds", "When this was true, as Unix time.", [({}, status.updated)])
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metrics(run_dir: RunDir) -> None:
    """Print the state of a run as Prometheus text (for a textfile collector, by cron)."""
    say(prometheus(_status_of(run_dir)), nl=False)


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
        event, reason = _event_of(load_status(run_dir, queue=queue_status), settings)
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


def _event_of(status: "RunStatus", settings: "NotifySettings") -> "tuple[Event | None, str | None]":
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


@ledger_app.command("sync")
def sync(
    run_dir: RunDir,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to try at most.")] = 3600.0,
) -> None:
    """Make the database agree with the journal of a run."""
    from agq.pipeline.run.session import feeder_of

    run = RunFolder(run_dir)
    if not run.has_own_id(run.record()):
        with run.lock():
            run.claim_id()
    ledger = open_ledger(read_target(run_dir).ledger)
    feeder = feeder_of(run, ledger, full=True)
    feeder.start()
    report = feeder.stop(timeout)
    ledger.close()
    if not report.complete:
        raise RunStoppedError(
            f"{report.undelivered} journal lines not delivered, {report.refused} documents "
            f"refused: {report.error or 'see the log'}"
        )
    say(f"{report.delivered} journal lines delivered")
