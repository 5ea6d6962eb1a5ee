"""What a message about a run says."""

import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from agq.credentials import hide
from agq.errors import InputError
from agq.pipeline.folder import RunFolder, user_name
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.run_status import StageStatus
from agq.plain_text import printable

_MOST = 1000
_NAMED = ("predict", "stitch")
_HAS = {"end": "has ended", "failure": "has failed", "stall": "stands still", "test": "is tested"}


class Message(BaseModel):
    """The JSON that commands and webhooks get; fields may be added, none is removed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    event: Literal["end", "failure", "stall", "test"]
    text: str
    key: str
    id: str
    run: str
    path: str
    host: str
    user: str
    stage: str | None = None
    blocks_done: int | None = None
    blocks_total: int | None = None
    blocks_failed: int | None = None
    reason: str | None = None
    way_on: str
    time: float


def compose(
    event: Literal["end", "failure", "stall", "test"],
    run_dir: Path,
    attempt: str,
    reason: str | None = None,
) -> Message:
    """Put a message about a run together, from its folder.

    Parameters
    ----------
    attempt
        Name of this attempt at the run: of one event in it, all messages have the same key.
    reason
        Why it fails or stands still; None: as its stage says.
    """
    run = RunFolder(run_dir)
    record: dict[str, Any] = {}
    stage, blocks = None, None
    try:
        record = run.record()
        stages = load_status(run_dir).stages
        stage = _stage(stages, event)
        blocks = next((s for s in stages if s.name == "predict"), None)
        if stage is not None and stage.ended_blocks:
            blocks = stage
    except InputError:
        pass  # not begun, or damaged: the message comes all the same
    reason = reason or (stage and event != "end" and stage.error) or None
    reason = None if reason is None else printable(hide(reason), lines=False)[:_MOST]
    way_on = _way_on(event, run, record.get("commands"))
    words = [f"agq: {run.path.name} on {socket.gethostname()} {_HAS[event]}"]
    if stage is not None and blocks is not None:
        words.append(f"{stage.name}, {blocks.ended_blocks}/{blocks.blocks_total or '?'} blocks")
    words += [*([reason] if reason else []), way_on]
    return Message(
        event=event,
        text=printable("; ".join(words), lines=False),
        key=f"{attempt}-{event}",
        id=str(record.get("id", "")),
        run=run.path.name,
        path=str(run.path),
        host=socket.gethostname(),
        user=user_name(),
        stage=stage and stage.name,
        blocks_done=blocks and blocks.ended_blocks,
        blocks_total=blocks and blocks.blocks_total,
        blocks_failed=blocks and blocks.failed,
        reason=reason,
        way_on=way_on,
        time=time.time(),
    )


def _stage(stages: tuple[StageStatus, ...], event: str) -> StageStatus | None:
    """Return the stage that a message is about: what fails or runs, else what is done last."""
    # A run that leaves blocks missing has ended, though its prediction has failed.
    for state in () if event == "end" else ("failed", "stopped", "running"):
        for stage in stages:
            if stage.state == state:
                return stage
    return next((s for s in reversed(stages) if s.state == "done" and s.name in _NAMED), None)


def _way_on(event: str, run: RunFolder, commands: Sequence[dict[str, Any]] | None) -> str:
    """Return the command that comes next, after those that the record of the run has."""
    path = shlex.quote(str(run.path))
    if event == "end":
        return f"agq view {path}"
    if event == "failure":
        if run.submitted():
            return f"agq resume {path}"
        argv = commands[-1].get("argv") if commands else None
        if argv and Path(argv[0]).name == "agq":
            return shlex.join(["agq", *argv[1:]])
    return f"agq status {path}"
