"""The runs that the page may show: each listing is new, and the last runs shown stay open."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from pymongo.errors import PyMongoError

from agq.blockwise.ledger.database import Ledger
from agq.errors import InputError
from agq.pipeline.dashboard.run_view import STAGE, RunView
from agq.pipeline.folder import RunFolder
from agq.pipeline.status.stages import coordinator_alive, run_state_of, stage_entries

_OPEN_RUNS: Final = 4
_MAX_LISTED: Final = 500


class Runs:
    """The runs that a page may show, by key.

    Parameters
    ----------
    folders
        Run folders.
    parent
        Folder whose subfolders each listing searches for runs.
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
        self._places: dict[str, Path] = {}
        self._lock = threading.Lock()
        self.listing()

    def listing(self) -> list[dict[str, Any]]:
        """List all runs, the newest first: ``key``, name, state, progress.

        Raises
        ------
        InputError
            If the only run folder has no readable run.
        """
        folders = list(self._folders)
        if self._parent is not None and self._parent.is_dir():
            folders += sorted(p.parent.absolute() for p in self._parent.glob("*/run.json"))
        lines: dict[str, dict[str, Any]] = {}
        for folder in dict.fromkeys(folders):
            try:
                run = RunFolder(folder)
                record = run.record()
                if not run.has_own_id(record):
                    record["id"] = f"copy-{record['id']}-{folder.name}"
                lines[record["id"]] = _line(record, folder, coordinator_alive(folder), "journal")
            except InputError:
                # A damaged or foreign run.json among many must not hide the others.
                if self._parent is None and self._ledger is None:
                    raise
        for record in self._ledger_runs():
            if record["_id"] not in lines:
                place = Path(record.get("run_dir", ""))
                lines[record["_id"]] = _line({"id": record["_id"], **record}, place, None, "ledger")
        with self._lock:
            self._places = {key: Path(line["run_dir"]) for key, line in lines.items()}
        alive = [line for line in lines.values() if line["state"] == "running"]
        for line in alive[: _OPEN_RUNS - 1]:
            if line["source"] == "journal":
                line |= self.view(line["key"]).progress()
        return sorted(lines.values(), key=lambda line: -(line["created"] or 0))

    def view(self, key: str) -> RunView:
        """Return a run by its key; the last few runs stay in memory.

        Raises
        ------
        InputError
            If the listing has no such run.
        """
        with self._lock:
            if key not in self._places:
                raise InputError(f"the listing has no run {key}")
            view = self._views.pop(key, None) or RunView(self._places[key], self._ledger)
            self._views[key] = view
            while len(self._views) > _OPEN_RUNS:
                self._views.popitem(last=False)
            return view

    def _ledger_runs(self) -> list[dict[str, Any]]:
        if self._ledger is None:
            return []
        try:
            fields = ("name", "run_dir", "created", "stages", "host", "user")
            wanted = {"run_dir": {"$in": [str(f) for f in self._folders]}} if self._folders else {}
            runs = self._ledger.runs.find(wanted, dict.fromkeys(fields, 1))
            return list(runs.sort("created", -1).limit(_MAX_LISTED))
        except PyMongoError:
            return []


def _line(record: dict[str, Any], folder: Path, alive: bool | None, source: str) -> dict[str, Any]:
    stages = record.get("stages", {})
    predict = stages.get(STAGE, {})
    counted = predict.get("totals") or predict.get("report") or {}
    failed = counted.get("failed", 0)
    return {
        "key": record["id"],
        "name": record.get("name", folder.name),
        "run_dir": str(folder),
        "created": record.get("created"),
        "state": run_state_of(stage_entries(record, ()).values(), alive),
        "stage": next((n for n in reversed(stages) if stages[n].get("state") == "running"), None),
        "blocks_total": predict.get("blocks_total"),
        "done": counted.get("done", 0) + counted.get("skipped", 0),
        "failed": len(failed) if isinstance(failed, list) else failed,
        "source": source,
    }
