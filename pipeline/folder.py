"""The run folder: one lock, one record (run.json) and the identity that blocks of a run share."""

import getpass
import hashlib
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from agq.blockwise.ledger.settings import shown_uri
from agq.blockwise.storage import locks
from agq.blockwise.storage.addresses import put_away, put_back
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.storage.place import is_copy, place_of
from agq.blockwise.storage.portable import from_portable, to_portable
from agq.credentials import hidden, hide_address
from agq.errors import InputError, machine_fault
from agq.owners import close_to_others
from agq.paths import require_utf8
from agq.pipeline.records import check_grid, check_identity, plain, read_record
from agq.reading import read_json

if TYPE_CHECKING:
    from agq.blockwise.blocks.grid import BlockGrid
    from agq.model.recommended import Recommended

FORMAT = 1
EARLIER_FRAGMENTS = "settings.json"
"""Of a folder of fragments that an earlier release made, in the place of run.json."""
_LOCK = ".lock"
TIMING = "timing.json"
"""How long a block takes, as a plan has measured it (`forecast.timing`)."""
EDITS = "edits.csv"
"""Copy of the edits that the stitch applies."""
KEPT = (_LOCK, f"{_LOCK}.owner", "imported", "slurm", "notify", TIMING)
"""What may be in the folder before the run's record is, and stays when the run is deleted: its
lock, image files made into zarr, what a submission has prepared (jobs, whom to tell), and what a
plan has measured."""
_GUARDED = ("run.json", "predict.json", "session.json", "slurm/*.json", "slurm/*.sh")
"""Files that decide what commands, workers and jobs run."""
_URI = re.compile(r"mongodb(\+srv)?://.*", re.DOTALL)
_ADDRESS = re.compile(r"\w[\w+.-]*://.*", re.DOTALL)
_LEADS = {"coordinator": "predict", "stitch": "stitch"}
_PACKAGES = ("numpy", "zarr", "daisy", "dask", "pymongo")
_PORTABLE = ("config", "identity")

DECIDING = ("agq-pipeline", "torch", "scipy", "connected-components-3d", "scikit-image", "numba")
"""Packages whose version may decide single voxels of a block."""


class RunLockedError(InputError):
    """Another process works on the run."""


