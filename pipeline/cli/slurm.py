"""The commands for a SLURM cluster: submit, resume, scale, cancel, attach, logs."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.live import Live

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.tail import JournalTail
from agq.blockwise.predict.paths import log_name, log_path
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.storage.logs import log_end, log_files
from agq.errors import InputError
from agq.pipeline.cli.arguments import (
    ConfigFile,
    Overwrite,
    RunDir,
    Settings,
    Trust,
    watched,
)
from agq.pipeline.config.recorded import require_trusted
from agq.pipeline.config.schema import Config, masked
from agq.pipeline.config.schema import load_config as read_config
from agq.pipeline.slurm import check, client, jobs
from agq.pipeline.slurm.scripts import folder, log_folder, submit_arguments
from agq.plain_text import say
from agq.terminal import console

if TYPE_CHECKING:
    from agq.pipeline.run.prepare import Prepared
    from agq.pipeline.slurm.settings import SlurmSettings

out = console()

StageOption = Annotated[
    Literal["predict", "stitch"] | None,
    typer.Option("--stage", help="Only this stage; default: all, one after the other."),
]


def submit(
    config: ConfigFile,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, print what would be submitted.")
    ] = False,
    stage: StageOption = None,
    after: Annotated[
        Literal["predict"] | None,
        typer.Option("--after", help="With --stage stitch: wait for the prediction in the queue."),
    ] = None,
    overwrite: Overwrite = False,
    trust: Trust = False,
    settings: Settings = None,
) -> None:
    """Start a run on a SLURM cluster: a coordinator, workers, and the stitch after them."""
    loaded = read_config(config, settings)
    loaded = loaded.model_copy(update={"run_dir": str(Path(loaded.run_dir).absolute())})
    if any(sign in loaded.run_dir for sign in "%\\"):
        raise InputError(
            f"run_dir {loaded.run_dir!r}: SLURM cannot log into a folder with % or a backslash in "
            "its name; choose another"
        )
    if after is not None and stage != "stitch":
        raise InputError("--after predict needs --stage stitch")
    if after is not None and overwrite:
        raise InputError("--overwrite would delete the prediction that --after predict waits for")
    stages: list[jobs.Stage] = [stage] if stage else ["predict", "stitch"]
    _submit(
        loaded,
        stages,
        overwrite=overwrite,
        after_predict=after is not None,
        trust=trust,
        dry_run=dry_run,
    )


def _submit(
    config: Config,
    stages: list[jobs.Stage],
    *,
    overwrite: bool = False,
    after_predict: bool = False,
    trust: bool = False,
    dry_run: bool = False,
) -> None:
    from agq.pipeline.run.identity import require_same, start
    from agq.pipeline.run.overwrite import clear
    from agq.pipeline.run.prepare import prepare
    from agq.pipeline.run.stages import blocks_with_tissue, forecast_of

    run_dir, section = Path(config.run_dir), jobs.section_of(config)
    if config.notify is not None:
        config.notify.address()
    if not dry_run:
        _require_trusted_jobs(run_dir, trust=trust)
    cluster = _checked_cluster(section, dry_run=dry_run)
    behind = None
    if cluster is not None:
        if jobs.record_path(run_dir).exists() and not jobs.are_of_another(run_dir):
            # A stitch may be submitted beside a prediction.
            roles: list[jobs.Role] = [] if "predict" in stages else ["stitch"]
            jobs.refuse_live(run_dir, jobs.load(run_dir), *roles)
        behind = jobs.prediction_in_queue(run_dir) if after_predict else None
    prepared = prepare(
        config,
        check_output=not dry_run,
        workers_here=False,
        overwrite=overwrite,
        trust=trust,
    )
    for note in prepared.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    goes_on = prepared.run.exists() and not overwrite
    expected = forecast_of(prepared, blocks_with_tissue(prepared), on_cluster=True)
    if "predict" in stages:
        out.print(f"forecast: {expected.line()}", soft_wrap=True)
        if cluster is not None:
            for note in check.short_limits(section, cluster, expected.seconds):
                out.print(f"note: {note}", markup=False, soft_wrap=True)
    workers = None
    if dry_run:
        if goes_on:
            require_same(prepared.as_begun())
        if behind is None:
            stages, workers = _lacking(prepared, stages, goes_on=goes_on)
        _show(config, stages, section.workers if workers is None else workers, behind)
        return
    if behind is not None:
        # The prediction holds the lock of the run and owns its record and scripts.
        require_same(prepared.as_begun())
        jobs.save_stitch_config(config)
        _write_scripts(config, ["stitch"], Path.cwd())
    else:
        assert cluster is not None
        with prepared.run.lock():
            if overwrite:
                clear(prepared.run, config)
            start(prepared.as_begun(), masked(prepared.config))
            if "predict" in stages:
                prepared.run.update_stage("predict", forecast=expected.model_dump())
            _start_record(config, check.grace_s(section, cluster))
            jobs.save_config(config)
            _write_scripts(config, ["predict", "stitch"], Path.cwd())
            stages, workers = _lacking(prepared, stages, goes_on=True)
    if stages:
        _print_submitted(run_dir, jobs.submit_all(config, stages, workers=workers, behind=behind))


def _checked_cluster(section: "SlurmSettings", *, dry_run: bool) -> check.Cluster | None:
    """Compare the settings with the cluster; None if a dry run finds no SLURM here."""
    try:
        cluster = check.read_cluster()
    except client.SlurmMissingError as error:
        if not dry_run:
            raise
        out.print(f"note: not compared with a cluster: {error}", markup=False, soft_wrap=True)
        return None
    for warning in check.check(section, cluster):
        out.print(f"note: {warning}", markup=False, soft_wrap=True)
    if ignored := [n for n in client.environment_options() if n.startswith("SBATCH_")]:
        names = ", ".join(ignored)
        out.print(
            f"note: {names} of the environment do not count, the slurm section does",
            markup=False,
            soft_wrap=True,
        )
    return cluster


def _lacking(
    prepared: "Prepared", stages: list[jobs.Stage], *, goes_on: bool
) -> tuple[list[jobs.Stage], int | None]:
    """Leave a prediction out that is done, and workers (0) where no blocks are left."""
    from agq.pipeline.slurm import missing

    if not goes_on or "predict" not in stages:
        return stages, None
    prepared = prepared.as_begun()
    left = missing.blocks_left(prepared)
    if missing.prediction_is_done(prepared, left):
        out.print("predict: done")
        stages = [stage for stage in stages if stage != "predict"]
    return stages, None if left else 0


def _show(config: Config, stages: list[jobs.Stage], workers: int, behind: int | None) -> None:
    """Print the scripts of a submission, each with the command that would submit it."""
    run_dir = Path(config.run_dir)
    section = jobs.section_of(config)
    steps = jobs.steps(section, stages, workers)
    coordinator = "COORDINATOR" if "predict" in stages else behind
    by_name = {script.name: script for script in jobs.scripts(config, stages, Path.cwd())}
    for step in steps:
        script = by_name[step.role]
        after = f"{step.after}:{coordinator}" if step.after and coordinator else None
        words = submit_arguments(step.role, run_dir, section, array=step.array, after=after)
        say(f"# {script.path(run_dir)}")
        say(f"# sbatch {shlex.join(str(word) for word in words)}")
        say(script.text)
    if "stitch" in stages and (count := section.stitch.jobs):
        from agq.pipeline.slurm.dask_jobs import shown_job  # loads dask

        job = shown_job(section, run_dir)
        say(f"# {count} jobs of dask workers, which the stitch submits and replaces:")
        say(f"# sbatch {shlex.join([*job.sbatch_arguments, 'SCRIPT'])}")
        say(job.job_script())


def _start_record(config: Config, grace_s: int) -> None:
    run_dir, section = Path(config.run_dir), jobs.section_of(config)
    make_folder(folder(run_dir), own=True)
    record = jobs.Jobs(
        here=str(Path.cwd()),
        grace_s=grace_s,
        workers=section.workers,
        jobs=jobs.load(run_dir).jobs if jobs.record_path(run_dir).exists() else [],
    )
    jobs.save(run_dir, record)


def _write_scripts(config: Config, stages: list[jobs.Stage], here: Path) -> None:
    run_dir = Path(config.run_dir)
    make_folder(log_folder(run_dir))
    for script in jobs.scripts(config, stages, here):
        write_atomic(script.path(run_dir), script.text.encode(), mode=0o644)


def _print_submitted(run_dir: Path, submitted: list[jobs.Job]) -> None:
    for job in submitted:
        count = f", {job.count} array tasks" if job.role == "workers" else ""
        out.print(f"submitted {job.role}: job {job.id}{count}")
    quoted = shlex.quote(str(run_dir))
    for command in ("attach", "scale", "cancel", "logs"):
        tail = " N" if command == "scale" else ""
        out.print(f"  agq {command} {quoted}{tail}", markup=False, soft_wrap=True)


def _require_trusted_jobs(run_dir: Path, *, trust: bool) -> None:
    """Refuse a folder of somebody else, whose files say what jobs run; take them over if told."""
    require_trusted(run_dir, "jobs", trust=trust)
    if trust:
        jobs.adopt_config(run_dir)


def _with_own_jobs(run_dir: Path) -> Path:
    """Return a run folder, absolute; refuse a copy, whose jobs work on the original."""
    run_dir = run_dir.absolute()
    if jobs.are_of_another(run_dir):
        raise InputError(
            f"{run_dir} is a copy, and its jobs are those of the original; submit it: agq submit"
        )
    return run_dir


def resume(
    run_dir: RunDir,
    stage: StageOption = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker jobs; default: as before.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Submit what is missing of a run; jobs in the queue go on."""
    from agq.pipeline.run.prepare import name_factory
    from agq.pipeline.slurm import missing

    run_dir = _with_own_jobs(run_dir)
    _require_trusted_jobs(run_dir, trust=trust)
    config = jobs.load_config(run_dir)
    name_factory(config)
    record = jobs.load(run_dir)
    if record.cancelled:
        missing.end(record, jobs.live(record))
    # After `agq scale RUN 0`, as many as at first.
    wanted = workers or record.workers or jobs.section_of(config).workers
    stages: list[jobs.Stage] = [stage] if stage else ["predict", "stitch"]
    lacks = missing.of_run(config, record, stages, wanted, trust=trust)
    for note in lacks.notes:
        out.print(note, markup=False, soft_wrap=True)
    if lacks.idle:
        out.print(f"ends jobs with nothing to do: {jobs.numbers(lacks.idle)}")
        missing.end(record, lacks.idle)
    # They name the run folder, which may have been moved.
    _write_scripts(config, ["predict", "stitch"], Path(record.here))
    if lacks.behind is not None and (lacks.workers or workers is not None):
        before, now = jobs.scale(run_dir, wanted)
        out.print(f"worker jobs: {before} -> {now}")
    if lacks.stages:
        submitted = jobs.submit_all(
            config, lacks.stages, wanted=wanted, workers=lacks.workers, behind=lacks.behind
        )
        _print_submitted(run_dir, submitted)


