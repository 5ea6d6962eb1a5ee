"""A run's status as text that fits in 80 columns."""

import time
from collections.abc import Collection, Iterable

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from agq.blockwise.storage.files import format_bytes
from agq.pipeline.status.notices import Notice
from agq.pipeline.status.run_status import (
    Failure,
    ForecastStatus,
    QueueStatus,
    RunStatus,
    StageStatus,
    WorkerStatus,
)
from agq.plain_text import printable
from agq.terminal import WholeTable

_STYLES = {
    "new": "dim",
    "waiting": "dim",
    "running": "cyan",
    "stopped": "yellow",
    "silent": "yellow",
    "failed": "red",
    "done": "green",
    "ended": "dim",
}
_MAX_ROWS = 12
_MAX_ERRORS = 5
_BAR = 14


def render(status: RunStatus) -> RenderableType:
    """Draw a status."""
    parts: list[RenderableType] = [_header(status)]
    if status.queue is not None:
        parts.append(_queue(status.queue))
    elif status.queue_error is not None:
        parts.append(_line("queue", f"unknown ({status.queue_error})", "yellow"))
    parts += [_notice(notice) for notice in status.notices]
    if status.stages:
        parts.append(_stages(status.stages))
    for stage in status.stages:
        parts += _details(stage, status.updated)
    if status.state == "done" and status.forecast:
        parts.append(forecast_table(status.forecast))
    for stage in status.stages:
        if any(worker.state != "ended" for worker in stage.workers):
            parts.append(_workers(stage, status.updated))
    return Group(*parts)


def forecast_table(rows: Iterable[ForecastStatus]) -> WholeTable:
    """Draw what a run was expected to take beside what it took."""
    columns = ("", "forecast", "fact")
    table = WholeTable("", columns, numbers=columns[1:])
    for row in rows:
        cells = ("" if v is None else measure(row.name, v) for v in (row.forecast, row.fact))
        table.add_row(measured(row.name), *cells)
    return table


def measured(name: str) -> str:
    """Say what a `ForecastStatus` of a name measures."""
    words = name.removesuffix("_s").removesuffix("_bytes").replace("_", " ")
    return words.replace("gpu", "GPU")


def measure(name: str, value: float) -> str:
    """Write a value of a `ForecastStatus`."""
    if name.endswith("_s"):
        return duration(value)
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_hours"):
        return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,.2f}" if name == "cost" else f"{value:,.0f}"


def _header(status: RunStatus) -> Text:
    age = max(0.0, time.time() - status.updated)
    text = Text.assemble(
        ("run ", "dim"),
        (_word(status.name), "bold"),
        "  ",
        (status.state, _STYLES[status.state]),
        (f"  ({status.source}, {duration(age)} ago)" if age > 2 else f"  ({status.source})", "dim"),
    )
    text.append(f"\n{_word(status.run_dir)}", "dim")
    if status.note:
        text.append(f"\n{status.note}", "yellow")
    return text


def _queue(queue: Collection[QueueStatus]) -> Text:
    words = [
        f"{q.count} {q.role} {q.state.lower()}" + (f" ({q.reason})" if q.reason else "")
        for q in queue
    ]
    words += {f"{q.wanted} workers wanted" for q in queue if q.wanted is not None}
    excluded = sorted({node for q in queue for node in q.excluded})
    if excluded:
        words.append(f"no workers on {', '.join(excluded)}, where they end at their start")
    return _line("queue", ", ".join(words) or "no jobs")


def _notice(notice: Notice) -> Text:
    if notice.problem is not None:
        return _line("notify", f"{notice.event} not told: {notice.problem}", "yellow")
    age = max(0.0, time.time() - notice.time)
    return _line("notify", f"{notice.event} told by the {notice.way}, {duration(age)} ago", "dim")


def _stages(stages: Iterable[StageStatus]) -> WholeTable:
    columns = ("stage", "state", "", "blocks", "failed", "left")
    table = WholeTable("", columns, numbers=("blocks", "failed", "left"))
    for stage in stages:
        done, total = stage.ended_blocks, stage.blocks_total
        # A stage without a journal of its own says only whether it is over.
        counted = bool(done or stage.failed or stage.running)
        if not counted and stage.state == "done":
            done = total or 1
        table.add_row(
            Text(_name(stage)),
            Text(stage.state, _STYLES[stage.state]),
            ProgressBar(total=max(total or done, 1), completed=done, width=_BAR),
            Text((f"{done}" if total is None else f"{done}/{total}") if counted else _step(stage)),
            Text(str(stage.failed), "red") if stage.failed else Text(""),
            Text(_left(stage)),
        )
    return table


