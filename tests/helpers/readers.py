"""Programs of other projects that read what we write, in an environment of their own.

`make .venv-readers/.installed` makes it. A script of a test runs there as a process; it gets its
arguments as JSON and prints what it found as JSON.
"""

import json
import os
import subprocess
from typing import Any

import pytest

from tests.helpers import ROOT

PYTHON = ROOT / ".venv-readers" / "bin" / "python"
MISSING = "no independent readers: run `make .venv-readers/.installed`"


def read_with(script: str, arguments: dict[str, Any], seconds: float = 120) -> Any:
    """Run a script that reads `arguments` (a dict) and sets `result`; return that result."""
    if not _installed():
        pytest.skip(MISSING)
    program = (
        "import json, sys\n"
        "arguments = json.load(sys.stdin)\n"
        f"{script}\n"
        'print("RESULT", json.dumps(result))\n'
    )
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", program],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=seconds,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")},
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT "), done.stdout
    return json.loads(last.removeprefix("RESULT "))


def _installed() -> bool:
    return any((ROOT / ".venv-readers" / "lib").glob("python*/site-packages/cloudvolume"))
