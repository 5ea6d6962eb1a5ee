"""Steps of the stitch: what is done already, and running tasks on dask.

Nothing large passes through the scheduler: tasks hold paths and read and write files. Every task
may run twice or be cut off anywhere: its files appear whole or not at all, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker, Worker, as_completed
from distributed.client import FutureCancelledError

from agq.blockwise.journal.writer import end_journal
from agq.blockwise.stitch.cluster import LazyClient
from agq.blockwise.storage.files import file_checksum, require_folder, write_atomic
from agq.blockwise.storage.leftovers import remove_all_temporaries
from agq.blockwise.threads import start_aside
from agq.errors import DamagedError, InputError, RunStoppedError, repairable
from agq.reading import NotAFileError, read_file, read_record

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, items done and items in all."""

_STRAGGLER_S = 0.2
_LOOK_S = 5.0
_SUMS = ".sums"
_SUMS_BATCH = 256

Item = TypeVar("Item")


class StitchError(RunStoppedError):
    """A part of the stitch failed at run time; stitching again does only what is missing."""


def digest(*parts: Any) -> str:
    """Return a key of JSON values and bytes (32 hex digits)."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:32]


@dataclass(frozen=True)
class Task(ABC):
    """Work for one task of dask; picklable, and small.

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
        """Do the work."""


