"""A dask client: on a cluster of this machine's processes, or on a scheduler that runs already."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distributed import Client, LocalCluster, Nanny, Status
from distributed.security import Security

from agq.blockwise.spawn import spawning_apart
from agq.errors import InputError


@dataclass(frozen=True)
class TlsFiles:
    """Certificates for a scheduler at a ``tls://`` address, as PEM files.

    Attributes
    ----------
    ca_file
        Authority that signed the certificates of scheduler and workers.
    cert_file, key_file
        Certificate and private key of this client.
    """

    ca_file: Path
    cert_file: Path
    key_file: Path

    def security(self) -> Security:
        """Return what dask takes.

        Raises
        ------
        InputError
            If a file cannot be read.
        """
        for name in ("ca_file", "cert_file", "key_file"):
            try:
                getattr(self, name).read_bytes()
            except OSError as error:
                path = getattr(self, name)
                raise InputError(f"stitch.dask.{name}: {path}: {error.strerror}") from None
        return Security(
            tls_ca_file=str(self.ca_file),
            tls_client_cert=str(self.cert_file),
            tls_client_key=str(self.key_file),
            require_encryption=True,
        )


class _Nanny(Nanny):
    """Starts, and restarts, a worker process that does not import the main script."""

    async def instantiate(self) -> Status:
        with spawning_apart():
            return await super().instantiate()


@contextmanager
def local_client(
    address: str | None = None,
    *,
    tls: TlsFiles | None = None,
    workers: int | None = None,
    processes: bool = True,
    timeout: float = 30.0,
) -> Iterator[Client]:
    """Yield a dask client and close what was started for it.

    Parameters
    ----------
    address
        Of a running scheduler (``tcp://host:8786``, ``tls://...``); its workers must see the run
        folder under the same path. None: start a cluster on this machine, on loopback only.
    tls
        Certificates for a ``tls://`` address; None: those of dask's own configuration, if any.
    workers
        Worker processes of the local cluster; None: one per usable core. They have one thread
        each: the tasks hold the interpreter lock between compiled parts.
    processes
        False: workers are threads of this process (quick to start; for small volumes).
    timeout
        Seconds to wait for the scheduler.

    Yields
    ------
    Client
        ``client.dashboard_link`` is the address of dask's web page.

    Raises
    ------
    InputError
        If nothing answers at the address, or the certificates do not fit.
    """
    if address is not None:
        with _connect(address, tls, timeout) as client:
            yield client
        return
    count = workers or len(os.sched_getaffinity(0))
    with (
        LocalCluster(
            n_workers=count if processes else 1,
            threads_per_worker=1 if processes else count,
            processes=processes,
            worker_class=_Nanny if processes else None,
            # Threads talk inside the process, without a port.
            host="127.0.0.1" if processes else None,
            dashboard_address="127.0.0.1:0",
            # A task's error is raised here as one line; dask would also print it as a traceback.
            silence_logs=logging.CRITICAL,
            # A task near the root may need more than an equal share of the memory: dask would kill
            # it while the machine still has room.
            memory_limit=0,
        ) as cluster,
        Client(cluster, timeout=timeout) as client,
    ):
        yield client


def _connect(address: str, tls: TlsFiles | None, timeout: float) -> Client:
    security = None if tls is None else tls.security()
    try:
        return Client(address, timeout=timeout, security=security)
    except (OSError, ValueError, TypeError) as error:
        hint = ""
        if tls is None and address.startswith("tls://"):
            hint = "; name stitch.dask.ca_file, cert_file and key_file"
        raise InputError(f"dask scheduler {address}: cannot connect ({error}){hint}") from None
