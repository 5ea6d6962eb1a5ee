"""A dask client: on a cluster of this machine's processes, or on a scheduler that runs already.

dask runs the code that any client sends it, and every user of a machine can connect to its loopback
ports. So a cluster that is started here talks TLS with certificates that only its own processes
have, and none of them serves a web page.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import resource_tracker
from typing import Any

from distributed import Client, Nanny, Scheduler, SpecCluster, Status, Worker
from distributed.security import Security

from agq import caches
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
            # On some failures dask has closed the client already, but for its loop.
            self._loop_runner.stop()
            raise


class _NoWebServer:
    """dask has one in each process; without its page too, it tells anybody about the tasks."""

    def start_http_server(self, *_arguments: Any, **_options: Any) -> None:
        """Start none."""


class QuietScheduler(_NoWebServer, Scheduler):
    """A scheduler without a web server."""


class QuietWorker(_NoWebServer, Worker):
    """A worker without a web server."""


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

    Without an address a cluster is started on this machine, on loopback only, which nobody else can
    use. Its workers have one thread each: the tasks hold the interpreter lock between compiled
    parts.

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
        The client.

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
                cluster = stack.enter_context(_local_cluster(count, processes))
                client = stack.enter_context(Client(cluster, timeout=timeout))
            yield client
        finally:
            with _signals_wait():
                stack.close()


def _local_cluster(count: int, processes: bool) -> SpecCluster:
    """Start a cluster (as `LocalCluster` does, which has no choice of the scheduler's class)."""
    common: dict[str, Any] = {
        "dashboard": False,
        # dask puts this folder on the import path; its own choice is one that others may have made.
        "local_directory": str(caches.temporary_folder()),
        # Threads talk inside the process, without a port.
        "protocol": "inproc://",
    }
    if processes:
        security = Security.temporary()
        common |= {"protocol": "tls://", "host": "127.0.0.1", "security": security}
    # A task's error is raised here as one line; dask would also print a traceback.
    silence = logging.CRITICAL
    worker = common | {
        "nthreads": 1 if processes else count,
        # A task near the root may need more than an equal share of the memory: dask would kill it
        # while the machine still has room.
        "memory_limit": 0,
        "silence_logs": silence,
    }
    if processes:
        worker["worker_class"] = QuietWorker
    spec = {"cls": _Nanny if processes else QuietWorker, "options": worker}
    return SpecCluster(
        scheduler={"cls": QuietScheduler, "options": common},
        workers=dict.fromkeys(range(count if processes else 1), spec),
        security=common.get("security"),
        silence_logs=silence,
    )


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
