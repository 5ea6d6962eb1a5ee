"""Paths in the records of a folder that may be moved: those inside it are relative to it."""

from pathlib import Path
from typing import Any

_HERE = "{run_dir}"


def to_portable(values: Any, folder: Path) -> Any:
    """Return plain data in which paths at or below a folder begin with ``{run_dir}``.

    Parameters
    ----------
    values
        Dictionaries, lists and scalars, as JSON has them.
    folder
        The folder; a path through a symbolic link to it counts too.
    """
    roots = [str(folder.absolute()), str(folder.resolve())]

    def shorten(text: str) -> str:
        for root in roots:
            if text == root or text.startswith(f"{root}/"):
                return _HERE + text[len(root) :]
        return text

    return _mapped(values, shorten)


def from_portable(values: Any, folder: Path) -> Any:
    """Return what `to_portable` was given, with the paths of where the folder lies now."""
    root = str(folder.absolute())

    def extend(text: str) -> str:
        inside = text == _HERE or text.startswith(f"{_HERE}/")
        return root + text[len(_HERE) :] if inside else text

    return _mapped(values, extend)


def _mapped(values: Any, change: Any) -> Any:
    if isinstance(values, str):
        return change(values)
    if isinstance(values, dict):
        return {name: _mapped(value, change) for name, value in values.items()}
    return [_mapped(value, change) for value in values] if isinstance(values, list) else values
