"""A dask client: on a cluster of this machine's processes, or on a scheduler that runs already."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any

from distributed import Client, LocalCluster, Nanny, Status
from distributed.security import Security

from agq.blockwise.spawn import spawning_apart
from agq.blockwise.stitch.settings import DaskSettings
from agq.errors import InputError


class _ClosedOnFailure(Client):
    """Closes itself when it cannot connect: dask leaves it to the garbage, with its event loop."""

    def start(self, **options: Any) -> None:
        try:
            super().start(**options)
        except BaseException:
            self.close()
            self._loop_runner.stop()  # on some failures dask has closed the client, but for its loop
            raise


class _Nanny(Nanny):
    """Starts, and restarts, a worker process that does not import the main script."""

    async def instantiate(self) -> Status:
        # Ctrl-C reaches every process of a terminal. The workers, started from this thread, inherit
        # that it is blocked: the command ends them. (The tracker's start would unblock it.)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        with spawning_apart():
            return await super().instantiate()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait: dask cannot be interrupted while it starts or stops."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda signum, _: came.append(signum))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


@contextmanager
def dask_client(
    settings: DaskSettings | None = None, *, processes: bool = True, timeout: float = 30.0
) -> Iterator[Client]:
    """Yield a dask client and close what was started for it.

    Without an address a cluster is started on this machine, on loopback only. Its workers have one
    thread each: the tasks hold the interpreter lock between compiled parts.

    Parameters
    ----------
    settings
        Address, certificates and workers; None: the defaults.
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
    settings = settings or DaskSettings()
    if settings.address is not None:
        with _connect(settings.address, settings, timeout) as client:
            yield client
        return
    count = settings.workers or len(os.sched_getaffinity(0))
    with ExitStack() as stack:
        try:
            with _signals_wait():
                cluster = LocalCluster(
                    n_workers=count if processes else 1,
                    threads_per_worker=1 if processes else count,
                    processes=processes,
                    worker_class=_Nanny if processes else None,
                    # Threads talk inside the process, without a port.
                    host="127.0.0.1" if processes else None,
                    dashboard_address="127.0.0.1:0",
                    # A task's error is raised here as one line; dask would also print a traceback.
                    silence_logs=logging.CRITICAL,
                    # A task near the root may need more than an equal share of the memory: dask
                    # would kill it while the machine still has room.
                    memory_limit=0,
                )
                stack.enter_context(cluster)
                client = stack.enter_context(Client(cluster, timeout=timeout))
            yield client
        finally:
            with _signals_wait():
                stack.close()


def _connect(address: str, settings: DaskSettings, timeout: float) -> Client:
    security = _security(settings)
    try:
        return _ClosedOnFailure(address, timeout=timeout, security=security)
    except (OSError, ValueError, TypeError) as error:
        hint = ""
        if security is None and address.startswith("tls://"):
            hint = "; name stitch.dask.ca_file, cert_file and key_file"
        raise InputError(f"dask scheduler {address}: cannot connect ({error}){hint}") from None


def _security(settings: DaskSettings) -> Security | None:
    """Return the certificates as dask takes them; None: those of its own configuration, if any."""
    if settings.ca_file is None:
        return None
    files = settings.model_dump(include={"ca_file", "cert_file", "key_file"})
    for name, path in files.items():
        try:
            path.read_bytes()
        except OSError as error:
            raise InputError(f"stitch.dask.{name}: {path}: {error.strerror}") from None
    ca_file, cert_file, key_file = map(str, files.values())
    return Security(
        tls_ca_file=ca_file,
        tls_client_cert=cert_file,
        tls_client_key=key_file,
        require_encryption=True,
    )