class RunFolder:
    """Everything a run leaves behind lives in one folder.

    Parameters
    ----------
    path
        The folder; made by `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        require_utf8(self.path, "run_dir")

    @property
    def container(self) -> Path:
        """The zarr v3 group with fragments, affinities and segmentation."""
        return self.path / "data.zarr"

    @property
    def precomputed(self) -> Path:
        """The export for neuroglancer, unless it was asked for elsewhere."""
        return self.path / "precomputed"

    def journal(self, stage: str) -> Path:
        """Folder of the journal of a stage."""
        return self.path / "journal" / stage

    @property
    def record_path(self) -> Path:
        """The file that records what was run, with what, and how it ended."""
        return self.path / "run.json"

    def submitted(self) -> dict[str, int]:
        """Return the number of the last batch job that was submitted for each stage."""
        try:
            jobs = read_json(self.path / "slurm" / "jobs.json")["jobs"]
            return {_LEADS[job["role"]]: int(job["id"]) for job in jobs if job["role"] in _LEADS}
        except (InputError, OSError, ValueError, TypeError, KeyError):
            return {}

    def exists(self) -> bool:
        """Tell whether the folder holds a run."""
        return self.record_path.is_file()

    def record(self) -> dict[str, Any]:
        """Read run.json.

        Raises
        ------
        InputError
            If the folder holds no run or the file is damaged.
        """
        try:
            record = read_record(self.record_path)
        except FileNotFoundError:
            if (self.path / EARLIER_FRAGMENTS).is_file():
                raise InputError(
                    f"{self.path} was made by an earlier release; agq stitch {self.path} makes it a"
                    " run"
                ) from None
            raise InputError(f"{self.path} is not a run folder (no run.json)") from None
        except OSError as error:
            raise InputError(machine_fault(error) or f"{self.record_path}: {error}") from None
        present = {name: record[name] for name in _PORTABLE if name in record}
        return record | from_portable(present, self.path)

    def config(self) -> dict[str, Any]:
        """Return the configuration of the record, with whole addresses for the run's owner.

        Raises
        ------
        InputError
            As `record`.
        """
        recorded: dict[str, Any] = put_back(self.record_path, self.record()["config"])
        return recorded

    def recommended(self) -> "Recommended":
        """Return what the checkpoint recommended when the run was begun.

        Raises
        ------
        InputError
            As `record`, or if it cannot be used.
        """
        from agq.model.recommended import Recommended

        values = self.record().get("recommended") or {}
        return Recommended.from_values(values, f"{self.record_path}: recommended")

    def identity(self) -> dict[str, Any]:
        """Return the recorded identity of a run that goes on, whole.

        Raises
        ------
        InputError
            As `record`, or if an entry is missing.
        """
        return check_identity(self.record()["identity"], self.record_path)

    def grid(self) -> "BlockGrid":
        """Return the recorded grid of blocks.

        Raises
        ------
        InputError
            As `record`, or if it has none.
        """
        return grid_of(self.record()["identity"].get("grid"), str(self.record_path))

    def create(
        self,
        config: dict[str, Any],
        identity: dict[str, Any],
        compared: Collection[str] = (),
        settings: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        recommended: "Recommended | None" = None,
    ) -> None:
        """Start the run, or go on with the existing one if it is the same.

        Parameters
        ----------
        config
            The resolved configuration without secrets.
        identity
            Whatever decides the bytes of a block: input, checkpoint, grid, model settings.
        compared
            As for `require_identity`.
        settings
            Where settings come from, by name (`agq.pipeline.config.resolved.Origins`).
        recommended
            What the checkpoint recommends; a run keeps what it was begun with.

        Raises
        ------
        InputError
            If the folder holds a run with another identity, or files that are no run.
        """
        if self.exists():
            self.require_identity(identity, compared)
            self.claim_id()
            known = self.record().get("settings", {})
            self.update(config=config, settings={**known, **settings})
        else:
            entries = {p.name for p in self.path.iterdir()} if self.path.is_dir() else set()
            if entries.difference(KEPT) and EARLIER_FRAGMENTS not in entries:
                raise InputError(
                    f"run_dir {self.path} is not empty and holds no run; choose another folder"
                )
            make_folder(self.path, own=True)
            self._write(
                {
                    "format": FORMAT,
                    # Runs of several users share one ledger, so a name is not enough.
                    "id": uuid.uuid4().hex,
                    "place": place_of(self.path, self.path / _LOCK),
                    "name": self.path.name,
                    "created": time.time(),
                    "config": config,
                    "identity": identity,
                    "identity_hash": identity_hash(identity),
                    "settings": dict(settings),
                    "recommended": recommended and recommended.to_dict(),
                    "commands": [],
                    "stages": {},
                }
            )
        record = self.record()
        record["commands"].append(
            {
                "argv": shown_arguments(sys.argv),
                "time": time.time(),
                "host": socket.gethostname(),
                "user": user_name(),
                "versions": versions(),
            }
        )
        self._write(record)

    def has_own_id(self, record: dict[str, Any]) -> bool:
        """Tell whether the id in run.json is this folder's, not that of one it is a copy of."""
        recorded = record.get("place") or {"path": str(record["config"].get("run_dir", self.path))}

        def holds_the_same(folder: Path) -> bool:
            try:
                return bool(RunFolder(folder).record()["id"] == record["id"])
            except InputError:
                return False

        return not is_copy(self.path, self.path / _LOCK, recorded, holds_the_same)

    def claim_id(self) -> None:
        """Give a copied folder an id of its own: the ledger knows runs by it."""
        record = self.record()
        entries: dict[str, Any] = {"place": place_of(self.path, self.path / _LOCK)}
        if not self.has_own_id(record):
            entries |= {"id": uuid.uuid4().hex, "copy_of": record["id"]}
            # The jobs in the queue are those of the other.
            (self.path / "slurm" / "jobs.json").unlink(missing_ok=True)
        self.update(**entries)

    def require_identity(self, identity: dict[str, Any], compared: Collection[str] = ()) -> None:
        """Refuse to go on with a run whose blocks were made with other settings.

        Where an input lies is no setting, and a mask may change: its blocks are chosen anew.

        Parameters
        ----------
        identity
            As for `create`.
        compared
            Entries, such as ``raw.metadata``, for which their content has been compared.

        Raises
        ------
        InputError
            Naming every difference, and how to start over.
        """
        new = hidden(json.loads(json.dumps(identity)))
        changed = [
            line
            for name, line in _differences(hidden(self.record()["identity"]), new)
            if name not in compared and not _names_only(name)
        ]
        if changed:
            raise InputError(
                f"{self.path} holds a run made with different settings ({', '.join(changed)}); its"
                " blocks cannot be mixed with new ones: choose another run_dir, or start over with "
                "--overwrite"
            )

    def update(self, **entries: Any) -> None:
        """Replace top-level entries of run.json."""
        record = self.record()
        record.update(entries)
        self._write(record)

    def update_stage(self, stage: str, **entries: Any) -> None:
        """Merge entries into the record of one stage."""
        record = self.record()
        record["stages"].setdefault(stage, {}).update(entries)
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        present = {name: record[name] for name in _PORTABLE if name in record}
        record = record | to_portable(json.loads(json.dumps(present)), self.path)
        # Earlier releases have recorded whole addresses; an error may hold one at any time. What is
        # not read again must not be written.
        record = plain(put_away(self.record_path, record), lossy=True)
        write_atomic(self.record_path, json.dumps(record, indent=1).encode(), mode=0o644)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run alone: two coordinators on one folder would do every block twice.

        Raises
        ------
        InputError
            If another process holds it, or the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                make_folder(self.path, own=True)
                # Of earlier releases, or made by hand: whatever the umask was.
                close_to_others(*(p for pattern in _GUARDED for p in self.path.glob(pattern)))
                stack.enter_context(locks.hold(self.path / _LOCK))
            except locks.LockedError as error:
                raise RunLockedError(
                    f"another agq process works on {self.path} ({error}); wait for it or stop it"
                ) from None
            except OSError as error:
                raise InputError(f"run_dir {self.path} is not writable: {error.strerror}") from None
            yield


