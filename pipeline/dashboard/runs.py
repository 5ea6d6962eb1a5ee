"""The runs that the page may show: each listing is new, and the last runs shown stay open."""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pymongo.errors import PyMongoError

from agq.blockwise.ledger.database import Ledger
from agq.errors import InputError
from agq.owners import TRUSTED_VARIABLE, stranger
from agq.pipeline.dashboard.run_view import STAGE, RunView
from agq.pipeline.folder import RunFolder
from agq.pipeline.records import newest_documents
from agq.pipeline.status.listing import ledger_line
from agq.pipeline.status.stages import coordinator_alive, run_state_of, stage_entries

_OPEN_RUNS: Final = 4
_MAX_LISTED: Final = 500
_ID: Final = re.compile(r"[0-9A-Za-z_]{1,64}")


@dataclass(frozen=True)
class _Place:
    """Where a run lies.

    Attributes
    ----------
    ledger_id
        Its id, if only the ledger knows it.
    stranger
        Its owner, if the folder is nobody's who is trusted.
    problem
        What is wrong with its record, if that cannot be read.
    """

    folder: Path
    ledger_id: str | None = None
    stranger: str | None = None
    problem: str | None = None


class Runs:
    """The runs that a page may show, by key.

    Parameters
    ----------
    folders
        Run folders.
    parent
        Folder whose subfolders each listing searches for runs. Those of users who are not trusted,
        nor own this folder, are listed and not opened.
    ledger
        Its runs are listed as well.
    """

    def __init__(
        self, folders: list[Path], parent: Path | None = None, ledger: Ledger | None = None
    ) -> None:
        self._folders = [folder.absolute() for folder in folders]
        self._parent = parent
        self._ledger = ledger
        self._views: OrderedDict[str, RunView] = OrderedDict()
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        self.listing()

    def listing(self) -> list[dict[str, Any]]:
        """List all runs, the newest first: ``key``, name, state, progress.

        One whose record cannot be read is listed too: its state is ``damaged``, and ``problem``
        says why.

        Raises
        ------
        InputError
            If the only run folder has no readable run.
        """
        folders = list(self._folders)
        if self._parent is not None and self._parent.is_dir():
            folders += sorted(p.parent.absolute() for p in self._parent.glob("*/run.json"))
        lines: dict[str, dict[str, Any]] = {}
        places: dict[str, _Place] = {}
        strangers = []
        for folder in dict.fromkeys(folders):
            owner = None if folder in self._folders else self._stranger(folder)
            if owner is not None:
                strangers.append((folder, owner))
                continue
            try:
                run = RunFolder(folder)
                record = run.record()
                key = _key(record["id"])
                if key in lines or not run.has_own_id(record):
                    key = _key(str(folder), "folder")
                lines[key] = _line(key, record, folder, coordinator_alive(folder), "journal")
                places[key] = _Place(folder)
            except InputError as error:
                # A damaged or foreign run.json among many must not hide the others.
                if self._parent is None and self._ledger is None:
                    raise
                if not os.path.lexists(folder / "run.json"):
                    continue  # the ledger may know a run of another machine by this folder
                key = _key(str(folder), "folder")
                lines[key] = _damaged(key, folder.name, folder, str(error), "journal")
                places[key] = _Place(folder, problem=str(error))
        for folder, owner in strangers:
            # Not under the id that it says: that may be the id of another run.
            key = _key(str(folder), "folder")
            unknown = {"state": "", "stranger": owner}
            lines[key] = _line(key, {}, folder, None, "journal") | unknown
            places[key] = _Place(folder, stranger=owner)
        for record, problem in self._ledger_runs():
            if problem is not None:
                key = _key(repr(record["_id"]), "document")
                place = Path(str(record.get("run_dir", "")))
                lines[key] = _damaged(key, str(record.get("name", "")), place, problem, "ledger")
                places[key] = _Place(place, problem=problem)
                continue
            key = _key(record["_id"])
            if key not in lines:
                place = Path(record.get("run_dir", ""))
                lines[key] = _line(key, record, place, None, "ledger") | self._rates(record)
                places[key] = _Place(place, ledger_id=record["_id"])
        with self._lock:
            self._places = places
        alive = [line for line in lines.values() if line["state"] == "running"]
        for line in alive[: _OPEN_RUNS - 1]:
            if line["source"] == "journal":
                # Its own page says what is wrong with it; the others are listed all the same.
                with suppress(InputError, OSError):
                    line |= self.view(line["key"]).progress()
        return sorted(lines.values(), key=lambda line: -(line["created"] or 0))

    def view(self, key: str) -> RunView:
        """Return a run by its key; the last few runs stay in memory.

        Raises
        ------
        InputError
            If the listing has no such run, or it is a stranger's.
        """
        with self._lock:
            if key not in self._places:
                raise InputError(f"the listing has no run {key}")
            view = self._views.pop(key, None) or self._opened(self._places[key])
            self._views[key] = view
            while len(self._views) > _OPEN_RUNS:
                self._views.popitem(last=False)
            return view

    def _opened(self, place: _Place) -> RunView:
        if place.problem is not None:
            raise InputError(place.problem)
        if place.stranger is not None:
            raise InputError(
                f"{place.folder} belongs to {place.stranger}, who is not trusted; look at this run "
                f"alone (agq dashboard {place.folder}), or list its owner in {TRUSTED_VARIABLE}"
            )
        if place.ledger_id is None or _is_of(place.folder, place.ledger_id):
            return RunView(place.folder)
        return RunView(place.folder, self._ledger, ledger_id=place.ledger_id)

    def _rates(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return speed and time left of a run that only the ledger knows, from its totals."""
        assert self._ledger is not None
        line = ledger_line(self._ledger, record)
        return {name: line[name] for name in ("blocks_per_s", "eta_s")}

    def _stranger(self, folder: Path) -> str | None:
        assert self._parent is not None
        return stranger(folder, folder / "run.json", like=self._parent)

    def _ledger_runs(self) -> list[tuple[dict[str, Any], str | None]]:
        if self._ledger is None:
            return []
        try:
            fields = ("name", "run_dir", "created", "updated", "stages", "host", "user")
            wanted: dict[str, Any] = {}
            if self._folders:
                paths = {"run_dir": {"$in": [str(f) for f in self._folders]}}
                wanted = {"$or": [paths, {"_id": {"$in": [f.name for f in self._folders]}}]}
            shown = dict.fromkeys(fields, 1)
            return list(newest_documents(self._ledger, wanted, shown, _MAX_LISTED))
        except PyMongoError:
            return []


def _is_of(folder: Path, run: str) -> bool:
    """Tell whether a folder that a document of the ledger names is that of the run.

    Whoever writes to the database may name any folder: it must be there, say that it is this run,
    and belong to somebody who is trusted.
    """
    if not folder.is_absolute() or stranger(folder, folder / "run.json") is not None:
        return False
    try:
        return bool(RunFolder(folder).record()["id"] == run)
    except InputError:
        return False


def _key(text: str, kind: str | None = None) -> str:
    """Return a name for addresses: an id as it stands, if it is one; else made from the text."""
    if kind is None and _ID.fullmatch(text):
        return text
    return (
        f"{kind or 'id'}-{hashlib.sha256(text.encode(errors='backslashreplace')).hexdigest()[:16]}"
    )


def _damaged(key: str, name: str, folder: Path, problem: str, source: str) -> dict[str, Any]:
    """Return the line of a run whose record cannot be read."""
    line = _line(key, {"name": name}, folder, None, source)
    return line | {"state": "damaged", "problem": problem}


def _line(
    key: str, record: dict[str, Any], folder: Path, alive: bool | None, source: str
) -> dict[str, Any]:
    stages = record.get("stages", {})
    predict = stages.get(STAGE, {})
    counted = predict.get("totals") or predict.get("report") or {}
    failed = counted.get("failed", 0)
    return {
        "key": key,
        "name": record.get("name") or folder.name,
        "run_dir": str(folder),
        "created": record.get("created"),
        "state": run_state_of(stage_entries(record, ()).values(), alive),
        "stage": next((n for n in reversed(stages) if stages[n].get("state") == "running"), None),
        "blocks_total": predict.get("blocks_total"),
        "done": counted.get("done", 0) + counted.get("skipped", 0),
        "failed": len(failed) if isinstance(failed, list) else failed,
        "source": source,
        "problem": None,
        "id": record.get("id") or record.get("_id"),
        "user": (record.get("commands") or [record])[-1].get("user"),
        "heard": record.get("updated") or predict.get("finished") or predict.get("started"),
        "blocks_per_s": None,
        "eta_s": None,
    }
