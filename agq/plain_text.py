"""Text of others on a terminal: printed, and never obeyed.

Names of workers, hosts and GPUs, errors, paths and documents may come from somebody else, and a
terminal obeys what is in them: it moves the cursor, renames its window, turns text around. So
everything that a command prints goes through :func:`say`, a console of `agq.terminal` or the log
and hook of `agq.credentials`, which write such characters out as JSON does.
"""

import re
from typing import Final

from agq import waiting

# Controls without the line end, marks of direction, and what ends a line besides.
_OBEYED: Final = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
_TAB: Final = "    "


def printable(text: str, *, lines: bool = True) -> str:
    r"""Return a text with what a terminal would obey written out: ``\u001b``.

    Parameters
    ----------
    text
        Any text; tabs become spaces.
    lines
        Whether line ends stay; else they are written out too.
    """
    if not lines:
        text = text.replace("\n", r"\n")
    return _OBEYED.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    return _TAB if found[0] == "\t" else f"\\u{ord(found[0]):04x}"


def say(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text, with a line end, to standard output or standard error."""
    import typer  # workers log, and need none of it

    waiting.over()
    typer.echo(printable(str(text)), err=err, nl=nl)