@dataclass(frozen=True)
class Workers:
    """Workers of dask that write into one folder.

    Attributes
    ----------
    source
        Client; its workers must see the folder under the same path.
    folder
        Folder that all tasks write into.
    on_progress
        Called with the name of a step, items done and items in all.
    on_note
        Called with a line about what is waited for.
    wait_s
        Seconds without any worker after which a scheduler of one's own is given up. (Clusters that
        were started for the client have their own care for workers.)
    """

    source: Client | LazyClient
    folder: Path
    on_progress: Progress | None = None
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
        return max(1, sum(self.client.ncores().values()))

    def addresses(self) -> frozenset[str]:
        """Return the addresses of the workers."""
        return frozenset(self.client.ncores())

    def batches(self, items: Sequence[Item], most: int, *, share: int) -> list[Sequence[Item]]:
        """Cut items into parts of at most ``most``, and at least about ``share`` for each core."""
        size = max(1, min(most, -(-len(items) // (share * self.cores))))
        return [items[at : at + size] for at in range(0, len(items), size)]

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
        while running := sum(self.client.run(_running, mark, on_error="ignore").values()):
            if not noted:
                self._note(
                    f"waiting for {running} tasks that an earlier command left running in"
                    f" {self.folder}"
                )
                noted = True
            time.sleep(_STRAGGLER_S)

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
        total = done + sum(task.size for task in tasks)
        results: list[Any] = []
        self._report(step, done, total)
        if not tasks:
            return results  # without a client, which may have to be started
        # A random part: dask would otherwise take a task of an earlier stitch for the same one.
        name = f"{step}{_mark(self.folder)}{secrets.token_hex(4)}"
        futures = {
            self.client.submit(task.run, key=f"{name}-{i}", pure=False): task.size
            for i, task in enumerate(tasks)
        }
        try:
            with self._watched(list(futures)) as given_up:
                for future in as_completed(list(futures)):
                    results.append(future.result())
                    done += futures.pop(future)
                    self._report(step, done, total)
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
        self.client.run(end_journal, folder, on_error="ignore")

    @contextmanager
    def _watched(self, futures: list[Future]) -> Iterator[list[str]]:
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
                    self.client.cancel(futures)
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

    def _report(self, step: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(step, done, total)


def _running(mark: str, dask_worker: Worker) -> int:
    """Count the tasks of a worker that write into a folder."""
    with dask_worker.active_threads_lock:
        return sum(mark in str(key) for key in dask_worker.active_threads.values())


def _mark(folder: Path) -> str:
    """Return what the names of all tasks that write into a folder hold."""
    return f"-{digest(str(folder.absolute()))[:16]}-"


class Step:
    """One step of a run's stitch and its marker file.

    The marker says which inputs the outputs on disk belong to. A step first drops what other
    inputs left behind, then marks itself started, then (after its work) done.

    Parameters
    ----------
    workers
        Workers that make the outputs; markers lie in the ``stitch`` folder of theirs.
    name
        Of the step.
    key
        Digest of everything the outputs depend on.
    outputs
        Files and folders that the step makes.
    later
        Steps that are made of these outputs and partly lie in them: not done any more once this
        one begins.
    """

    def __init__(
        self,
        workers: Workers,
        name: str,
        key: str,
        outputs: Sequence[Path],
        later: Sequence[str] = (),
    ) -> None:
        self._workers = workers
        self._addresses: frozenset[str] = frozenset()
        self.name = name
        self.key = key
        self.reused = False
        self.resumed = False
        self._path = _marker(workers.folder, name)
        self._later = [_marker(workers.folder, step) for step in later]
        self._outputs = outputs
        self.begun = time.monotonic()

    def finished(self) -> dict[str, Any] | None:
        """Return the result of the step if it was done with the same key, else prepare for it.

        Outputs that were begun with the same key stay; others are removed.
        """
        marker = self.read(self._workers.folder, self.name)
        kept = marker.get("key") == self.key and all(path.exists() for path in self._outputs)
        if kept and marker.get("done"):
            self.reused = True
            result: dict[str, Any] = marker["result"]
            return result
        self._addresses = self._workers.addresses()
        if kept:
            self.resumed = True
            return None
        for marker_file in (*self._later, self._path):
            marker_file.unlink(missing_ok=True)
            marker_file.with_suffix(_SUMS).unlink(missing_ok=True)
        for path in self._outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._write({"key": self.key, "done": False})
        return None

    def finish(self, result: dict[str, Any], tables: Sequence[Path] = ()) -> dict[str, Any]:
        """Mark the step as done and return its result.

        After a crash, what killed writers left in the outputs is removed first.

        Parameters
        ----------
        result
            What a later stitch asks for.
        tables
            Files and folders of which checksums are recorded, beside the marker.
        """
        if self.resumed or self._workers.addresses() != self._addresses:
            for path in self._outputs:
                remove_all_temporaries(path)
        self._record_sums(tables)
        self._write({"key": self.key, "done": True, "result": result})
        return result

    def _record_sums(self, tables: Sequence[Path]) -> None:
        folder = self._workers.folder
        files = sorted(
            file
            for path in tables
            for file in (path.rglob("*") if path.is_dir() else [path])
            if file.is_file()
        )
        require_folder(folder)
        batches = self._workers.batches(files, _SUMS_BATCH, share=4)
        done = self._workers.run(f"{self.name} checksums", [Checksums(b) for b in batches])
        lines = sorted(
            f"{total}  {file.relative_to(folder)}\n" for batch in done for file, total in batch
        )
        write_atomic(self._path.with_suffix(_SUMS), "".join(lines).encode())

    @staticmethod
    def sums(run_dir: Path, name: str) -> dict[str, str] | None:
        """Return the recorded checksums of a step by path in the run folder.

        None: an earlier release has done the step, or the file cannot be read.
        """
        try:
            text = read_file(_marker(run_dir, name).with_suffix(_SUMS)).decode()
            return {path: total for total, path in (s.split("  ", 1) for s in text.splitlines())}
        except (FileNotFoundError, NotAFileError, ValueError):
            return None

    @staticmethod
    def forget(run_dir: Path, name: str) -> None:
        """Let a step not be done, whatever it has made."""
        marker = _marker(run_dir, name)
        marker.unlink(missing_ok=True)
        marker.with_suffix(_SUMS).unlink(missing_ok=True)

    @staticmethod
    def take_back(run_dir: Path, name: str) -> None:
        """Let the next stitch do what is missing of a step; what it has made stays."""
        path = _marker(run_dir, name)
        try:
            marker = Step.read(run_dir, name)
        except InputError:
            path.unlink()
            return
        if marker:
            write_atomic(path, _marker_bytes({**marker, "done": False}))

    @staticmethod
    def read(run_dir: Path, name: str) -> dict[str, Any]:
        """Return the marker of a step: ``key``, ``done`` and, if done, ``result``; {} if new.

        Raises
        ------
        InputError
            If it is damaged.
        """
        path = _marker(run_dir, name)
        try:
            return read_record(path)
        except FileNotFoundError:
            return {}
        except InputError as error:
            raise repairable(error, run_dir) from None

    def _write(self, marker: dict[str, Any]) -> None:
        require_folder(self._workers.folder)
        write_atomic(self._path, _marker_bytes(marker))


@dataclass(frozen=True)
class Checksums(Task):
    """Add up files."""

    items: Sequence[Path]

    def run(self) -> list[tuple[Path, str]]:
        """Return the checksum of each file."""
        return [(file, file_checksum(file)) for file in self.items]


def _marker_bytes(marker: dict[str, Any]) -> bytes:
    return json.dumps(marker, indent=1, sort_keys=True).encode()


def _marker(run_dir: Path, name: str) -> Path:
    return Path(run_dir) / "stitch" / f"{name}.json"
