"""Paths that a user gives, before anything is done with them."""

import os
from pathlib import Path

from agq.errors import InputError


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder in the place of ``~`` or ``~user``.

    Raises
    ------
    InputError
        If there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such home folder; write the path in full") from None


def require_utf8(path: str | os.PathLike[str], what: str) -> None:
    """Check that a name can be written into records and into the database.

    Raises
    ------
    InputError
        If it is no valid UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{what} {path}: this name is not valid UTF-8, so it cannot be recorded; rename the"
            " folder (mv), or give a link to it a plain name (ln -s)"
        ) from None
