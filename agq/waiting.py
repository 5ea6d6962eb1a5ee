"""What a command works on while it has nothing to show yet.

:func:`doing` says it. It becomes a line with the seconds that have passed, which goes away with the
next output; short waits show nothing. Only commands switch it on (:func:`switched_on`), and only on
a terminal: a script, a notebook or a log sees none of it.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

_SOON_S: Final = 0.7
_TICK_S: Final = 1.0


class Shower(Protocol):
    """Shows what a command is doing."""

    def set(self, text: str) -> None:
        """Show a text from now on; an empty one ends it."""


class _Line:
    """The line of one command, written by a thread of its own to a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._woken = threading.Condition(self._lock)
        self._text = ""
        self._since = 0.0
        self._visible = False
        self._over = False
        self._thread = threading.Thread(target=self._work, name="waiting", daemon=True)
        self._thread.start()

    def set(self, text: str) -> None:
        """Show a text from now on; an empty one ends it."""
        with self._lock:
            self._erase()
            self._text, self._since = text, time.monotonic()
            self._woken.notify()

    def stop(self) -> None:
        """Take the line away and end the thread."""
        with self._lock:
            self._erase()
            self._text, self._over = "", True
            self._woken.notify()
        self._thread.join()

    def _erase(self) -> None:
        if self._visible:
            self._write("\r\x1b[2K")
            self._visible = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # closed, or a reader that has gone: nobody waits
            self._over = True

    def _work(self) -> None:
        with self._lock:
            while not self._over:
                passed = time.monotonic() - self._since
                if not self._text:
                    self._woken.wait()
                elif passed < _SOON_S:
                    self._woken.wait(_SOON_S - passed)
                else:
                    self._write(f"\r\x1b[2K{self._text} ... {passed:.0f} s")
                    self._visible = True
                    self._woken.wait(_TICK_S)


_shown: list[Shower] = []


def doing(text: str) -> None:
    """Say what the command does from now on, until its next output; in a few words."""
    from agq.plain_text import printable  # which takes the line away before it prints

    text = printable(text, lines=False)
    for line in _shown:
        line.set(text)


def over() -> None:
    """Take the line away: something is printed now, or drawn by other means."""
    doing("")


@contextmanager
def shown_by(shower: Shower) -> Iterator[None]:
    """Let something else show it for a while: bars are drawn where the line would be."""
    over()
    before, _shown[:] = _shown[:], [shower]
    try:
        yield
    finally:
        _shown[:] = before


@contextmanager
def switched_on() -> Iterator[None]:
    """Show what :func:`doing` says on standard error, while a command runs."""
    if not sys.stderr.isatty():
        yield
        return
    _shown[:] = [line := _Line(sys.stderr)]
    try:
        yield
    finally:
        _shown.clear()
        line.stop()
