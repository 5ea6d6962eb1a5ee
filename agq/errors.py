"""Errors that the user is told in one line, without a traceback."""

import errno
from typing import Final

LONGEST_MESSAGE: Final = 3000
"""Characters of a message that people are shown; a file may hold a name or a list of any length."""


class InputError(Exception):
    """Input or configuration that cannot work; the message names the field or file and the fix."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST_MESSAGE:
            return text
        half = LONGEST_MESSAGE // 2
        return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


class DamagedError(InputError):
    """A file that a run has made is missing, or does not hold what was written."""


def repairable(error: object, folder: object) -> InputError:
    """Return an error about what lies in a run folder, with the way on."""
    return InputError(
        f"{error}; `agq verify {folder} --repair` takes back what is damaged, and the next run "
        "makes it again"
    )


class RunStoppedError(Exception):
    """A run that could not go on (full disk, workers that keep dying); running again resumes it."""


class RunGoneError(RunStoppedError):
    """A run folder that is not where it was: nothing may be written there, or it would be new."""

    @classmethod
    def at(cls, folder: object) -> "RunGoneError":
        """Return the error of a folder."""
        return cls(
            f"{folder} is gone: it was moved, renamed or deleted while a command worked on it; "
            "what is done goes on from its new place"
        )


_AGAIN: Final = "run the command again, it goes on"
_ADVICE: Final = {
    errno.ENOSPC: f"free some space and {_AGAIN}",
    errno.EDQUOT: f"free some space, or ask for a larger quota, and {_AGAIN}",
    errno.EROFS: "choose another folder, or have its disk mounted for writing",
    errno.EACCES: "ask its owner or the administrator for access, or choose another path",
    errno.EPERM: "ask its owner or the administrator for access, or choose another path",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use another file system, and "
    + _AGAIN,
    errno.EMFILE: f"raise the limit of open files (ulimit -n), and {_AGAIN}",
    errno.ENFILE: f"the whole machine has too many open files: close programs, and {_AGAIN}",
    errno.EIO: f"the disk or its server fails: have it looked at, and {_AGAIN}",
    errno.ESTALE: f"its file server has replaced it: when the folder can be listed, {_AGAIN}",
    errno.ENOLCK: f"its file server has no locks left: have it looked at, and {_AGAIN}",
    errno.ETIMEDOUT: f"its file server does not answer: when it does, {_AGAIN}",
    errno.EHOSTDOWN: f"its file server does not answer: when it does, {_AGAIN}",
    errno.EREMOTEIO: f"the disk or its server fails: have it looked at, and {_AGAIN}",
    errno.ENOTCONN: f"its file server is not connected: mount it again, and {_AGAIN}",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def machine_fault(error: OSError) -> str | None:
    """Say in one line what the system refused, of which file, and what to do.

    Returns
    -------
    str or None
        None if the error names no file and is none that a full or failing disk causes: that would
        be an error of the program.
    """
    advice = _ADVICE.get(error.errno or 0)
    if error.filename is None and advice is None:
        return None
    files = [name for name in (error.filename, error.filename2) if name is not None]
    where = " -> ".join(map(_shown, files))
    reason = error.strerror or str(error)
    return f"{where}{': ' if where else ''}{reason}{': ' if advice else ''}{advice or ''}"


def _shown(name: object) -> str:
    return name.decode(errors="surrogateescape") if isinstance(name, bytes) else str(name)
