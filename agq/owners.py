"""Whose file it is: who may decide by a file what a command runs, or which files it shows."""

import os
import pwd
from pathlib import Path
from typing import Final

from agq.errors import InputError

TRUSTED_VARIABLE: Final = "AGQ_TRUSTED_USERS"
"""Environment variable with users to trust: names or numbers, divided by commas."""

_ROOT: Final = 0


def trusted_uids() -> frozenset[int]:
    """Return the users whose files are trusted: you, root, and those that you have listed.

    Raises
    ------
    InputError
        If the environment lists a user that this machine does not know.
    """
    listed = (word.strip() for word in os.environ.get(TRUSTED_VARIABLE, "").split(","))
    return frozenset({os.geteuid(), _ROOT, *(_uid(word) for word in listed if word)})


def stranger(*paths: Path, like: Path | None = None) -> str | None:
    """Return the first owner of these paths that is not trusted, as ``name (uid 1001)``.

    Links are followed; a path that is not there belongs to nobody.

    Parameters
    ----------
    like
        A path whose owner is trusted too, because the user has named it.

    Raises
    ------
    InputError
        As for `trusted_uids`.
    """
    trusted = trusted_uids()
    if like is not None and like.exists():
        trusted |= {like.stat().st_uid}
    for path in paths:
        try:
            uid = path.stat().st_uid
        except OSError:
            continue
        if uid not in trusted:
            return _shown(uid)
    return None


def _uid(word: str) -> int:
    if word.isascii() and word.isdecimal():
        return int(word)
    try:
        return pwd.getpwnam(word).pw_uid
    except (KeyError, ValueError):
        raise InputError(
            f"{TRUSTED_VARIABLE}: this machine has no user {word!r}; give names or numbers of "
            "users, divided by commas"
        ) from None


def _shown(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
