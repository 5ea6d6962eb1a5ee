"""The program of a job of dask workers: dask's own, but for what others on the node could use.

Arguments are those of ``dask worker``, and ``--certificates FOLDER`` with the files `CERTIFICATES`.
Its web server would listen on all addresses of the node, and its temporary folder, which comes
first on the import path, may be one that somebody else made.
"""

import argparse
import sys
from pathlib import Path

import dask
from distributed.cli.dask_worker import main as dask_worker

from agq import caches
from agq.blockwise.stitch.cluster import QuietWorker
from agq.blockwise.storage.logs import cap_output

CERTIFICATES = {"ca_file": "ca-file", "cert": "worker.cert", "key": "worker.key"}
"""Names of a worker's certificates, as dask's `Security` and its configuration have them."""


def main(arguments: list[str]) -> None:
    """Work until the scheduler has gone; see the module."""
    cap_output()
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--certificates", type=Path, required=True)
    own, others = parser.parse_known_args(arguments)
    # Their text: dask takes a path with a line break for one.
    texts = {key: (own.certificates / name).read_text() for name, key in CERTIFICATES.items()}
    dask.config.set({f"distributed.comm.tls.{key}": text for key, text in texts.items()})
    dask.config.set({"distributed.comm.require-encryption": True})
    dask.config.set(temporary_directory=str(caches.temporary_folder()))
    quiet = f"{QuietWorker.__module__}.{QuietWorker.__qualname__}"
    dask_worker([*others, "--no-dashboard", "--worker-class", quiet])


if __name__ == "__main__":
    main(sys.argv[1:])
