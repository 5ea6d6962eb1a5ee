"""What the target of a command stands for: a configuration, a run folder, the ledger that knows it.

A run that is only looked at needs little of its configuration, so little of it is read.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError

from agq.blockwise.ledger.settings import URI_VARIABLE, LedgerError, LedgerSettings
from agq.errors import InputError
from agq.pipeline.folder import RunFolder

if TYPE_CHECKING:
    from agq.blockwise.ledger.database import Ledger
    from agq.pipeline.config.schema import Config


def read_target(target: Path, settings: list[str] | None = None) -> "Config":
    """Return the configuration of a run folder, or of a file."""
    from agq.pipeline.config.schema import load_config, parse_config
    from agq.pipeline.config.yaml_settings import apply_override

    if not target.is_dir():
        return load_config(target, settings)
    recorded = RunFolder(target).record()["config"]
    recorded["run_dir"] = str(target)
    recorded["ledger"] = _recorded_ledger(target, recorded.get("ledger"))
    for setting in settings or []:
        apply_override(recorded, setting)
    return parse_config(recorded, source=str(target / "run.json"))


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
        typer.echo(f"agq: {error}: read from the journal", err=True)
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
            ledger = _recorded_ledger(target, recorded.get("ledger"))
            return target, LedgerSettings.model_validate(ledger or {})
        except ValidationError:
            pass  # reading all of it says what is wrong
    config = read_target(target)
    return Path(config.run_dir), config.ledger or LedgerSettings()


def _recorded_ledger(run_dir: Path, ledger: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the ledger's settings with a URI that can be used: a recorded one is masked."""
    recorded = (ledger or {}).get("uri_file")
    # What was submitted keeps it in a file, which moves with the run.
    files = [*([] if recorded is None else [recorded]), run_dir / "slurm" / "ledger-uri"]
    file = next((str(f) for f in files if os.access(Path(f).expanduser(), os.R_OK)), None)
    if file is None and not os.environ.get(URI_VARIABLE):
        file = recorded  # to say that it cannot be read; else, as for colleagues, the variable
    if ledger is None and file is None:
        return None
    return {**(ledger or {}), "uri": None, "uri_file": file}