def grid_of(described: Any, source: str) -> "BlockGrid":
    """Return the grid of blocks that a record, or a document of the ledger, describes.

    Raises
    ------
    InputError
        If it describes none.
    """
    from agq.blockwise.blocks.grid import BlockGrid

    checked = check_grid(described, source)
    try:
        return BlockGrid.from_dict(checked)
    except (InputError, ValueError, OverflowError) as error:
        raise InputError(f"{source} is damaged: grid: {error}") from None


def shown_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line as records may hold it: addresses without passwords."""
    # To the end of the argument: an unescaped password may hold anything, a space too.
    plain = [_URI.sub(lambda match: shown_uri(match[0]), text) for text in arguments]
    return [_ADDRESS.sub(lambda match: hide_address(match[0]), text) for text in plain]


def identity_hash(identity: dict[str, Any]) -> str:
    """Hash what decides the bytes of a block; the same content gives the same hash."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions(packages: Iterable[str] = (*DECIDING, *_PACKAGES)) -> dict[str, str]:
    """Versions of Python and of the packages that touch the data."""
    found = {"python": sys.version.split()[0]}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def user_name() -> str:
    """Return the name of the user of this process, or the number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _names_only(entry: str) -> bool:
    """Whether an entry of an identity only says where an input lies, or belongs to the mask."""
    name, _, field = entry.partition(".")
    return name == "mask" or (name in ("raw", "classes") and field in ("path", "dataset"))


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name of each entry that differs, and a line about it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
    elif old != new:
        yield where, f"{where}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
