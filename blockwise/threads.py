"""Daemon threads: what their death means for the process.

No other module starts one (`tests/test_house.py`): so each says here which of two kinds it is.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

from agq.blockwise.storage.files import FATAL_ERRNOS

EXIT_DISK = 73
"""Exit status of a process that could not write what it is there for (EX_CANTCREAT)."""

_logger = logging.getLogger(__name__)


def start_vital(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread whose error ends the process, which would live on for nothing.

    The exit status is `EXIT_DISK` if a disk is full or cannot be written, else 1.
    """

    def run() -> None:
        try:
            target(*args)
        except BaseException as error:
            _logger.exception("thread %s has failed: ending", name)
            logging.shutdown()
            fatal = isinstance(error, OSError) and error.errno in FATAL_ERRNOS
            os._exit(EXIT_DISK if fatal else 1)

    return start_aside(name, run)


def start_aside(name: str, target: Callable[..., object], *args: Any) -> threading.Thread:
    """Start a daemon thread that a process does without, or whose end others notice and answer."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread
