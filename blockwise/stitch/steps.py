"""Steps of the stitch: what is done already, and the key of what each depends on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agq.blockwise.stitch.workers import Task, Workers
from agq.blockwise.storage.files import file_checksum, require_folder, write_atomic
from agq.blockwise.storage.leftovers import remove_all_temporaries
from agq.errors import InputError, repairable
from agq.reading import NotAFileError, read_file, read_record

_SUMS = ".sums"
_SUMS_BATCH = 256


def digest(*parts: Any) -> str:
    """Return a key of JSON values, bytes and memory of arrays (32 hex digits)."""
    total = hashlib.sha256()
    for part in parts:
        is_data = isinstance(part, bytes | memoryview)
        data = memoryview(part if is_data else json.dumps(part, sort_keys=True).encode())
        total.update(data.nbytes.to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()[:32]


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