def scale(
    run_dir: RunDir,
    count: Annotated[int, typer.Argument(min=0, help="Worker jobs.", show_default=False)],
    trust: Trust = False,
) -> None:
    """Change the number of worker jobs of a run in the queue."""
    run_dir = _with_own_jobs(run_dir)
    _require_trusted_jobs(run_dir, trust=trust)
    before, now = jobs.scale(run_dir, count)
    limit = f" (slurm.limit holds back {count - now} more)" if count > now else ""
    out.print(f"worker jobs: {before} -> {now}{limit}")


def cancel(
    run_dir: RunDir,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds for workers to finish the blocks in hand.")
    ] = 30.0,
    trust: Trust = False,
) -> None:
    """Let the jobs of a run finish their blocks, then kill them; agq resume goes on."""
    run_dir = _with_own_jobs(run_dir)
    require_trusted(run_dir, "jobs to end", trust=trust)
    killed = jobs.cancel(run_dir, wait_s=wait)
    after = f"; {killed} jobs did not end within {wait:g} s and were killed" if killed else ""
    out.print(f"cancelled{after}")


def attach(
    run_dir: RunDir,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between updates.")] = 5.0,
) -> None:
    """Follow a submitted run until its jobs have left the queue; Ctrl-C ends only this command."""
    from agq.pipeline.status.monitor import Monitor
    from agq.pipeline.status.text import render

    run_dir = _with_own_jobs(run_dir)
    jobs.load(run_dir)
    monitor = Monitor(*watched(run_dir), queue=jobs.queue_status)
    try:
        with Live(console=console(wrap=True), auto_refresh=False) as view:
            while (status := monitor.poll()).queue or status.may_go_on:
                pending = status.queue and all(q.state == "PENDING" for q in status.queue)
                if status.state == "stopped" and pending:
                    break  # what waits can never start
                view.update(render(status), refresh=True)
                time.sleep(interval)
            if status.queue is None and status.queue_error is None:
                jobs.live(jobs.load(run_dir))  # says what is missing
            view.update(render(monitor.poll()), refresh=True)
    except KeyboardInterrupt:
        return
    if status.state == "stopped":
        jobs.record_gone(run_dir)
    if status.state != "done":
        raise typer.Exit(1)


