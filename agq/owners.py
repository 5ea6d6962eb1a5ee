"""Whose file it is: who may decide by a file what a command runs, or which files it shows."""

import functools
import logging
import os
import pwd
import shlex
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from agq.errors import InputError
from agq.reading import PathLike

TRUSTED_VARIABLE: Final = "AGQ_TRUSTED_USERS"
"""Environment variable with users to trust: names or numbers, divided by commas."""

_logger = logging.getLogger(__name__)

_ROOT: Final = 0
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


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


def require_own(path: PathLike, state: os.stat_result) -> None:
    """Check that a file that decides what runs is a trusted user's; for `agq.reading.open_file`.

    Raises
    ------
    InputError
        If it belongs to a stranger, or others can write it.
    """
    if state.st_uid not in trusted_uids():
        raise InputError(
            f"{path} belongs to {_shown(state.st_uid)}, and decides what this worker runs; if you "
            f"trust them, list them in {TRUSTED_VARIABLE}"
        )
    require_closed(path, state)


def require_closed(path: PathLike, state: os.stat_result) -> None:
    """Check that nobody but its owner can write a file; see `require_own`."""
    if state.st_mode & _OTHERS_WRITE and _keeps_modes(Path(path).parent):
        raise InputError(
            f"{path} can be written by other users, and decides what runs under your name; if "
            f"nobody has changed it: chmod go-w {shlex.quote(str(path))}"
        )


def close_to_others(*paths: Path) -> None:
    """Take the right to write one's own files from everybody else."""
    for path in paths:
        with suppress(OSError):
            state = path.lstat()
            mine = stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid()
            if mine and state.st_mode & _OTHERS_WRITE:
                path.chmod(stat.S_IMODE(state.st_mode) & ~_OTHERS_WRITE)


@functools.cache
def warn_of_readers(file: Path, field: str) -> None:
    """Say once that others can read a file with a secret, named in a field of the configuration."""
    path = file.resolve()
    if path.is_relative_to("/run/secrets"):
        return  # of a container, where nobody else is
    for who, read, enter in (
        ("all users", stat.S_IROTH, stat.S_IXOTH),
        ("its group", stat.S_IRGRP, stat.S_IXGRP),
    ):
        if path.stat().st_mode & read and all(p.stat().st_mode & enter for p in path.parents):
            _logger.warning(
                "%s %s may be read by %s, and has a password in it: chmod 600 %s",
                field,
                file,
                who,
                shlex.quote(str(file)),
            )
            return


def _keeps_modes(folder: Path) -> bool:
    """Whether a file system knows rights at all: on some (FAT, shares of Windows) all have all."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            return not os.fstat(probe.fileno()).st_mode & _OTHERS_WRITE
    except OSError:
        return True


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
