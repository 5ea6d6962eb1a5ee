"""What users type after a command: runs, volumes, positions, and what these stand for."""

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from agq.blockwise.ledger.settings import LedgerError, LedgerSettings
from agq.blockwise.volumes.triples import Box, Triple, commas
from agq.errors import InputError
from agq.pipeline.config.recorded import read_target, recorded_ledger
from agq.pipeline.folder import RunFolder
from agq.plain_text import say

if TYPE_CHECKING:
    from agq.blockwise.ledger.database import Ledger
    from agq.blockwise.volumes.open import Kind, Volume

# Not `readable` by typer's check: the command says in its own line what it cannot read.
Target = Annotated[
    Path,
    typer.Argument(
        readable=False, help="Run folder or YAML configuration file.", show_default=False
    ),
]
RunDir = Annotated[Path, typer.Argument(readable=False, help="Run folder.", show_default=False)]
ConfigFile = Annotated[
    Path, typer.Argument(readable=False, help="YAML configuration file.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Replace a value of the file: section.field=value (repeatable)."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run in run_dir and start over.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", help="Run what the folder of another user names: its predictor, its job lines."
    ),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show each step of the stitch by itself.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def open_location(location: str, kind: "Kind", unit: str | None) -> "Volume":
    """Open ``path``, ``path::dataset`` or a run folder (its segmentation), in a world unit.

    Without a unit, the coarsest is taken in which the volume is exact. What of its place was
    rounded is said.

    Raises
    ------
    InputError
        If there is no such volume.
    """
    from agq.blockwise.volumes.open import open_volume  # slow to load

    path, dataset = _split(location)
    if not dataset and RunFolder(Path(path)).exists():
        return open_volume(
            RunFolder(Path(path)).container, "segmentation", level=0, kind=kind, unit=unit
        )
    volume = open_volume(path, dataset or None, kind=kind, unit=unit)
    for note in volume.notes:
        say(f"agq: {note}", err=True)
    return volume


def _split(location: str) -> tuple[str, str]:
    """Split ``path::dataset``; colons in the brackets of an IPv6 host are of the path."""
    host = re.match(r"[^/]*://[^/\[]*\[[^/\]]*\]", location)
    at = location.find("::", host.end() if host else 0)
    return (location, "") if at < 0 else (location[:at], location[at + 2 :])


def parse_triple(name: str, text: str, least: int | None = None) -> Triple:
    """Read ``z,y,x``.

    Raises
    ------
    InputError
        If it is not three whole numbers, or one is below `least`.
    """
    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError:
        hint = _in_finer_unit(name, text)
        raise InputError(f"{name} {text}: expected three whole numbers z,y,x{hint}") from None
    if least is not None and min(z, y, x) < least:
        raise InputError(f"{name} {text}: every number must be at least {least}")
    return z, y, x


def _in_finer_unit(name: str, text: str) -> str:
    """Say how to write a size that is not whole nanometres, if it is one."""
    if name not in ("--voxel-size", "--offset"):
        return ""
    from agq.blockwise.volumes.placement import PER_NANOMETRE

    try:
        values = [Decimal(part.strip()) for part in text.split(",")]
    except InvalidOperation:
        return ""
    for unit, each in PER_NANOMETRE.items():
        finer = [value * each for value in values]
        if each > 1 and all(value.is_finite() and value == int(value) for value in finer):
            return f" of a unit: write {name} {commas(map(int, finer))} --unit {unit}"
    return ""


def parse_blocks(text: str) -> list[int]:
    """Read block numbers and ranges of them, both ends included: ``12,40-44``.

    Raises
    ------
    InputError
        If a part is neither.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(
                f"--blocks {text}: expected numbers and ranges such as 12,40-44, not {part!r}"
            )
        ends = int(first), int(last or first)
        if ends[0] > ends[1]:
            raise InputError(f"--blocks {text}: the range {part.strip()} ends before it begins")
        numbers += range(ends[0], ends[1] + 1)
    return numbers


def parse_box(name: str, text: str) -> Box:
    """Read a box of voxels, ``z0:z1,y0:y1,x0:x1``; each end is one past the last voxel.

    Raises
    ------
    InputError
        If it has another form, or is empty.
    """
    try:
        (z0, z1), (y0, y1), (x0, x1) = ((int(n) for n in p.split(":")) for p in text.split(","))
    except ValueError:
        raise InputError(f"{name} {text}: expected voxels z0:z1,y0:y1,x0:x1") from None
    if not (0 <= z0 < z1 and 0 <= y0 < y1 and 0 <= x0 < x1):
        raise InputError(f"{name} {text}: each axis needs 0 <= begin < end")
    return (z0, y0, x0), (z1, y1, x1)


def watched(target: Path) -> "tuple[Path, Ledger | None]":
    """Return the run folder to watch and the ledger that knows it, if there is one."""
    if not target.exists():
        # A run of another machine, by its folder there or its id.
        settings = LedgerSettings.of_environment()
        if settings.resolve() is None:
            raise InputError(
                f"{target}: no such run folder or configuration file; to ask the database for a "
                "run of another machine, set AGQ_MONGO_URI"
            )
        return target, open_if_named(settings.model_copy(update={"required": True}))
    run_dir, settings = _folder_and_ledger(target)
    # Watching works without the database: the journal says the same.
    try:
        return run_dir, open_if_named(settings.model_copy(update={"required": False}))
    except LedgerError as error:
        # For example, a colleague's run, whose URI only that colleague can read.
        if not target.is_dir():
            raise
        say(f"agq: {error}: read from the journal", err=True)
        return run_dir, None


def open_if_named(settings: LedgerSettings) -> "Ledger | None":
    """Open the ledger as `ledger.database.connect` does; its client is imported if needed."""
    if settings.resolve() is None and not settings.required:
        return None
    from agq.blockwise.ledger.database import connect

    return connect(settings)


def _folder_and_ledger(target: Path) -> tuple[Path, LedgerSettings]:
    if target.is_dir():
        recorded = RunFolder(target).record()["config"]
        try:
            ledger = recorded_ledger(target, recorded.get("ledger"))
            return target, LedgerSettings.model_validate(ledger or {})
        except ValidationError:
            pass  # reading all of it says what is wrong
    config = read_target(target)
    return Path(config.run_dir), config.ledger or LedgerSettings()
