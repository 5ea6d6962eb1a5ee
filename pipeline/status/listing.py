"""Many runs at a glance: those of a database, or of a folder of run folders."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agq.errors import InputError
from agq.pipeline.folder import RunFolder
from agq.pipeline.records import newest_documents
from agq.pipeline.status.monitor import NO_TOTALS, Monitor, Queue
from agq.pipeline.status.run_status import StageStatus
from agq.pipeline.status.stages import Record, run_state_of, stage_entries, stage_status

if TYPE_CHECKING:
    from agq.blockwise.ledger.database import Ledger

Line = dict[str, Any]

_COUNTS: Final = ("state", "blocks_total", "done", "skipped", "failed")
_UNREADABLE: Final = (AttributeError, KeyError, TypeError, ValueError)


def ledger_lines(ledger: "Ledger", limit: int = 100) -> list[Line]:
    """Summarise the newest runs of a database, from their totals alone.

    Returns
    -------
    lines
        One mapping per run, the newest first: ``id``, ``name``, ``run_dir``, ``user``, ``host``,
        ``created``, ``updated`` (when it was heard of last), ``state``, ``stage`` (the one that is
        under way or comes next), ``blocks_per_s`` (over the last minute), ``eta_s``, ``problem``
        (why its document cannot be read, else None) and ``stages``: by name ``state``, ``done``,
        ``skipped``, ``failed``, ``blocks_total``.

    Raises
    ------
    PyMongoError
        If the database is away.
    """
    lines = []
    for document, problem in newest_documents(ledger, {}, {"config": 0}, limit):
        try:
            if problem is not None:
                raise ValueError(problem)
            lines.append(ledger_line(ledger, document))
        except (InputError, *_UNREADABLE) as error:
            name = str(document.get("name", ""))
            lines.append(_damaged(str(document["_id"]), name, "", f"damaged: {error}"))
    return lines


def folder_lines(parent: Path, queue: Queue | None = None) -> list[Line]:
    """Summarise the runs in a folder, or the run that it is; lines as of `ledger_lines`.

    Raises
    ------
    InputError
        If it holds no run folder.
    """
    found = [parent, *sorted(parent.iterdir())] if parent.is_dir() else []
    folders = [folder for folder in found if (folder / "run.json").exists()]
    if not folders:
        raise InputError(f"{parent}: no run folder in it (none has a run.json)")
    lines = []
    for folder in folders:
        try:
            record = RunFolder(folder).record()
            status = Monitor(folder, queue=queue).poll()
            host = (record.get("commands") or [{}])[-1].get("host")
            about = status.model_dump(include={"id", "name", "run_dir", "user", "created", "state"})
            heard = {"host": host, "updated": status.heard}
            lines.append(_line(about | heard, status.stages))
        except InputError as error:
            lines.append(_damaged("", folder.name, str(folder), str(error)))
        except _UNREADABLE as error:
            lines.append(_damaged("", folder.name, str(folder), f"run.json is damaged: {error}"))
    return sorted(lines, key=lambda line: -(line["created"] or 0))


def ledger_line(ledger: "Ledger", document: Record) -> Line:
    """Summarise the run of a checked document of a database; the line is as of `ledger_lines`."""
    from agq.blockwise.ledger.progress import LedgerStage

    run, now, path = document["_id"], time.time(), Path(document.get("run_dir") or "")
    sums = {name: stage.get("totals", {}) for name, stage in document.get("stages", {}).items()}
    totals = {name: NO_TOTALS | of for name, of in sums.items() if of.get("bytes")}
    entries = stage_entries(document, totals)
    state = run_state_of(entries.values(), None)
    stages = [
        stage_status(
            name,
            entry,
            LedgerStage(ledger, run, name, totals[name]) if name in totals else None,
            state,
            path,
            now,
            brief=True,
        )
        for name, entry in entries.items()
    ]
    names = ("name", "run_dir", "user", "host", "created", "updated")
    return _line({"id": run, "state": state, **{n: document.get(n) for n in names}}, stages)


def _line(about: Line, stages: Iterable[StageStatus]) -> Line:
    stages = list(stages)
    order = [s for state in ("running", "stopped", "failed") for s in stages if s.state == state]
    order += [s for s in stages if s.state == "waiting"] or stages[-1:]
    stage = order[0] if order else None
    return about | {
        "stage": stage and stage.name,
        "blocks_per_s": stage and stage.blocks_per_s_now,
        "eta_s": stage and stage.eta_s,
        "problem": None,
        "stages": {s.name: {name: getattr(s, name) for name in _COUNTS} for s in stages},
    }


def _damaged(run: str, name: str, run_dir: str, problem: str) -> Line:
    unknown = dict.fromkeys(("user", "host", "created", "updated"))
    about = {"id": run, "name": name, "run_dir": run_dir, "state": "damaged"}
    return _line(about | unknown, ()) | {"problem": problem}
