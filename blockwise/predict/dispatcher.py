"""The daisy server of a prediction, in a process of its own.

Run as ``python -m agq.blockwise.predict.dispatcher RUN_DIR PARENT_PID ALONE`` with the block
numbers (npy, int64) on stdin; exits 0 when every block has been reported done or has failed for
good.

A process of its own, because daisy's server cannot be asked to stop, and a malformed message can
make it panic: the coordinator kills or replaces it without harm. What daisy believes is done
decides nothing; the journal does.

daisy gets a total ROI that is an exact multiple of the write shape, grown by the context, so no
choice of ``fit`` can drop an edge block. Blocks come back as write ROIs and are numbered by
`BlockGrid`: daisy's own block ids are not dense and change with the ROI.
"""

import io
import logging
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

import daisy.v2 as daisy
import numpy as np
import numpy.typing as npt
import psutil
from daisy import logging as daisy_logging
from funlib.geometry import Coordinate, Roi

from agq.blockwise.predict.auth_proxy import Gate
from agq.blockwise.predict.local_processes import die_with_parent
from agq.blockwise.predict.paths import TASK
from agq.blockwise.predict.spec import PredictSpec, Session

_LOOPBACK = "127.0.0.1"

_logger = logging.getLogger(__name__)


def make_task(spec: PredictSpec, numbers: npt.NDArray[np.int64]) -> Any:
    """Return the daisy task that hands out some blocks.

    Parameters
    ----------
    spec
        The prediction.
    numbers
        Block numbers, (n,), n > 0. The task covers their bounding box in blocks and skips the
        others in it.
    """
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


def serve(run_dir: Path, numbers: npt.NDArray[np.int64], *, alone: bool) -> bool:
    """Hand out blocks until none is left; True if daisy saw every one succeed."""
    spec = PredictSpec.load(run_dir)
    # Workers log into the run folder themselves; daisy would make ./daisy_logs.
    daisy_logging.set_log_basedir(None)
    task = make_task(spec, numbers)
    known = _listening_ports()
    publisher = threading.Thread(
        target=_publish, args=(run_dir, spec.listen, known, alone), name="publish", daemon=True
    )
    publisher.start()
    # Never another name: daisy would listen on every interface.
    states = daisy.Server().run_blockwise(task, progress=False, host=_LOOPBACK, summary=False)
    state = states[TASK]
    _logger.info("%s", state)
    return bool(state.completed_count == state.total_block_count)


def _publish(run_dir: Path, listen: str | None, known: set[int], alone: bool) -> None:
    """Tell workers where daisy listens, which its API keeps to itself, or the gate before it."""
    while not (ports := _listening_ports() - known):
        time.sleep(0.01)
    session = Session(id=secrets.token_hex(8), host=_LOOPBACK, port=ports.pop(), alone=alone)
    if listen is not None:
        token = secrets.token_hex(32)
        try:
            gate = Gate(listen, session.port, token)
        except (OSError, ValueError) as error:
            # Nobody could ever join: the coordinator must see this process end.
            _logger.error("cannot listen on %s: %s", listen, error)
            logging.shutdown()
            os._exit(1)
        session = session.model_copy(update={"host": listen, "port": gate.port, "token": token})
    session.save(run_dir)


def _listening_ports() -> set[int]:
    connections = psutil.Process().net_connections(kind="tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def main(arguments: list[str]) -> int:
    """Serve the blocks on stdin; see the module."""
    run_dir, parent, alone = arguments
    die_with_parent(int(parent))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    numbers = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    serve(Path(run_dir), numbers, alone=alone == "alone")
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    # daisy's server threads may linger; nothing is left for them to do.
    os._exit(status)
