"""Processes for which permissions of files count, also where tests run as root."""

import ctypes
import os
import subprocess
import sys
from typing import Any

_PR_CAPBSET_DROP = 24
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_FOWNER = 1, 2, 3


def _drop_rights_of_root() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH, _CAP_FOWNER):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def run_as_user(
    *arguments: object, timeout: float = 120, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run this Python with arguments as an ordinary user would; return how it ended."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        preexec_fn=_drop_rights_of_root if os.geteuid() == 0 else None,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )
