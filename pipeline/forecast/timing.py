"""How long one block takes: measured once, kept in the run folder for later plans."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from agq.blockwise.storage.files import make_folder, write_atomic
from agq.errors import InputError
from agq.pipeline.folder import TIMING
from agq.reading import read_record

Seconds = Annotated[float, Field(ge=0, le=1e9)]


class Timing(BaseModel):
    """What computing one block took."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    """`timing_key` of what was timed."""

    seconds: Seconds
    """For one block, when the predictor is warm."""

    load_s: Seconds
    """Until the predictor was loaded."""

    worker_bytes: NonNegativeInt
    """Peak memory of the process."""

    device: str
    """The GPU's name, or ``cpu``."""

    host: str
    """Machine, by its name on the cluster."""

    time: Annotated[float, Field(ge=0, le=1e11)]
    """When it was measured, seconds since the epoch."""

    file_bytes: dict[str, NonNegativeInt]
    """Sizes of the files of the block: ``fragments``, ``sidecars``, ``affinities`` if kept."""

    @property
    def where(self) -> str:
        """Say on what, and where it was measured."""
        return f"{self.device} ({self.host})"

    def save(self, run_dir: Path) -> None:
        """Keep it in a run folder, which is made if need be."""
        make_folder(run_dir, own=True)
        write_atomic(run_dir / TIMING, self.model_dump_json(indent=1).encode(), mode=0o644)

    @classmethod
    def load(cls, run_dir: Path, key: str) -> Self | None:
        """Return the one of a run folder, if it is of the same things; damaged ones are none."""
        with suppress(OSError, InputError, ValidationError, ValueError):
            timing = cls.model_validate(read_record(run_dir / TIMING))
            if timing.key == key and timing.time <= time.time():
                return timing
        return None


def timing_key(*deciding: Any) -> str:
    """Name what decides how long a block takes: equal values of plain data give equal names."""
    text = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
