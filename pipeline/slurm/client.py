"""Call SLURM's commands with argument lists and return their answers as plain data."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agq.errors import InputError

_TIMEOUT_S = 60.0
_SEPARATOR = "\x1f"

_OPTIONS = re.compile(r"(SBATCH|SCANCEL|SINFO|SQUEUE)_\w+|SLURM_TIME_FORMAT")
_OF_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_DEBUG_FLAGS")
# What scancel says of jobs that have ended, or are just about to begin or to end.
_ENDED = re.compile("Invalid job id|already completing or completed|can not be altered now")
_TASKS = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


class SlurmError(InputError):
    """A command of SLURM is missing or refuses; the message quotes it."""


class SlurmMissingError(SlurmError):
    """A machine without the commands of SLURM."""


@dataclass(frozen=True)
class QueueEntry:
    """One job, or some tasks of an array, in the queue; pending tasks of an array are one entry.

    Attributes
    ----------
    tasks
        Numbers of the array tasks, ascending; empty for a single job.
    state, reason
        As squeue says (PENDING, RUNNING, COMPLETING, ...; Resources, Priority, ...).
    node
        Where it runs or has run; empty while it waits.
    seconds
        How long it runs or has run.
    """

    job: int
    tasks: tuple[int, ...]
    state: str
    reason: str
    node: str = ""
    seconds: int = 0

    @property
    def target(self) -> str:
        """The entry as an argument of scancel."""
        return target(self.job, self.tasks)

    @property
    def count(self) -> int:
        """Number of jobs that the entry stands for."""
        return max(1, len(self.tasks))


def target(job: int, tasks: Iterable[int]) -> str:
    """Name tasks of an array, or a job without any, in one argument of scancel: ``7_[1-3,5]``."""
    ranges: list[list[int]] = []
    for task in sorted(tasks):
        if ranges and task == ranges[-1][1] + 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    words = [f"{a}" if a == b else f"{a}-{b}" for a, b in ranges]
    if len(words) == 1 and words[0].isdigit():
        return f"{job}_{words[0]}"
    return f"{job}_[{','.join(words)}]" if words else str(job)


def array_tasks(text: str) -> tuple[int, ...]:
    """Return the tasks of an array index as squeue prints it: ``3``, ``1-2,4%1``, ``0-12:4``.

    Raises
    ------
    SlurmError
        If the text is cut (``1-2,4...``) or of another form.
    """
    tasks: list[int] = []
    for part in text.partition("%")[0].strip("[]").split(","):
        found = _TASKS.fullmatch(part)
        if found is None:
            raise SlurmError(f"squeue: the array tasks {text[:80]!r} cannot be read")
        first, last, step = (None if group is None else int(group) for group in found.groups())
        assert first is not None
        tasks += range(first, (first if last is None else last) + 1, step or 1)
    return tuple(tasks)


def call(
    arguments: Sequence[str | Path], *, environment: Mapping[str, str | None] | None = None
) -> str:
    """Run one SLURM command; return its standard output.

    Options that the environment sets (`environment_options`) do not count; `environment` adds
    variables to it, or takes away those that are None.

    Raises
    ------
    SlurmError
        If the command is missing, takes too long, or fails.
    """
    done = _run(arguments, environment or {})
    if done.returncode != 0:
        raise _failure(arguments, done.stderr.split() or ["exit status", str(done.returncode)])
    return done.stdout


def _failure(arguments: Sequence[str | Path], words: Sequence[str]) -> SlurmError:
    return SlurmError(f"{arguments[0]}: {' '.join(words)}")


def _run(
    arguments: Sequence[str | Path], environment: Mapping[str, str | None]
) -> subprocess.CompletedProcess[str]:
    name = str(arguments[0])
    inherited = {key: None if _OPTIONS.fullmatch(key) else os.environ[key] for key in os.environ}
    try:
        return subprocess.run(
            [str(a) for a in arguments],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            env={k: v for k, v in {**inherited, **environment}.items() if v is not None},
            check=False,
        )
    except FileNotFoundError:
        raise SlurmMissingError(
            f"{name} is not installed here: run this on a login node of the cluster"
        ) from None
    except OSError as error:
        raise SlurmError(f"{name} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{name} gave no answer for {_TIMEOUT_S:.0f} s; check with: scontrol ping"
        ) from None


def environment_options() -> list[str]:
    """Return the variables of the environment that would change what SLURM's commands do."""
    return sorted(filter(_OPTIONS.fullmatch, os.environ))


