"""Which messages about a run were sent: read for its status, written by `agq.pipeline.notify`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from agq.pipeline.records import Text, Time
from agq.reading import read_file

_MOST_BYTES = 2**16


Way = Literal["command", "webhook"]


class Notice(BaseModel):
    """One message, by one way."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    event: Literal["end", "failure", "stall"]
    way: Way
    time: Time
    """When it was sent, or tried, seconds since the epoch."""
    problem: Text | None = None
    """Why it could not be sent."""


class Notices(BaseModel):
    """The messages of one attempt at a run: of one command, or of one submission."""

    model_config = ConfigDict(extra="forbid")

    attempt: str
    notices: list[Notice] = []


def folder(run_dir: Path) -> Path:
    """Return the folder in a run folder for what messages need."""
    return run_dir / "notify"


def notices_path(run_dir: Path) -> Path:
    """Return the file with the messages of the last attempt."""
    return folder(run_dir) / "sent.json"


def read_notices(run_dir: Path) -> Notices | None:
    """Return the messages of the last attempt; None if there are none or they cannot be read."""
    try:
        text = read_file(notices_path(run_dir), most=_MOST_BYTES, within=run_dir)
        return Notices.model_validate_json(text)
    except (OSError, ValueError, ValidationError):
        return None
