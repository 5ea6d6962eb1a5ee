"""What a journal line says: worker, block record and event, and their bytes.

A line is one JSON object in ASCII, closed by a checksum of everything before it::

    {"event":"block","time":1.7e9,"token":"..","block":5,...,"crc":"89abcdef"}

The checksum is there because a machine that loses power may keep the length of a file and lose a
page of it: a line that parses is then not yet a line that was written. Readers ignore fields they
do not know, so that a newer writer may add some.
"""

import hashlib
import json
import os
import re
import socket
import time
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Literal, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

State = Literal["done", "skipped", "failed", "open"]


class BlockState(IntEnum):
    """How a block stands; of two records of a block the one with the larger state is kept.

    Lines and documents hold the lower-case name. A record says ``open`` where a block was taken
    back (`BlockRecord.revision`).
    """

    OPEN = 0
    FAILED = 1
    SKIPPED = 2
    DONE = 3

    @classmethod
    def of(cls, word: str) -> "BlockState":
        """Return the state that a line or document names."""
        return cls[word.upper()]

    @property
    def word(self) -> str:
        """How lines and documents name it."""
        return self.name.lower()


class Order(NamedTuple):
    """Key that decides between two records of a block: the larger one is kept."""

    revision: int
    state: int
    time: float
    attempt: int
    token: str


FORMAT_VERSION: Final = 1
#: A traceback longer than this keeps its end: one line stays one small write.
MAX_TEXT: Final = 16_384

#: Seconds since the epoch that calendars have a date for (until the year 6325).
_LAST_TIME: Final = 2.0**37
_TIMES: Final = ("started", "finished", "read_s", "compute_s", "write_s")
_COUNTS: Final = ("attempt", "labels", "components", "dropped", "voxels")

_CRC_HEAD: Final = b',"crc":"'
_CRC_SIZE: Final = len(_CRC_HEAD) + 8 + len(b'"}')

Numbers = tuple[int | float, ...]


class BadLineError(ValueError):
    """A complete line that is no journal line; the reader counts it and goes on."""


def require_time(value: float) -> float:
    """Return a time or a duration in seconds, if it is one.

    Raises
    ------
    BadLineError
        If it is not finite, or beyond what calendars have.
    """
    if not -_LAST_TIME < value < _LAST_TIME:
        raise BadLineError(f"{value} is no time in seconds")
    return value


def require_block(value: Any) -> int:
    """Return the number of a block, if it is one.

    Raises
    ------
    BadLineError
        If it is no whole number, or out of range.
    """
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise BadLineError(f"block number {str(value)[:40]} is out of range")
    return value


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The process that writes one journal file.

    Attributes
    ----------
    name : str
        Name of the worker in reports, unique enough for people (``worker-3``).
    device : str
        Device the predictor runs on (``cpu``, ``cuda:1``).
    started : float
        Start of the process, seconds since the epoch.
    """

    name: str
    host: str
    pid: int
    device: str = "cpu"
    job: str | None = None
    started: float = 0.0
    gpu: str | None = None
    gpu_bytes: int | None = None

    def __post_init__(self) -> None:
        require_time(self.started)
        for value in (self.pid, self.gpu_bytes or 0):
            if not 0 <= value < 2**63:
                raise BadLineError(f"{str(value)[:40]} is out of range")


def this_worker(name: str | None = None, device: str = "cpu") -> WorkerInfo:
    """Describe this process for its journal; the default name is host and process id."""
    # The name that a cluster's users know; several emulated nodes may share one machine, too.
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return WorkerInfo(
        name=name or f"{host}-{os.getpid()}",
        host=host,
        pid=os.getpid(),
        device=device,
        job=f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID"),
        started=time.time(),
    )


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """The end of one attempt at one block.

    Attributes
    ----------
    block : int
        Block number in the grid of the whole volume.
    state : State
        Outcome; ``open``: what earlier revisions say of the block counts no more.
    attempt : int
        Attempt in this run, from 1.
    token : str
        Random token of the process; filled in by the writer.
    worker : str
        Name of the worker; filled in by the writer.
    revision : int
        How often blocks had been taken back when the process began to work; filled in by the
        writer. A record of a later revision replaces any of an earlier one.
    started, finished : float
        Seconds since the epoch.
    read_s, compute_s, write_s : float
        Seconds spent in each part.
    labels, components, dropped : int
        Labels written, components found, components dropped by the query limit.
    voxels : int
        Voxels of the write box.
    sums : dict of str to str
        Checksum of each thing written (``{"fragments": ".."}``).
    reason : str or None
        One word or line: why skipped (``mask``, ``constant``) or failed.
    error : str or None
        Traceback of a failure.
    roi : tuple or None
        Write ROI ``(offset, shape)`` in world units, z, y, x.
    """

    block: int
    state: State
    attempt: int = 1
    token: str = ""
    worker: str = ""
    revision: int = 0
    started: float = 0.0
    finished: float = 0.0
    read_s: float = 0.0
    compute_s: float = 0.0
    write_s: float = 0.0
    labels: int = 0
    components: int = 0
    dropped: int = 0
    voxels: int = 0
    sums: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    error: str | None = None
    roi: tuple[Numbers, Numbers] | None = None

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise BadLineError(f"state {self.state!r} is none of {', '.join(get_args(State))}")
        require_block(self.block)
        if not 0 <= self.revision < 2**16:
            raise BadLineError(f"revision {self.revision} is out of range")
        for name in _TIMES:
            require_time(getattr(self, name))
        for name in _COUNTS:
            if not -(2**63) <= getattr(self, name) < 2**63:
                raise BadLineError(f"{name} is out of range")

    @property
    def order(self) -> Order:
        """Key that decides between two records of a block."""
        state = BlockState.of(self.state)
        return Order(self.revision, state, self.finished, self.attempt, self.token)

    @property
    def summary(self) -> str:
        """Its error in one line."""
        return self.reason or error_line(self.error)

    @property
    def digest(self) -> int:
        """64 bits of the checksums, to compare two attempts."""
        return sums_digest(self.sums)

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the record; empty fields are left out."""
        values = [(name, getattr(self, name)) for name in _LINE_FIELDS]
        data: dict[str, Any] = {k: v for k, v in values if v or v == 0}
        if self.revision:
            data["revision"] = self.revision
        for name in ("reason", "error"):
            if len(data.get(name, "")) > MAX_TEXT:
                data[name] = "[...] " + data[name][-MAX_TEXT:]
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "BlockRecord":
        """Record of a JSON object; unknown keys are ignored.

        Raises
        ------
        BadLineError
            If ``block`` or ``state`` is missing, or a value has the wrong type.
        """
        try:
            return _RECORD.validate_python(data)
        except ValidationError as error:
            raise BadLineError(f"block: {error}") from error


