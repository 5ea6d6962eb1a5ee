"""The dispatcher of a prediction: daisy's server, in a process of its own.

Run as ``python -m agq.blockwise.predict.dispatcher RUN_DIR PARENT_PID ALONE`` with the block
numbers (npy, int64) on stdin; exits 0 when every block has been reported done or has failed for
good.

A process of its own, because daisy's server cannot be asked to stop, and a malformed message can
make it panic: the coordinator kills or replaces it without harm.
"""

import io
import logging
import os
import secrets
import socket
import sys
from pathlib import Path

import numpy as np

from agq.blockwise.predict import daisy
from agq.blockwise.predict.auth_proxy import AuthProxy
from agq.blockwise.predict.local_processes import die_with_parent
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.blockwise.storage.logs import cap_output
from agq.credentials import log_to_stderr


def publish(run_dir: Path, spec: PredictSpec, port: int, *, alone: bool) -> None:
    """Tell workers where to connect: daisy's port, or that of a proxy in front of it.

    Called from a thread whose errors end the process: no worker could ever join it.
    """
    session = Session(
        id=secrets.token_hex(8),
        host=daisy.LOOPBACK,
        port=port,
        revision=spec.revision,
        alone=alone,
        machine=socket.gethostname(),
    )
    listen = spec.listen
    if listen is not None:
        token = secrets.token_hex(32)
        proxy = AuthProxy(listen, port, token)
        session = session.model_copy(update={"host": listen, "port": proxy.port, "token": token})
    session.save(run_dir)


def main(arguments: list[str]) -> int:
    """Serve the blocks on stdin; see the module."""
    run_dir, parent, alone = Path(arguments[0]), int(arguments[1]), arguments[2] == "alone"
    die_with_parent(parent)
    cap_output()
    log_to_stderr()
    numbers = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    spec = PredictSpec.load(run_dir, to_run=True)
    daisy.serve(spec, numbers, lambda port: publish(run_dir, spec, port, alone=alone))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    # daisy's server threads may linger; nothing is left for them to do.
    os._exit(status)
