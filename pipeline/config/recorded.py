"""The configuration of a run that a folder holds, or that a file describes.

A run that is only looked at needs little of its configuration, so the schema is imported late.
What a record of somebody else names is looked at, and not done (`require_trusted`), and nothing is
written into their folder (`require_own_folder`).
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agq.blockwise.ledger.settings import URI_VARIABLE
from agq.errors import InputError
from agq.owners import TRUSTED_VARIABLE, stranger
from agq.paths import expanded
from agq.pipeline.folder import RunFolder

if TYPE_CHECKING:
    from agq.pipeline.config.schema import Config

_logger = logging.getLogger(__name__)

_DECIDING = ("run.json", "predict.json", "slurm", "slurm/config.json", "slurm/jobs.json")
"""What in a run folder decides which code a command or a job runs."""


def require_trusted(run_dir: Path, what: str, *, trust: bool = False) -> None:
    """Refuse to run what a run folder of somebody else may have chosen.

    Parameters
    ----------
    run_dir
        The folder; it need not exist.
    what
        What would run or be sent, for the message.
    trust
        Whether the user has said that the owner is trusted.

    Raises
    ------
    InputError
        If the folder, or a file in it that decides what is run, belongs to a stranger.
    """
    owner = None if trust else stranger(run_dir, *(run_dir / name for name in _DECIDING))
    if owner is not None:
        raise InputError(
            f"{what}: {run_dir}, or its record, belongs to {owner}, who would decide what runs "
            f"under your name; if you trust them, give --trust, or list them in {TRUSTED_VARIABLE}"
        )


def require_own_folder(run_dir: Path, *, trust: bool = False) -> None:
    """Refuse to write into the run folder of somebody else.

    A folder in it may be a link to one of the user's, where files of the same names would be
    replaced or deleted.

    Parameters
    ----------
    run_dir
        The folder; it need not exist.
    trust
        Whether the user has said that the owner is trusted.

    Raises
    ------
    InputError
        If the folder belongs to a stranger.
    """
    owner = None if trust else stranger(run_dir)
    if owner is not None:
        raise InputError(
            f"{run_dir} belongs to {owner}, whose links could lead what is written into folders of "
            "yours; work on a copy (cp -r), or, if you trust them, list them in "
            f"{TRUSTED_VARIABLE}"
        )


def read_target(target: Path, settings: list[str] | None = None) -> "Config":
    """Return the configuration of a run folder, or of a file.

    A record holds values as they were when the run began: ``${NAME}`` in it stays as it is.
    """
    from agq.pipeline.config.schema import load_config, parse_config
    from agq.pipeline.config.yaml_settings import apply_override

    if not target.is_dir():
        return load_config(target, settings)
    run = RunFolder(target)
    recorded = run.config()
    for name, setting in run.record().get("settings", {}).items():
        section, _, field = name.partition(".")
        if setting["from"] != "configuration" and isinstance(recorded.get(section), dict):
            # To be found again in the same place, and not to look as if the user had written it.
            recorded[section].pop(field, None)
    recorded["run_dir"] = str(target)
    recorded["ledger"] = recorded_ledger(target, recorded.get("ledger"))
    recorded["notify"] = _recorded_notify(target, recorded.get("notify"))
    for setting in settings or []:
        apply_override(recorded, setting, expand=True)
    return parse_config(recorded, source=str(target / "run.json"))


def _recorded_notify(run_dir: Path, notify: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return whom to tell, by a record: it hides a webhook, whose address is in a file."""
    if notify is None or notify.get("webhook") is None:
        return notify
    file = run_dir / "notify" / "webhook"
    return {**notify, "webhook": None, "webhook_file": file if file.exists() else None}


def recorded_ledger(run_dir: Path, ledger: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the ledger's settings with a URI that can be used: a recorded one is masked."""
    recorded = (ledger or {}).get("uri_file")
    # What was submitted keeps it in a file, which moves with the run.
    files = [*([] if recorded is None else [recorded]), run_dir / "slurm" / "ledger-uri"]
    if stranger(run_dir, run_dir / "run.json"):
        # A stranger's URI could have your credentials of a cloud sent to a server of theirs.
        for file in [*files]:
            if owner := stranger(expanded(file)):
                _logger.warning("%s belongs to %s: it is not used", file, owner)
                files.remove(file)
        recorded = recorded if recorded in files else None
    file = next((str(f) for f in files if os.access(expanded(f), os.R_OK)), None)
    if file is None and not os.environ.get(URI_VARIABLE):
        file = recorded  # to say that it cannot be read; else, as for colleagues, the variable
    if ledger is None and file is None:
        return None
    return {**(ledger or {}), "uri": None, "uri_file": file}