def error_line(error: str | None) -> str:
    """Return the last line of a traceback, which says what was wrong."""
    lines = (error or "").strip().splitlines()
    return lines[-1].strip() if lines else "no error recorded"


_RECORD: Final = TypeAdapter(BlockRecord)
#: In the order in which lines have them.
_LINE_FIELDS: Final = (
    *("block", "attempt", "labels", "components", "dropped", "voxels", "state", "token", "worker"),
    *("started", "finished", "read_s", "compute_s", "write_s", "reason", "error", "sums", "roi"),
)


@dataclass(frozen=True, slots=True)
class Event:
    """One journal line.

    Attributes
    ----------
    kind : str
        ``worker``, ``begin``, ``block`` or ``exit``; another word comes from a newer writer.
    time : float
        When it was written, seconds since the epoch.
    token : str
        Random token of the process that wrote it.
    offset : int
        Byte at which the line starts.
    """

    kind: str
    time: float
    token: str
    data: dict[str, Any]
    file: str = ""
    offset: int = 0

    @property
    def record(self) -> BlockRecord:
        """The block record of a ``block`` event.

        Raises
        ------
        BadLineError
            If the event is none.
        """
        return BlockRecord.from_dict(self.data)


def sums_digest(sums: dict[str, str]) -> int:
    """64-bit number of a set of checksums, 0 for none."""
    if not sums:
        return 0
    text = repr(sorted(sums.items())).encode("ascii", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") or 1


def encode(event: str, time: float, token: str, data: dict[str, Any]) -> bytes:
    """Bytes of one journal line, newline included."""
    head = {"event": event, "time": round(time, 6), "token": token}
    body = json.dumps(head | data, separators=(",", ":")).encode("ascii")[:-1]
    return b'%s%s%08x"}\n' % (body, _CRC_HEAD, zlib.crc32(body))


def decode(line: bytes, file: str = "", offset: int = 0) -> Event:
    """Event of one complete line (without or with its newline).

    Raises
    ------
    BadLineError
        If the line is damaged or is no journal line.
    """
    line = line.rstrip(b"\r\n")
    body, tail = line[:-_CRC_SIZE], line[-_CRC_SIZE:]
    if tail != b'%s%08x"}' % (_CRC_HEAD, zlib.crc32(body)):
        raise BadLineError("checksum missing or wrong")
    try:
        try:
            data = from_json(line)
        except ValueError:
            # It refuses half a surrogate pair, which the names of undecodable files have.
            data = json.loads(line)
        return Event(
            kind=str(data["event"]),
            time=require_time(float(data["time"])),
            token=str(data["token"]),
            data=data,
            file=file,
            offset=offset,
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadLineError(str(error)) from error


def safe_name(text: str) -> str:
    """Keep the characters that any file system takes, at most 64 of them."""
    return re.sub(r"[^A-Za-z0-9._]+", "_", text)[:64] or "_"
