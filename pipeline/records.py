"""What the record of a run may hold: one model for ``run.json`` and for documents of the ledger.

Both may come from somebody else, or be damaged. What they say is used as it stands, so its types
are checked here, once: where a record is read, a text is a text and a time a finite number.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agq.errors import InputError
from agq.reading import parse_json, read_file

if TYPE_CHECKING:
    from agq.blockwise.ledger.database import Ledger

RECORD_BYTES: Final = 2**26
"""Most bytes of a record: reports list the blocks that failed."""

_MOST: Final = 2**64
"""Above all labels, the largest numbers that a record holds."""

_TEXT: Final = 4096
_SHOWN: Final = 200
_DAY_S: Final = 86_400

Time = Annotated[float, Field(ge=0, le=1e11)]
"""Seconds since the epoch."""

Id = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,100}$")]
"""What is known of a run everywhere; a part of addresses of the page."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Label = Annotated[int, Field(ge=-(2**63), lt=_MOST)]
Coordinate = Annotated[float, Field(ge=-1e15, le=1e15)]
_Three = Annotated[list[Label], Field(min_length=3, max_length=3)]
Text = Annotated[str, Field(max_length=_TEXT)]


class _Part(BaseModel):
    """Base of the parts of a record: later releases may add entries."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Piece(_Part):
    label: Label
    voxels: Count
    at: Annotated[list[Coordinate], Field(min_length=3, max_length=3)]


class _Disagreement(_Part):
    label: Label
    bits: Number
    parts: Count = 0
    largest: Annotated[list[_Piece], Field(min_length=1)]


class _Scores(_Part):
    meaning: Text
    voi_split: Number | None = None
    voi_merge: Number | None = None
    voi_sum: Number | None = None
    adapted_rand_error: Number | None = None
    rand_precision: Number | None = None
    rand_recall: Number | None = None


class _Segment(_Part):
    id: Label
    voxels: Count
    fragments: Count = 0


class _Report(_Part):
    """What a stage says of its result, as far as it is shown or counted."""

    done: Count = 0
    skipped: Count = 0
    failed: Count | list[Count] = 0
    largest: list[_Segment] = []
    scores: dict[str, _Scores] = {}
    worst_mergers: list[_Disagreement] = []
    worst_splits: list[_Disagreement] = []


class _Rate(_Part):
    blocks: Count
    voxels: Count
    seconds: Number = 0.0


class _Totals(_Part):
    """Sums of a stage in the ledger."""

    bytes: Count = 0
    done: Count = 0
    skipped: Count = 0
    failed: Count = 0
    running: Count = 0
    voxels: Count = 0
    duplicates: Count = 0
    conflicts: Count = 0
    started: Time | None = None
    finished: Time | None = None
    updated: Time = 0.0
    session: _Rate = _Rate(blocks=0, voxels=0)
    recent: _Rate = _Rate(blocks=0, voxels=0)


class _Forecast(_Part):
    selected: Count
    gpus: bool
    basis: Text
    worker_hours: Number | None = None
    cost: Number | None = None
    seconds: dict[Text, Number] = {}
    disk_bytes: dict[Text, Count] = {}
    files: dict[Text, Count] = {}


class _Disk(_Part):
    files: Count
    bytes: Count
    whole: bool


class _Stage(_Part):
    state: Text | None = None
    blocks_total: Count | None = None
    started: Time | None = None
    finished: Time | None = None
    error: str | None = None
    report: _Report | None = None
    forecast: _Forecast | None = None
    disk: _Disk | None = None
    totals: _Totals = _Totals()


class _Command(_Part):
    argv: list[str] | None = None
    time: Time | None = None
    host: Text | None = None
    user: Text | None = None
    versions: dict[str, Text] = {}


class _Setting(_Part):
    """A setting, and what it was taken from."""

    value: Any
    origin: Annotated[
        Literal["configuration", "checkpoint", "default"], Field(validation_alias="from")
    ]


class _Place(_Part):
    path: Text
    host: Text
    inodes: list[Count] = []


class _Run(_Part):
    """What both forms of a record have."""

    name: Text | None = None
    created: Time | None = None
    config: dict[str, Any] = {}
    commands: list[_Command] = []
    stages: dict[Text, _Stage] = {}


class _Record(_Run):
    """``run.json``."""

    format: Literal[1]
    id: Id
    name: Text
    config: dict[str, Any]
    identity: dict[str, Any]
    identity_hash: Text | None = None
    commands: list[_Command]
    stages: dict[Text, _Stage]
    contents: dict[str, dict[str, Any]] = {}
    files: dict[str, Text] = {}
    made_with: list[dict[str, Any]] = []
    settings: dict[Text, _Setting] = {}
    recommended: dict[str, Any] | None = None
    copy_of: Text | None = None
    place: _Place | None = None


class _Document(_Run, _Command):
    """The document of a run in the ledger."""

    id: Annotated[Id, Field(alias="_id")]
    name: Text = ""
    run_dir: Text = ""
    updated: Time = 0.0
    grid: Any = None


class _Grid(_Part):
    volume_shape: _Three
    voxel_size: _Three
    write_shape: _Three
    before: _Three = [0, 0, 0]
    after: _Three = [0, 0, 0]
    offset: _Three = [0, 0, 0]


class _Raw(_Part):
    unit: Text = "nm"


class _Identity(_Part):
    """What decides the bytes of a block, as a run that goes on needs it."""

    raw: _Raw
    mask: dict[str, Any] | None
    grid: _Grid
    model: dict[str, Any]
    affinities: bool


_RECORD: Final = TypeAdapter(_Record)
_DOCUMENT: Final = TypeAdapter(_Document)
_IDENTITY: Final = TypeAdapter(_Identity)
_GRID: Final = TypeAdapter(_Grid)


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``run.json``.

    Raises
    ------
    InputError
        If what it holds is no record; the message says which entry is wrong.
    OSError
        If it cannot be read.
    """
    try:
        record = plain(parse_json(read_file(path, most=RECORD_BYTES)))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(record, dict) or record.get("format") != 1:
        raise InputError(f"{path} was written by another version of agq")
    return _checked(_RECORD, record, f"{path} is damaged")


