"""daisy, which hands out the blocks of a prediction, behind one adapter.

The dispatcher's process calls `serve`; every block thread of a worker takes blocks with a `Blocks`
of its own. Nothing else in the project imports daisy. What daisy believes is done decides nothing;
the journal does.

daisy gets a total ROI that is an exact multiple of the write shape, grown by the context, so no
choice of ``fit`` can drop an edge block. Blocks come back as write ROIs and are numbered by
`BlockGrid`: daisy's own block ids are not dense and change with the ROI.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import daisy.v2 as daisy
import numpy as np
import numpy.typing as npt
import psutil
from daisy import logging as daisy_logging
from funlib.geometry import Coordinate, Roi

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.predict import auth_proxy
from agq.blockwise.predict.paths import TASK
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.threads import start_vital

LOOPBACK = "127.0.0.1"

_FIRST_CLIENT_ID = 10**6

_logger = logging.getLogger(__name__)


def serve(
    spec: PredictSpec, numbers: npt.NDArray[np.int64], on_listening: Callable[[int], object]
) -> None:
    """Hand out blocks until none is left.

    Parameters
    ----------
    numbers
        Block numbers, (n,), n > 0.
    on_listening
        Called, from another thread, with the port on the loopback interface.
    """
    # Workers log into the run folder themselves; daisy would make ./daisy_logs.
    daisy_logging.set_log_basedir(None)
    task = _task(spec, numbers)
    before = _listening_ports()

    def tell_port() -> None:
        # daisy's API does not tell the port.
        while not (ports := _listening_ports() - before):
            time.sleep(0.01)
        on_listening(ports.pop())

    start_vital("tell-port", tell_port)
    # With another host, daisy would listen on every interface.
    states = daisy.Server().run_blockwise(task, progress=False, host=LOOPBACK, summary=False)
    _logger.info("%s", states[TASK])


def _task(spec: PredictSpec, numbers: npt.NDArray[np.int64]) -> Any:
    """Return a task that covers the bounding box of some blocks and skips the others in it."""
    grid = spec.block_grid()
    index = np.stack(np.unravel_index(numbers, grid.shape))
    first, last = index.min(axis=1), index.max(axis=1) + 1
    skip = np.ones(last - first, bool)
    skip[tuple(index - first[:, None])] = False

    write = Coordinate(grid.write_shape) * grid.voxel_size
    before = Coordinate(grid.before) * grid.voxel_size
    after = Coordinate(grid.after) * grid.voxel_size
    total = Roi(grid.offset + Coordinate(first) * write, Coordinate(last - first) * write)
    task = daisy.Task(
        TASK,
        total_roi=total.grow(before, after),
        read_roi=Roi(-before, before + write + after),
        write_roi=Roi((0, 0, 0), write),
        # Workers join through the session file, wherever they were started.
        process_function=None,
        read_write_conflict=False,
        fit="shrink",
        max_workers=max(1, spec.workers),
        max_retries=spec.retries,
        timeout=spec.timeout_s,
        # Restarts are the coordinator's business; daisy must never give a task up for them.
        max_worker_restarts=2**31 - 1,
        skip_mask=skip,
    )
    if tuple(task.block_grid_shape) != skip.shape:
        raise RuntimeError(f"daisy sees {task.block_grid_shape} blocks, expected {skip.shape}")
    return task


def _listening_ports() -> set[int]:
    connections = psutil.Process().net_connections(kind="tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


@dataclass(frozen=True)
class TakenBlock:
    """A block that this process holds."""

    _block: Any
    _grid: BlockGrid

    @property
    def number(self) -> int:
        """Its number.

        Raises
        ------
        ValueError
            If daisy's ROI is not that of a block of the grid.
        """
        return self._grid.number_at(self._block.write_roi)

    def fail(self) -> None:
        """Give the block back as failed; daisy hands it out again, as often as the run retries."""
        self._block.status = daisy.BlockStatus.FAILED


class Blocks:
    """The blocks that a dispatcher hands out, taken one at a time by one thread.

    (One client could acquire several blocks before it releases the first, but only by entering its
    context managers out of order; a client per thread keeps daisy's block timeout, its accounting
    and its error paths as they are meant.)
    """

    def __init__(self, session: Session, grid: BlockGrid) -> None:
        self._session = session
        self._grid = grid
        self._client: Any = None
        # A refused connection is how every run ends, not a warning.
        logging.getLogger("daisy").setLevel(logging.ERROR)

    @contextmanager
    def take(self) -> Iterator[TakenBlock | None]:
        """Take a block, and give it back at the end of the context.

        None means that there is none *now*: one that another worker holds may still come back.

        Raises
        ------
        Exception
            If the dispatcher has ended or was killed; of whatever type daisy raises.
        """
        if self._client is None:
            self._client = self._connect()
        with self._client.acquire_block() as block:
            if block is None:
                # This client never gets a block again; the next call connects a new one.
                self._client = None
            yield None if block is None else TakenBlock(block, self._grid)

    def _connect(self) -> Any:
        host, port = self._session.host, self._session.port
        if self._session.token:
            host, port = LOOPBACK, auth_proxy.connect(host, port, self._session.token)
        client = daisy.Client(
            daisy.Context(
                hostname=host,
                port=port,
                task_id=TASK,
                # Outside the ids that the server gives to workers it starts itself.
                worker_id=_FIRST_CLIENT_ID + secrets.randbelow(2**31),
                logdir="",
                resource_tracking=0,
            )
        )
        if not client.connected:
            raise ConnectionError(f"nothing listens at {host}:{port}")
        return client
