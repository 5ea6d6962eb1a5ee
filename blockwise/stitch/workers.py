"""Who runs the tasks of a stitch: the process that asks for it, or workers of dask.

Nothing large passes through dask's scheduler: tasks hold paths and read and write files. Every task
may run twice or be cut off anywhere: its files appear whole or not at all, with the same bytes.

dask takes seconds to load and to start its processes, longer than all the tasks of a small stitch.
So this module does not import it, and a small stitch does without.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from agq import waiting
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.writer import end_journal
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.threads import start_aside
from agq.errors import DamagedError, RunStoppedError, repairable

if TYPE_CHECKING:
    from distributed import Client, Future, Worker

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, items done and items in all."""

AnyClient: TypeAlias = "Client | LazyClient | None"
"""Who runs tasks: workers of a dask client, which may start when it is first used, or this process
(None), one task after the other."""

_STRAGGLER_S: Final = 0.2
_LOOK_S: Final = 5.0

_FEW_BLOCKS: Final = 512
_FEW_VOXELS: Final = 1 << 24

_MOST_SUBMITTED: Final = 2**15
"""Tasks that the scheduler has at a time, whatever the volume: enough for thousands of workers."""

Items = TypeVar("Items", bound=Sequence[Any])


class StitchError(RunStoppedError):
    """A part of the stitch failed at run time; stitching again does only what is missing."""


@dataclass(frozen=True)
class Task(ABC):
    """Work for one worker; picklable, and small.

    Attributes
    ----------
    items
        What the task works on.
    """

    items: Sequence[Any]

    @property
    def size(self) -> int:
        """Number of items for the progress."""
        return len(self.items)

    @abstractmethod
    def run(self) -> Any:
        """Do the work, and leave nothing else changed in the process."""