def check_document(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document of a run in the ledger, after checking it.

    Raises
    ------
    InputError
        If it is none; the message says which entry is wrong.
    """
    name = str(document.get("_id"))[:_SHOWN]
    try:
        document = plain(document)
    except ValueError as error:
        raise InputError(f"document {name} of the database is damaged: {error}") from None
    return _checked(_DOCUMENT, document, f"document {name} of the database is damaged")


def newest_documents(
    ledger: "Ledger", wanted: dict[str, Any], fields: dict[str, int], limit: int
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Yield the documents of the newest runs, each with what is wrong with it.

    Documents that no run of ours has written come last, so that they hide no other.

    Parameters
    ----------
    wanted
        Query that the documents match.
    fields
        Which of their fields to ask for, as pymongo takes it.
    limit
        Number of documents.

    Raises
    ------
    PyMongoError
        If the database is away.
    """
    ours = {"created": {"$gte": 0, "$lt": time.time() + _DAY_S}}
    for query in ({**wanted, **ours}, {**wanted, "$nor": [ours]}):
        documents = list(ledger.runs.find(query, fields).sort("created", -1).limit(limit))
        limit -= len(documents)
        for document in documents:
            try:
                yield check_document(document), None
            except InputError as error:
                yield document, str(error)
        if limit <= 0:  # to the database, 0 is no limit
            return


def check_identity(identity: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the identity of a record, after checking that it is whole.

    Raises
    ------
    InputError
        If an entry that every run has is missing or wrong.
    """
    return _checked(_IDENTITY, identity, f"{source} is damaged: identity")


def check_grid(grid: Any, source: str) -> dict[str, Any]:
    """Return the grid of a record, after checking its types.

    Raises
    ------
    InputError
        If it is none.
    """
    return _checked(_GRID, grid, f"{source} is damaged: grid")


def plain(value: Any, *, lossy: bool = False) -> Any:
    r"""Return data whose numbers and texts every reader and writer takes.

    Parts of characters, which names of files may have, are written out (``\udcff``); what a
    database knows besides the types of JSON becomes text.

    Parameters
    ----------
    value
        Mappings, lists and scalars.
    lossy
        Nothing is refused: numbers that cannot be kept become None.

    Raises
    ------
    ValueError
        If a number is not finite, or longer than 64 bits.
    """
    if isinstance(value, str):
        return value if value.isprintable() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {plain(key): plain(item, lossy=lossy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, lossy=lossy) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        return plain(str(value))
    if isinstance(value, float) and not math.isfinite(value):
        problem = f"{value} is no finite number"
    elif not -_MOST < value < _MOST and isinstance(value, int):
        problem = "a whole number has more than 64 bits"
    else:
        return value
    if lossy:
        return None
    raise ValueError(problem)


def _checked(model: TypeAdapter[Any], record: Any, damaged: str) -> dict[str, Any]:
    try:
        model.validate_python(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:_SHOWN] or "all of it"
        given = repr(first["input"])[:_SHOWN]
        raise InputError(f"{damaged}: {field}: {first['msg']} (got {given})") from None
    checked: dict[str, Any] = record
    return checked
