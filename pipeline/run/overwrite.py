"""Deletes a run for `--overwrite`: what a run makes, by a list, and nothing else."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.folder import KEPT, RunFolder

_CHUNK = r"c(/\d+)+"
_TABLE = r"\d+-\d+-\d+(\.graph)?\.npz"
_LEFTOVER = r"(.*/)?(\.[^/]+\.[0-9a-f]{16}\.tmp|[^/]+\.[0-9a-f]{32}\.partial)"
_MADE = re.compile(
    "|".join(
        (
            r"(run|predict)\.secrets\.json|(run|predict|session|imported|stitch|evaluation|sweep|baseline)\.json",
            r"report\.html|baseline\.png",
            r"data\.zarr/((fragments|affinities|segmentation(/s\d+)?)/)?zarr\.json",
            rf"data\.zarr/(fragments|affinities|segmentation/s\d+)/{_CHUNK}",
            r"data\.zarr/(fragments|affinities)/\d+(/\d+)+",
            r"sidecars/(\d+\.agqp|\d+/\d+\.(agqs|npz))",
            r"journal/(predict|relabel|pyramid)/([^/]+\.jsonl|compact\.npz)",
            r"contacts/(layout\.json|present\.npy)",
            rf"(contacts|classes|agglomeration|lut/cut|lut/names)/\d+/{_TABLE}",
            r"agglomeration/edits\.npz|edits\.csv",
            rf"lut(-before)?/(map|changed)/{_TABLE}",
            r"lut(-before)?/(record\.json|(smallest|ids)\.npy|(segments|changed_ids)\.parquet)",
            r"stitch/(contacts|classes|agglomerate|lut|relabel|pyramid)\.(json|sums)",
            r"retries/predict/\d+",
            r"notify/(sent\.json|webhook|\.lock(\.owner)?)",
            r"logs/([^/]+/)*[^/]+\.(log|out|err)(\.\d+)?",
            r"baselines/watershed-[0-9a-f]{8}/.+",
            r"precomputed/.+",
            _LEFTOVER,
        )
    )
)
"""Paths of files in the run folder, with slashes."""


def clear(run: RunFolder, config: Config) -> None:
    """Delete a run; a folder that holds no run is left alone.

    Parameters
    ----------
    run
        The run; its lock is held.
    config
        Configuration of the run that will be made in its place.

    Raises
    ------
    InputError
        If the folder holds anything that the run did not make, a link, or an input of the new run;
        nothing is deleted then.
    """
    if not run.exists():
        return
    _refuse_inputs(run, config)
    files, folders = _contents(run)
    record = run.record_path
    # run.json goes last: a deletion that is cut short leaves a folder that is still a run.
    for file in files:
        if file != record:
            file.unlink()
    for folder in reversed(folders):
        folder.rmdir()
    record.unlink()


def _contents(run: RunFolder) -> tuple[list[Path], list[Path]]:
    """Return all files and folders to delete, outer folders first; refuse what is not the run's."""
    files: list[Path] = []
    folders: list[Path] = []
    pictures = {f"{name}.png" for name in (run.path.name, str(run.record().get("name")))}
    for top, names, others in os.walk(run.path):
        if Path(top) == run.path:
            names[:] = [name for name in names if name not in KEPT]
            others = [name for name in others if name not in KEPT]
        for name in (*names, *others):
            path = Path(top) / name
            if path.is_symlink():
                raise _refusal(run, path, "is a link")
        folders += [Path(top) / name for name in names]
        for name in others:
            path = Path(top) / name
            inside = path.relative_to(run.path).as_posix()
            if inside not in pictures and not _MADE.fullmatch(inside):
                raise _refusal(run, path, "was not made by the run")
            files.append(path)
    return files, folders


def _refusal(run: RunFolder, path: Path, why: str) -> InputError:
    return InputError(
        f"--overwrite: {path} {why}, so nothing of {run.path} is deleted; move it elsewhere, or "
        "choose another run_dir"
    )


def _refuse_inputs(run: RunFolder, config: Config) -> None:
    """Refuse to delete what the new run reads: an input inside the folder, also through a link."""
    kept = [run.path.resolve() / name for name in KEPT]
    values = config.model_dump(mode="json", exclude={"run_dir", "ledger"})
    for field, text in _texts(values):
        if "://" in text or not text:
            continue
        path = Path(text.partition("::")[0]).expanduser()
        try:
            path = path.resolve()
            inside = path.is_relative_to(run.path.resolve()) and path.exists()
        except OSError:  # no path at all: too long, for example
            continue
        if inside and not any(path.is_relative_to(place) for place in kept):
            raise _refusal(run, path, f"is named by {field}")


def _texts(values: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a configuration, with the name of its field."""
    if isinstance(values, str):
        yield field, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{field}.{name}".lstrip("."))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, field)
