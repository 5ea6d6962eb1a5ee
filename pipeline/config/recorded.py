"""The configuration of a run that a folder holds, or that a file describes.

A run that is only looked at needs little of its configuration, so the schema is imported late.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agq.blockwise.ledger.settings import URI_VARIABLE
from agq.paths import expanded
from agq.pipeline.folder import RunFolder

if TYPE_CHECKING:
    from agq.pipeline.config.schema import Config


def read_target(target: Path, settings: list[str] | None = None) -> "Config":
    """Return the configuration of a run folder, or of a file.

    A record holds values as they were when the run began: ``${NAME}`` in it stays as it is.
    """
    from agq.pipeline.config.schema import load_config, parse_config
    from agq.pipeline.config.yaml_settings import apply_override

    if not target.is_dir():
        return load_config(target, settings)
    recorded = RunFolder(target).record()["config"]
    recorded["run_dir"] = str(target)
    recorded["ledger"] = recorded_ledger(target, recorded.get("ledger"))
    for setting in settings or []:
        apply_override(recorded, setting, expand=True)
    return parse_config(recorded, source=str(target / "run.json"))


def recorded_ledger(run_dir: Path, ledger: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the ledger's settings with a URI that can be used: a recorded one is masked."""
    recorded = (ledger or {}).get("uri_file")
    # What was submitted keeps it in a file, which moves with the run.
    files = [*([] if recorded is None else [recorded]), run_dir / "slurm" / "ledger-uri"]
    file = next((str(f) for f in files if os.access(expanded(f), os.R_OK)), None)
    if file is None and not os.environ.get(URI_VARIABLE):
        file = recorded  # to say that it cannot be read; else, as for colleagues, the variable
    if ledger is None and file is None:
        return None
    return {**(ledger or {}), "uri": None, "uri_file": file}
