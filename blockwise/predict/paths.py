"""Where the processes of one prediction find each other's files in the run folder."""

from pathlib import Path

TASK = "predict"
"""Name of the stage: daisy task, journal folder, log folder."""


def spec_path(run_dir: str | Path) -> Path:
    """Return the path of the specification."""
    return Path(run_dir) / "predict.json"


def session_path(run_dir: str | Path) -> Path:
    """Return the path of the session."""
    return Path(run_dir) / "session.json"


def journal_folder(run_dir: str | Path) -> Path:
    """Return the folder of the prediction's journal."""
    return Path(run_dir) / "journal" / TASK


def log_path(run_dir: str | Path, name: str) -> Path:
    """Return the path of the log of one process."""
    return Path(run_dir) / "logs" / TASK / f"{name}.log"


def log_name(worker: str) -> str:
    """Return the name of the log of a worker, as `log_path` wants it."""
    return worker if worker.startswith("worker-") else f"worker-{worker}"


def retry_path(run_dir: str | Path, number: int) -> Path:
    """Return the file that holds one byte per failed attempt at a block in this run."""
    return Path(run_dir) / "retries" / TASK / str(number)
