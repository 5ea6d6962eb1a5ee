"""Steps of the stitch: what is done already, and running tasks on dask."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker, Worker, as_completed
from distributed.client import FutureCancelledError

from agq.blockwise.storage.files import write_atomic
from agq.blockwise.storage.leftovers import remove_all_temporaries
from agq.errors import InputError, RunStoppedError

Progress = Callable[[str, int, int], None]
"""Called with the name of the step, items done and items in all."""

_STRAGGLER_S = 0.2


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


class Step:
    """One step of a run's stitch and its marker file.

    The marker says which inputs the outputs on disk belong to. A step first drops what other
    inputs left behind, then marks itself started, then (after its work) done.

    Parameters
    ----------
    client
        Whose workers make the outputs.
    run_dir
        Run folder; markers lie in its ``stitch`` folder.
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
        client: Client,
        run_dir: Path,
        name: str,
        key: str,
        outputs: Sequence[Path],
        later: Sequence[str] = (),
    ) -> None:
        self._client = client
        self._workers = frozenset(client.ncores())
        self.name = name
        self.key = key
        self.reused = False
        self.resumed = False
        self._run_dir = Path(run_dir)
        self._path = _marker(run_dir, name)
        self._later = [_marker(run_dir, step) for step in later]
        self._outputs = outputs
        self.begun = time.monotonic()

    def finished(self) -> dict[str, Any] | None:
        """Return the result of the step if it was done with the same key, else prepare for it.

        Outputs that were begun with the same key stay; others are removed.
        """
        marker = self.read(self._run_dir, self.name)
        if marker.get("key") == self.key and all(path.exists() for path in self._outputs):
            if marker.get("done"):
                self.reused = True
                result: dict[str, Any] = marker["result"]
                return result
            self.resumed = True
            return None
        for marker_file in (*self._later, self._path):
            marker_file.unlink(missing_ok=True)
        for path in self._outputs:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._write({"key": self.key, "done": False})
        return None

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Mark the step as done and return its result.

        After a crash, what killed writers left in the outputs is removed first.
        """
        if self.resumed or frozenset(self._client.ncores()) != self._workers:
            for path in self._outputs:
                remove_all_temporaries(path)
        self._write({"key": self.key, "done": True, "result": result})
        return result

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
            marker: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise InputError(f"{path}: damaged; remove it and stitch again") from None
        return marker

    def _write(self, marker: dict[str, Any]) -> None:
        write_atomic(self._path, json.dumps(marker, indent=1, sort_keys=True).encode())


def _marker(run_dir: Path, name: str) -> Path:
    return Path(run_dir) / "stitch" / f"{name}.json"


def cores(client: Client) -> int:
    """Return the threads of all workers, at least 1."""
    return max(1, sum(client.ncores().values()))


def wait_for_stragglers(
    client: Client, owner: Path, on_note: Callable[[str], None] | None = None
) -> None:
    """Wait until the workers have ended what an earlier command left running.

    A scheduler that outlives its clients lets a task that runs go on after its client has gone. It
    would write into folders that the next command has emptied, and be taken for that one's work.

    Parameters
    ----------
    client
        Of the scheduler.
    owner
        Folder that the tasks write into, as in :func:`run_tasks`.
    on_note
        Called once with a line if there is something to wait for.
    """
    mark = _mark(owner)
    noted = False
    while running := sum(client.run(_running, mark, on_error="ignore").values()):
        if on_note is not None and not noted:
            on_note(f"waiting for {running} tasks that an earlier command left running in {owner}")
            noted = True
        time.sleep(_STRAGGLER_S)


def _running(mark: str, dask_worker: Worker) -> int:
    """Count the tasks of a worker that write into a folder."""
    with dask_worker.active_threads_lock:
        return sum(mark in str(key) for key in dask_worker.active_threads.values())


def _mark(owner: Path) -> str:
    """Return what the names of all tasks that write into a folder hold."""
    return f"-{digest(str(owner.absolute()))[:16]}-"


def run_tasks(
    client: Client,
    owner: Path,
    step: str,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    weights: Sequence[int],
    on_progress: Progress | None,
    done: int = 0,
) -> list[Any]:
    """Run ``function(*call)`` for every call as one dask task each.

    Parameters
    ----------
    owner
        Folder that the tasks write into.
    weights
        Items of each call, for the progress.
    done
        Items done before.

    Returns
    -------
    list
        Results, in the order of completion.

    Raises
    ------
    StitchError
        If workers kept dying or the scheduler is gone. Other errors of a task are raised as they
        are. The remaining tasks are cancelled.
    """
    total = done + sum(weights)
    results: list[Any] = []
    if on_progress is not None:
        on_progress(step, done, total)
    # A random part: dask would otherwise take a task of an earlier stitch for the same one.
    name = f"{step}{_mark(owner)}{secrets.token_hex(4)}"
    futures = {
        client.submit(function, *call, key=f"{name}-{i}", pure=False): weight
        for i, (call, weight) in enumerate(zip(calls, weights, strict=True))
    }
    try:
        for future in as_completed(list(futures)):
            results.append(future.result())
            done += futures.pop(future)
            if on_progress is not None:
                on_progress(step, done, total)
    except KilledWorker as error:
        raise StitchError(
            f"{step}: workers died on a task again and again (out of memory?): {error}"
        ) from None
    except FutureCancelledError as error:
        raise StitchError(f"{step}: lost the dask scheduler ({error})") from None
    finally:
        client.cancel(list(futures))
    return results