def _name(stage: StageStatus) -> str:
    """Return what a user calls a stage, as the progress of a command does."""
    return _word({"relabel": "write"}.get(stage.name, stage.name))


def _left(stage: StageStatus) -> str:
    if stage.still_since is not None:
        return "unknown"
    return "" if stage.eta_s is None else duration(stage.eta_s)


def _step(stage: StageStatus) -> str:
    return f"{stage.step} {stage.step_done}/{stage.step_total}" if stage.step else ""


def _details(stage: StageStatus, now: float) -> list[RenderableType]:
    lines: list[RenderableType] = []
    facts = []
    if stage.blocks_per_s_now is not None and stage.voxels_per_s_now is not None:
        facts.append(f"now {_rate(stage.blocks_per_s_now, stage.voxels_per_s_now)}")
    if stage.blocks_per_s and stage.voxels_per_s is not None:
        facts.append(f"average {_rate(stage.blocks_per_s, stage.voxels_per_s)}")
    if stage.running:
        facts.append(f"{stage.running} running")
    if stage.skipped:
        facts.append(f"{stage.skipped} skipped")
    if facts:
        lines.append(_line(_name(stage), ", ".join(facts)))
    if stage.still_since is not None:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stage.still_since))
        text = f"nothing moves since {at}, {duration(now - stage.still_since)} ago"
        lines.append(_line(_name(stage), text, "yellow"))
    if stage.duplicates:
        lines.append(_line(_name(stage), f"{stage.duplicates} blocks done by two processes", "dim"))
    if stage.conflicts:
        text = f"{stage.conflicts} blocks done twice with DIFFERENT results: please report"
        lines.append(_line(_name(stage), text, "bold red"))
    if stage.error and stage.state != "done":
        lines.append(_line(_name(stage), stage.error, "yellow"))
    return lines + _failures(stage)


def _failures(stage: StageStatus) -> list[RenderableType]:
    """Failures by error, each with an example: a bad node gives a thousand of one kind."""
    lines: list[RenderableType] = []
    shown = stage.errors[:_MAX_ERRORS]
    for group in shown:
        lines.append(_line(f"{group.count} failed", group.summary, "red"))
        lines.append(Text(f"    {_word(_where(group.example))}", "dim"))
        if group.log:
            lines.append(Text(f"    {_word(f'log {group.log}')}", "dim"))
    hidden = stage.failed - sum(group.count for group in shown)
    if hidden > 0:
        lines.append(_line(f"{hidden} failed", "with other errors", "red"))
    return lines


def _where(failure: Failure) -> str:
    text = f"e.g. block {failure.block}, attempt {failure.attempt}"
    if failure.place is not None:
        text += f", {failure.place}"
    return text + (f", worker {failure.worker}" if failure.worker else "")


def _workers(stage: StageStatus, now: float) -> WholeTable:
    numbers = ("done", "failed", "block", "heard")
    table = WholeTable("", (f"{_name(stage)} worker", "host", "device", *numbers), numbers=numbers)
    alive = [worker for worker in stage.workers if worker.state != "ended"]
    # Silent workers first: they are the ones to look into.
    shown = sorted(alive, key=lambda w: w.state != "silent")[:_MAX_ROWS]
    for worker in shown:
        table.add_row(*_worker_row(worker, now), style=_STYLES[worker.state])
    table.legend = f"... {len(alive) - len(shown)} more" if len(alive) > len(shown) else ""
    return table


def _worker_row(worker: WorkerStatus, now: float) -> tuple[Text, ...]:
    current = str(worker.current[0]) if worker.current else ""
    return (
        Text(_word(worker.name)),
        Text(_word(worker.host)),
        Text(_word(worker.device)),
        Text(str(worker.done)),
        Text(str(worker.failed) if worker.failed else ""),
        Text(current),
        Text(duration(max(0.0, now - worker.last)) + " ago" + (", slow" if worker.slow else "")),
    )


def _line(head: str, text: str, style: str = "") -> Text:
    return Text.assemble((f"{_word(head)}: ", "dim"), (_word(text), style))


def _word(text: str) -> str:
    """Return what others have written as a part of one line."""
    return printable(text, lines=False)


def _rate(blocks: float, voxels: float) -> str:
    return f"{blocks:.3g} blocks/s {voxels / 1e6:.3g} Mvoxel/s"


def duration(seconds: float) -> str:
    """Write a time span in at most two units: ``9s``, ``3m 20s``, ``5h 02m``, ``3d 07h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