def logs(
    run_dir: RunDir,
    block: Annotated[int | None, typer.Option(help="Print all attempts at this block.")] = None,
    worker: Annotated[str | None, typer.Option(help="Print the log of this worker or job.")] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="Last lines to print.")] = 40,
) -> None:
    """Print the log of a worker or the attempts at a block; without options list all logs."""
    run_dir = run_dir.absolute()
    if block is not None:
        _block_log(run_dir, block, lines)
        return
    files = log_files(run_dir)
    if worker is not None:
        name = worker.removeprefix("worker-").removeprefix("workers-")
        stems = {f: f.name.removesuffix(".1").removesuffix(".log") for f in files}
        files = [f for f in files if stems[f].partition("-")[2] == name or stems[f] == worker]
        if not files:
            raise InputError(
                f"--worker {worker}: {run_dir}/logs has no such log; agq logs {run_dir} lists all"
            )
        for file in files:
            say(f"==> {file}")
            end = log_end(run_dir, file, 400 * lines)
            say("\n".join(end.splitlines()[-lines:]))
        return
    if not files:
        raise InputError(f"{run_dir}/logs has no log yet; jobs write it when they start")
    for file in files:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime))
        say(f"{when}  {file.stat().st_size:>9}  {file}")


def _block_log(run_dir: Path, block: int, lines: int) -> None:
    journal = Journal(run_dir / "journal" / "predict")
    tail = JournalTail(run_dir / "journal" / "predict")
    of_block = []
    while events := tail.poll():
        of_block += [e for e in events if e.kind in ("begin", "block") and e.data["block"] == block]
    if not of_block:
        raise InputError(f"--block {block}: the journal of {run_dir} has no line about this block")
    for event in sorted(of_block, key=lambda e: e.time):
        state = journal.workers.get(event.token)
        name = state.info.name if state else event.token
        where = f"{name} on {state.info.host}" if state else name
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        if event.kind == "begin":
            say(f"{when}  attempt {event.data.get('attempt', 1)} begun by {where}")
            continue
        record = event.record
        say(f"{when}  {record.state} by {where}{f': {record.reason}' if record.reason else ''}")
        if record.error:
            say("\n".join(record.error.rstrip().splitlines()[-lines:]))
        log = log_path(run_dir, log_name(name))
        if log.exists():
            say(f"log: {log}")
