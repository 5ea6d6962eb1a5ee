"""The program of a job of dask workers: dask's own, but for what others on the node could use.

Arguments are those of ``dask worker``. Its web server would listen on all addresses of the node,
and its temporary folder, which comes first on the import path, may be one that somebody else made.
"""

import sys

import dask
from distributed.cli.dask_worker import main as dask_worker

from agq import caches
from agq.blockwise.stitch.cluster import QuietWorker
from agq.blockwise.storage.logs import cap_output


def main(arguments: list[str]) -> None:
    """Work until the scheduler has gone; see the module."""
    cap_output()
    dask.config.set(temporary_directory=str(caches.temporary_folder()))
    quiet = f"{QuietWorker.__module__}.{QuietWorker.__qualname__}"
    dask_worker([*arguments, "--no-dashboard", "--worker-class", quiet])


if __name__ == "__main__":
    main(sys.argv[1:])
