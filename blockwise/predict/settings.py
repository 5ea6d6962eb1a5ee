"""The settings of the workers of a prediction."""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from agq.settings import Host, Settings


class ProcessSettings(Settings):
    """How many workers this machine has."""

    count: NonNegativeInt | Literal["auto"] = "auto"
    """Worker processes; `auto` is one per visible GPU, or one per CPU core that memory allows; 0,
    with `host`: others do all."""

    host: Host | None = None
    """Address or name of this machine on a network, from which `agq worker RUN` may join, with the
    run's token and TLS; default: processes of this machine only."""

    threads: PositiveInt = 1
    """CPU threads per worker for the network. Sums on a CPU depend in their last bits on the
    number of threads, so it is fixed for a run and does not follow the number of workers."""


class AttemptSettings(Settings):
    """How far workers read ahead, and what is tried again when they fail.

    The time of a block runs from handing it to a worker until it is written, its wait behind the
    blocks read ahead included. Restarts count in a row, with no block finished in between.
    """

    prefetch: PositiveInt = 2
    """Blocks read ahead per worker while another is computed."""

    retries: NonNegativeInt = 2
    """How often a failed block is tried again in the same run."""

    timeout_s: PositiveInt = 3600
    """A block that takes longer is given to another worker."""

    max_restarts: PositiveInt = 100
    """How many killed workers are replaced before the run is given up."""


class WorkersSettings(AttemptSettings, ProcessSettings):
    """Prediction worker processes on this machine."""

    @model_validator(mode="after")
    def _some_workers(self) -> Self:
        if self.count == 0 and self.host is None:
            raise ValueError("workers.count: 0 needs workers.host, where others may join")
        return self
