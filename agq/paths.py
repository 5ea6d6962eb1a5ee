"""Paths that a user gives, before anything is done with them."""

import os
import re
from pathlib import Path

from agq.credentials import hide_address
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


def scheme_of(path: str | os.PathLike[str]) -> str:
    """Return the scheme of an address such as ``s3://bucket/volume`` in lower case; "" of a path.

    A path object has only one of the slashes left.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", os.fspath(path))
    return match[1].lower() if match else ""


def require_local(path: str | os.PathLike[str], what: str) -> None:
    """Refuse an address where only a local path will do, before a folder ``s3:`` is made.

    Raises
    ------
    InputError
        Naming the field or argument, `what`.
    """
    if fault := no_local_path(path):
        raise InputError(f"{what}: {fault}")


def no_local_path(path: str | os.PathLike[str]) -> str | None:
    """Say why a path is no local one, if it is an address."""
    if not (scheme := scheme_of(path)):
        return None
    shown = hide_address(os.fspath(path))
    return f"{shown} is an address of {scheme}, and this must be a local path"


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
