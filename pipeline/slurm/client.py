"""Call SLURM's commands with argument lists and return their answers as plain data."""

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agq.errors import InputError

_TIMEOUT_S = 60.0
_SEPARATOR = "\x1f"


class SlurmError(InputError):
    """A command of SLURM is missing or refuses; the message quotes it."""


@dataclass(frozen=True)
class QueueEntry:
    """One job, or one task of an array, in the queue; pending tasks of an array are one entry.

    Attributes
    ----------
    task
        Array task, such as ``3`` or ``[4-7%2]``; empty for a single job.
    state, reason
        As squeue says (PENDING, RUNNING, COMPLETING, ...; Resources, Priority, ...).
    """

    job: int
    task: str
    state: str
    reason: str

    @property
    def target(self) -> str:
        """The entry as an argument of scancel."""
        return f"{self.job}_{self.task}" if self.task else str(self.job)

    @property
    def targets(self) -> list[str]:
        """Each task of the entry as an argument of scancel."""
        if not self.task.startswith("["):
            return [self.target]
        tasks: list[int] = []
        for part in self.task.strip("[]").partition("%")[0].split(","):
            first, _, last = part.partition("-")
            tasks += range(int(first), int(last or first) + 1)
        return [f"{self.job}_{task}" for task in tasks]

    @property
    def count(self) -> int:
        """Number of tasks that the entry stands for."""
        return len(self.targets)


def call(
    arguments: Sequence[str | Path],
    *,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> str:
    """Run one SLURM command; return its standard output.

    Raises
    ------
    SlurmError
        If the command is missing, takes too long, or (with `check`) fails.
    """
    name = str(arguments[0])
    try:
        done = subprocess.run(
            [str(a) for a in arguments],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            env=os.environ | (environment or {}),
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{name} is not installed here: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{name} gave no answer for {_TIMEOUT_S:.0f} s; check with: scontrol ping"
        ) from None
    if check and done.returncode != 0:
        text = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SlurmError(f"{name}: {text}")
    return done.stdout


def queue(jobs: Iterable[int]) -> list[QueueEntry]:
    """Return the entries of some jobs that are still in the queue.

    Raises
    ------
    SlurmError
        If squeue cannot be asked.
    """
    wanted = set(jobs)
    if not wanted:
        return []
    # Asked by user, not by id: squeue fails altogether if one id is too old.
    columns = ["%F", "%K", "%T", "%r"]
    text = call(["squeue", "--noheader", "--me", f"--format={_SEPARATOR.join(columns)}"])
    entries = []
    for line in text.splitlines():
        fields = line.split(_SEPARATOR)
        if len(fields) != len(columns) or not fields[0].isdigit() or int(fields[0]) not in wanted:
            continue
        task = "" if fields[1] == "N/A" else fields[1]
        if "-" in task or "," in task or "%" in task:
            task = f"[{task.strip('[]')}]"
        entries.append(QueueEntry(int(fields[0]), task, *fields[2:]))
    return sorted(entries, key=lambda e: (e.job, e.state != "RUNNING", e.task))


def submit(arguments: Sequence[str | Path]) -> int:
    """Submit a script; return the job id.

    Raises
    ------
    SlurmError
        If sbatch refuses; the message quotes it.
    """
    # SLURM copies the environment; a URI with a password travels in a file instead.
    text = call(["sbatch", "--parsable", *arguments], environment={"AGQ_MONGO_URI": ""})
    return int(text.strip().split(";")[0])


def cancel(targets: Sequence[str], *options: str) -> None:
    """Run scancel, which ignores jobs that have ended."""
    if targets:
        call(["scancel", *options, *targets], check=False)


def node_address(node: str) -> str | None:
    """Return the address by which SLURM knows a node; None if scontrol does not answer."""
    try:
        text = call(["scontrol", "--oneliner", "show", "node", node])
    except SlurmError:
        return None
    return fields_of(text).get("NodeAddr")


def fields_of(text: str) -> dict[str, str]:
    """Split ``Key=value Key=value`` of scontrol."""
    return dict(part.split("=", 1) for part in text.split() if "=" in part)
