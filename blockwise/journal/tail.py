"""Reads what is new in a folder of journal files, by byte offset, in bounded pieces."""

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from agq.blockwise.journal.records import (
    BadLineError,
    Event,
    WorkerInfo,
    decode,
    require_block,
    require_time,
)
from agq.errors import InputError
from agq.reading import open_file

SILENT_S: Final = 120.0
"""A worker that wrote nothing for so many seconds, or five times as long as its blocks take, is
taken for dead. (One that lives writes every 30 s.)"""

_POLL_BYTES = 8 << 20
PACKED: Final = "packed.jsonl"
"""The file of `journal.pack`, with the lines of many processes."""

LONGEST_LINE = 16 << 20
"""Bytes of a line that is refused. Those of workers have less than a hundredth of it."""

_WORKER = TypeAdapter(WorkerInfo)


class JournalTail:
    """The new lines of every journal file of one stage.

    Files are opened anew on every poll and never watched: opening is what makes a network file
    system show the present size of a file.

    Parameters
    ----------
    folder : Path
        ``<run>/journal/<stage>``; it need not exist yet.
    positions : dict of str to int, optional
        Bytes already read of each file, from an earlier reader.
    ended : iterable of str, optional
        Files whose writer has said that it ended; they are not opened again.

    Attributes
    ----------
    positions : dict of str to int
        Bytes read of each file; always the start of a line.
    garbage : int
        Complete lines that could not be understood.
    """

    def __init__(
        self,
        folder: Path,
        positions: dict[str, int] | None = None,
        ended: set[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.positions = dict(positions or {})
        self.ended = set(ended or ())
        self.garbage = 0
        self._torn: set[str] = set()

    @property
    def torn(self) -> int:
        """Files whose last line has no end: a writer was killed in it, or is writing it now."""
        return len(self._torn)

    def poll(self, limit: int = _POLL_BYTES) -> list[Event]:
        """Events written since the last poll.

        Parameters
        ----------
        limit : int
            Bytes to read at most (one line more at the most); call again until it is empty.

        Returns
        -------
        list of Event
            In the order written within a file; empty when there is nothing new.

        Raises
        ------
        OSError
            If a file may not be read.
        InputError
            If one is no file, or has a line without end.
        """
        events: list[Event] = []
        for name in self.files():
            if limit <= 0:
                break
            if name in self.ended:
                continue
            start = self.positions.get(name, 0)
            try:
                data = self._read(name, start, limit)
            except (OSError, InputError):
                # What other files gave must not get lost; the next poll meets the error again.
                if events:
                    break
                raise
            limit -= len(data)
            self._decode(name, start, data, events)
            self.positions[name] = start + len(data)
        return events

    def files(self) -> list[str]:
        """List the names of the present journal files."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(e.name for e in entries if e.name.endswith(".jsonl"))
        except FileNotFoundError:
            return []

    def _read(self, name: str, start: int, limit: int) -> bytes:
        """Whole lines from ``start``; notes whether an unfinished one follows."""
        try:
            with open_file(self.folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size <= start:
                    self._torn.discard(name)
                    return b""
                file.seek(start)
                data = bytearray()
                while len(data) < limit or b"\n" not in data:
                    if len(data) >= LONGEST_LINE and b"\n" not in data:
                        raise InputError(
                            f"{self.folder / name}: a line of more than {LONGEST_LINE} bytes at "
                            f"byte {start}, which no worker writes; move the file away"
                        )
                    piece = file.read(min(max(limit, 1 << 16), _POLL_BYTES))
                    if not piece:
                        break
                    data += piece
        except OSError as error:
            # A file removed, or replaced on a network file system, between listing and reading.
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return b""
            raise
        end = data.rfind(b"\n") + 1
        if end < len(data) and start + len(data) >= size:
            self._torn.add(name)
        else:
            self._torn.discard(name)
        return bytes(data[:end])

    def _decode(self, name: str, start: int, data: bytes, events: list[Event]) -> None:
        offset = start
        for line in data.split(b"\n"):
            if line.strip():
                try:
                    event = decode(line, name, offset)
                except BadLineError:
                    self.garbage += 1
                else:
                    events.append(event)
                    if event.kind == "exit" and name != PACKED:
                        self.ended.add(name)
            offset += len(line) + 1


@dataclass(slots=True)
class WorkerState:
    """What the journal says of one process.

    Attributes
    ----------
    last : float
        Time of its last line, seconds since the epoch.
    done, skipped, failed : int
        Block ends it has written, retries included.
    current : dict of int to (int, float)
        Blocks begun and not ended: attempt and time of the begin line.
    exit : str or None
        Why it ended, None while it runs (or if it was killed).
    left : list of int
        Blocks that it had in hand when it ended.
    """

    info: WorkerInfo
    token: str
    last: float = 0.0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    voxels: int = 0
    current: dict[int, tuple[int, float]] = field(default_factory=dict)
    exit: str | None = None
    left: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_time(self.last)
        for block in (*self.current, *self.left):
            require_block(block)

    def is_silent(self, now: float) -> bool:
        """Tell whether it has not ended, but gave no sign of life for longer than a block takes."""
        usual = (self.last - self.info.started) / self.done if self.done else 0.0
        return self.exit is None and now - self.last > max(SILENT_S, 5 * usual)


def worker_of(event: Event) -> WorkerInfo:
    """Worker of an event: of its ``worker`` line, else made up from the file name."""
    described: Any = event.data.get("worker") if event.kind == "worker" else None
    if isinstance(described, dict):
        try:
            return _WORKER.validate_python(described)
        except ValidationError:
            pass
    host, _, rest = event.file.rpartition(".")[0].partition("-")
    pid = rest.partition("-")[0]
    return WorkerInfo(
        name=event.token,
        host=host or "?",
        pid=int(pid) if pid.isdecimal() and len(pid) < 12 else 0,
        device="?",
    )


def follow_worker(workers: dict[str, WorkerState], event: Event) -> WorkerState:
    """Bring the worker states up to date with one event and return the state of its worker.

    Raises
    ------
    BadLineError
        If a field of the line has the wrong type.
    """
    state = workers.get(event.token)
    if state is None:
        state = workers[event.token] = WorkerState(worker_of(event), event.token)
    elif event.kind == "worker":
        state.info = worker_of(event)
    state.last = max(state.last, event.time)
    data = event.data
    try:
        if event.kind == "begin":
            attempt = min(int(data.get("attempt", 1)), 2**31)
            state.current[require_block(data["block"])] = (attempt, event.time)
        elif event.kind == "block":
            state.current.pop(require_block(data["block"]), None)
            kind = data["state"]
            if kind == "done":
                state.done += 1
                state.voxels += min(max(int(data.get("voxels", 0)), 0), 2**32 - 1)
            elif kind == "skipped":
                state.skipped += 1
            elif kind == "failed":
                state.failed += 1
        elif event.kind == "exit":
            state.exit = str(data.get("reason", "end"))
            state.left += state.current
            state.current.clear()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadLineError(str(error)) from error
    return state
