"""Stitch a run in a process of its own, and die by SIGKILL where told.

Arguments: spec file, worker processes (0: threads of dask, -1: no dask), and "never", "STEP DONE"
(kill once this much of a step is reported), or "after SECONDS" of stitching.
"""

import os
import signal
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.run import StitchSpec, run_stitch
from agq.blockwise.stitch.settings import DaskSettings


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    spec = StitchSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    processes, when = int(sys.argv[2]), sys.argv[3:]

    def progress(step: str, done: int, total: int) -> None:
        if when[0] == step and done >= int(when[1]):
            die()

    dask = dask_client(DaskSettings(workers=max(processes, 0) or 2), processes=processes > 0)
    with nullcontext() if processes < 0 else dask as client:
        if when[0] == "after":
            threading.Timer(float(when[1]), die).start()
        run_stitch(spec, client, progress)


if __name__ == "__main__":
    main()