@dataclass(frozen=True)
class Workers(ABC):
    """Whoever runs the tasks that write into one folder.

    Attributes
    ----------
    folder
        Folder that all tasks write into.
    on_progress
        Called with the name of a step, items done and items in all.
    """

    folder: Path
    on_progress: Progress | None

    @property
    @abstractmethod
    def cores(self) -> int:
        """How many tasks run at a time, at least 1."""

    @abstractmethod
    def addresses(self) -> frozenset[str]:
        """Return the addresses of the workers in other processes."""

    @abstractmethod
    def wait_for_stragglers(self) -> None:
        """Wait until the workers have ended what an earlier command left running."""

    @abstractmethod
    def run(self, step: str, tasks: Sequence[Task], done: int = 0) -> list[Any]:
        """Run tasks.

        Parameters
        ----------
        step
            Name for the progress.
        done
            Items done before.

        Returns
        -------
        list
            Results, in the order of completion.

        Raises
        ------
        StitchError
            If workers kept dying, none is connected, or the scheduler is gone. Other errors of a
            task are raised as they are. The remaining tasks are cancelled.
        """

    @abstractmethod
    def end_journal(self, folder: Path) -> None:
        """Close the journals that tasks have written in a folder: its work is done."""

    @abstractmethod
    def close(self) -> None:
        """Close what tasks have left open in this process."""

    def batches(self, items: Items, most: int, *, share: int) -> list[Items]:
        """Cut items into parts of at most ``most``, and at least about ``share`` for each core."""
        size = max(1, min(most, -(-len(items) // (share * self.cores))))
        parts: list[Any] = [items[at : at + size] for at in range(0, len(items), size)]
        return parts

    def _report(self, step: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(step, done, total)


@dataclass(frozen=True)
class OwnProcess(Workers):
    """Runs tasks in this process and thread, one after the other."""

    @property
    def cores(self) -> int:
        """How many tasks run at a time."""
        return 1

    def addresses(self) -> frozenset[str]:
        """Return that there are no other processes."""
        return frozenset()

    def wait_for_stragglers(self) -> None:
        """Return at once: the tasks of an earlier command have ended with it."""

    def run(self, step: str, tasks: Sequence[Task], done: int = 0) -> list[Any]:
        """Run tasks; see `Workers.run`."""
        total = done + sum(task.size for task in tasks)
        results: list[Any] = []
        self._report(step, done, total)
        try:
            for task in tasks:
                results.append(task.run())
                done += task.size
                self._report(step, done, total)
        except DamagedError as error:
            raise repairable(error, self.folder) from None
        return results

    def end_journal(self, folder: Path) -> None:
        """Close the journals that tasks have written in a folder."""
        end_journal(folder)

    def close(self) -> None:
        """Close the journals of tasks that did not come to the end."""
        end_journal(self.folder)


class LazyClient:
    """A dask client that is made, with workers for it, when it is first used.

    Parameters
    ----------
    make
        Makes the client.
    cores
        Threads that its workers will have in all.
    """

    def __init__(self, make: Callable[[], Client], cores: int) -> None:
        self._make = make
        self._made: Client | None = None
        self.cores = cores

    def client(self) -> Client:
        """Return the client; the first call starts it."""
        if self._made is None:
            self._made = self._make()
        return self._made


@dataclass(frozen=True)
class DaskWorkers(Workers):
    """Workers of dask that write into one folder.

    Attributes
    ----------
    source
        Client; its workers must see the folder under the same path.
    on_note
        Called with a line about what is waited for.
    wait_s
        Seconds without any worker after which a scheduler of one's own is given up. (Clusters that
        were started for the client have their own care for workers.)
    """

    source: Client | LazyClient
    on_note: Callable[[str], None] | None = None
    wait_s: float = 300.0

    @property
    def client(self) -> Client:
        """The client, which may start now."""
        return self.source.client() if isinstance(self.source, LazyClient) else self.source

    @property
    def cores(self) -> int:
        """Threads of all workers, at least 1."""
        if isinstance(self.source, LazyClient):
            return self.source.cores
        with _scheduler_may_go():
            return max(1, sum(self.client.ncores().values()))

    def addresses(self) -> frozenset[str]:
        """Return the addresses of the workers."""
        with _scheduler_may_go():
            return frozenset(self.client.ncores())

    def wait_for_stragglers(self) -> None:
        """Wait until the workers have ended what an earlier command left running.

        A scheduler that outlives its clients lets a task that runs go on after its client has gone.
        It would write into folders that the next command has emptied, and be taken for that one's
        work.
        """
        if isinstance(self.source, LazyClient):
            return  # its workers end with the command that started them
        mark = _mark(self.folder)
        noted = False
        with _scheduler_may_go():
            while running := sum(self.client.run(_running, mark, on_error="ignore").values()):
                if not noted:
                    self._note(
                        f"waiting for {running} tasks that an earlier command left running in"
                        f" {self.folder}"
                    )
                    noted = True
                time.sleep(_STRAGGLER_S)

    def run(self, step: str, tasks: Sequence[Task], done: int = 0) -> list[Any]:
        """Run tasks; see `Workers.run`."""
        total = done + sum(task.size for task in tasks)
        results: list[Any] = []
        self._report(step, done, total)
        if not tasks:
            return results  # without a client, which may have to be started
        from distributed import KilledWorker, as_completed
        from distributed.client import FutureCancelledError

        # A random part: dask would otherwise take a task of an earlier stitch for the same one.
        name = f"{step}{_mark(self.folder)}{secrets.token_hex(4)}"
        with _scheduler_may_go():
            waiting = enumerate(tasks)
            futures: dict[Future, int] = {}

            def submit(count: int) -> list[Future]:
                new = {
                    self.client.submit(task.run, key=f"{name}-{i}", pure=False): task.size
                    for i, task in itertools.islice(waiting, count)
                }
                futures.update(new)
                return list(new)

            try:
                with self._watched(futures) as given_up:
                    ended = as_completed(submit(_MOST_SUBMITTED))
                    for future in ended:
                        results.append(future.result())
                        done += futures.pop(future)
                        self._report(step, done, total)
                        ended.update(submit(1))
            except DamagedError as error:
                raise repairable(error, self.folder) from None
            except KilledWorker as error:
                raise StitchError(
                    f"{step}: workers died on a task again and again (out of memory?): {error}"
                ) from None
            except FutureCancelledError as error:
                lost = f"lost the dask scheduler ({error})"
                raise StitchError(f"{step}: {(*given_up, lost)[0]}") from None
            finally:
                self.client.cancel(list(futures))
        return results

    def end_journal(self, folder: Path) -> None:
        """Close the journals that tasks have written in a folder: its work is done."""
        with _scheduler_may_go():
            self.client.run(end_journal, folder, on_error="ignore")

    def close(self) -> None:
        """Return at once: what tasks have left open goes with the processes of the workers."""

    @contextmanager
    def _watched(self, futures: Mapping[Future, int]) -> Iterator[list[str]]:
        """Cancel the tasks if no worker is connected for too long; the list then says so."""
        reasons: list[str] = []
        if self.client.cluster is not None:
            yield reasons
            return
        over = threading.Event()
        address = getattr(self.client.scheduler, "address", "")
        what = f"dask scheduler {address}: no worker is connected"

        def watch() -> None:
            since, told = time.monotonic(), False
            while not over.wait(min(_LOOK_S, self.wait_s / 4)):
                here = None
                # A scheduler that is lost cancels the tasks; whatever else it says, look again.
                with suppress(Exception):
                    here = bool(self.client.ncores())
                if here is None:
                    continue
                if here:
                    since, told = time.monotonic(), False
                    continue
                if not told:
                    self._note(
                        f"{what}; waiting {self.wait_s:g} s (stitch.dask.wait_s) for one, as"
                        f" started by: dask worker {address}"
                    )
                    told = True
                if time.monotonic() - since > self.wait_s:
                    reasons.append(f"{what} for {self.wait_s:g} s; start some and stitch again")
                    self.client.cancel(list(futures))
                    return

        thread = start_aside("watch-workers", watch)
        try:
            yield reasons
        finally:
            over.set()
            thread.join()

    def _note(self, text: str) -> None:
        if self.on_note is not None:
            self.on_note(text)


def workers_of(
    client: AnyClient,
    folder: Path,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
    wait_s: float = 300.0,
) -> Workers:
    """Return who runs the tasks that write into a folder.

    Parameters
    ----------
    client
        Of dask; its workers must see the folder under the same path. None: this process.
    folder, on_progress
        See `Workers`.
    on_note, wait_s
        See `DaskWorkers`.
    """
    if client is None:
        return OwnProcess(folder, on_progress)
    return DaskWorkers(folder, on_progress, client, on_note, wait_s)


def is_small(grid: BlockGrid, blocks: int) -> bool:
    """Tell whether the stitch of so many blocks takes less time than dask's processes to start."""
    return blocks <= _FEW_BLOCKS and blocks * math.prod(grid.write_shape) <= _FEW_VOXELS


def stitch_processes(settings: DaskSettings, *, small: bool, cores: int | None = None) -> int:
    """Return how many processes a stitch without a scheduler's address starts.

    Parameters
    ----------
    settings, small, cores
        As of `lazy_client`.

    Returns
    -------
    int
        0: the process that asks for the stitch does it.
    """
    if settings.workers is not None:
        return settings.workers
    return 0 if small else cores or len(os.sched_getaffinity(0))


@contextmanager
def lazy_client(
    settings: DaskSettings, *, small: bool = False, cores: int | None = None
) -> Iterator[AnyClient]:
    """Yield what runs the tasks of a stitch, as the settings say.

    A cluster of this machine's processes is started when it is first used: a stitch that has
    nothing to do needs none. A scheduler that runs already may still hold tasks of an earlier
    command, so it is connected at once.

    Parameters
    ----------
    settings
        Address, certificates and number of workers.
    small
        Whether this process does it where the settings name no workers, see `is_small`.
    cores
        Workers where the settings name none; None: one per core that this process may use.

    Yields
    ------
    AnyClient
        As `workers_of` takes it.

    Raises
    ------
    InputError
        If nothing answers at the address, or the certificates do not fit.
    """
    if settings.address is not None:
        from agq.blockwise.stitch.cluster import dask_client

        with dask_client(settings) as client:
            yield client
        return
    count = stitch_processes(settings, small=small, cores=cores)
    if not count:
        yield None
        return
    with ExitStack() as stack:

        def make() -> Client:
            waiting.doing("starting processes")
            from agq.blockwise.stitch.cluster import dask_client

            here = settings.model_copy(update={"workers": count})
            return stack.enter_context(dask_client(here))

        yield LazyClient(make, count)


@contextmanager
def _scheduler_may_go() -> Iterator[None]:
    """Raise a `StitchError` if the connection to the scheduler is lost meanwhile."""
    from distributed.comm import CommClosedError

    try:
        yield
    except CommClosedError as error:
        raise StitchError(f"lost the dask scheduler ({error})") from None


def _running(mark: str, dask_worker: Worker) -> int:
    """Count the tasks of a worker that write into a folder."""
    with dask_worker.active_threads_lock:
        return sum(mark in str(key) for key in dask_worker.active_threads.values())


def _mark(folder: Path) -> str:
    """Return what the names of all tasks that write into a folder hold."""
    return f"-{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}-"