def queue(
    jobs: Iterable[int], users: Iterable[int] = (), *, states: Iterable[str] = ()
) -> list[QueueEntry]:
    """Return the entries of some jobs that are still in the queue.

    Parameters
    ----------
    jobs
        Job ids.
    users
        User ids of those who submitted them; default: the present user's.
    states
        States that are asked for, those of jobs that have ended too, which SLURM remembers for some
        minutes (MinJobAge); default: those of jobs in the queue.

    Raises
    ------
    SlurmError
        If squeue cannot be asked, says something else than expected, or may not tell.
    """
    wanted = set(jobs)
    if not wanted:
        return []
    # By user, not by id: the controller then looks up the jobs of these users alone, and squeue
    # would fail altogether if the one id that it is asked for is too old.
    whose = sorted(set(users)) or [os.getuid()]
    columns = ["%F", "%K", "%T", "%r", "%N", "%M"]
    text = call(
        [
            "squeue",
            "--noheader",
            f"--user={','.join(map(str, whose))}",
            *([f"--states={','.join(states)}"] if states else []),
            f"--format={_SEPARATOR.join(columns)}",
        ],
        # Otherwise array tasks are cut after 64 characters.
        environment={"SLURM_BITSTR_LEN": "0"},
    )
    if not text and os.getuid() not in (0, *whose):
        _require_public_jobs()
    entries = []
    for line in text.splitlines():
        job, *rest = line.split(_SEPARATOR)
        if job.isdigit() and int(job) not in wanted:
            continue
        if not job.isdigit() or len(rest) != len(columns) - 1:
            raise SlurmError(f"squeue: the line {line[:80]!r} cannot be read")
        tasks = () if rest[0] in ("N/A", "") else array_tasks(rest[0])
        state, reason, node, time = rest[1:]
        entries.append(QueueEntry(int(job), tasks, state, reason, node, _seconds(time)))
    return sorted(entries, key=lambda e: (e.job, e.state != "RUNNING", e.tasks))


def _seconds(text: str) -> int:
    """Read a time span of squeue, ``1-02:03:04`` or ``3:04``; one of another form is 0."""
    found = _TIME.fullmatch(text)
    days, hours, minutes, seconds = map(int, found.groups("0")) if found else (0, 0, 0, 0)
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def _require_public_jobs() -> None:
    config = call(["scontrol", "show", "config"])
    found = re.search(r"^PrivateData\s*=\s*(.*)", config, re.MULTILINE)
    if found is not None and "jobs" in re.split(r"\W+", found[1]):
        raise SlurmError("squeue: this cluster shows jobs to the user who submitted them alone")


def submit(arguments: Sequence[str | Path]) -> int:
    """Submit a script; return the job id.

    Raises
    ------
    SlurmError
        If sbatch refuses; the message quotes it.
    """
    # SLURM copies the environment; a URI with a password travels in a file instead. And what this
    # process is told of the job that it may run in would be taken for the new job's.
    of_job = [n for n in os.environ if n.startswith("SLURM_") and n not in _OF_CLUSTER]
    environment = {**dict.fromkeys(of_job), "AGQ_MONGO_URI": ""}
    text = call(["sbatch", "--parsable", *arguments], environment=environment)
    return int(text.strip().split(";")[0])


def cancel(targets: Sequence[str], *options: str) -> None:
    """Run scancel, once for all targets; jobs that have ended are ignored.

    Raises
    ------
    SlurmError
        If SLURM does not answer or refuses.
    """
    if not targets:
        return
    arguments = ["scancel", *options, *targets]
    done = _run(arguments, {})
    said = [line for line in done.stderr.splitlines() if line and not _ENDED.search(line)]
    if done.returncode != 0 and said:
        raise _failure(arguments, said[0].removeprefix("scancel: error: ").split())


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
