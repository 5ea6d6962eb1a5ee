"""The batch scripts of a run: plain text that a user can read and submit by hand.

Paths may hold odd characters: they appear in shell words quoted by `shlex`, never in ``#SBATCH``
lines, and log files are named relative to the job's folder, which is an argument of sbatch. (SLURM
cannot write into a folder with % or a backslash in its name.)

The shell does not ``exec`` the program: ``--signal=B:`` reaches only the batch shell, which passes
signals on. It requeues the job if the program asks for it (exit status 75) or was killed, inside a
container or not.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from agq.pipeline.slurm.settings import CpuJobSettings, SlurmSettings

ScriptName = Literal["coordinator", "workers", "stitch"]

EXIT_REQUEUE = 75
"""Exit status with which a program in a job asks to be started again (EX_TEMPFAIL)."""

_MAX_KILLED = 5


@dataclass(frozen=True)
class Script:
    """One batch script.

    Attributes
    ----------
    name
        ``coordinator``, ``workers`` or ``stitch``.
    text
        What sbatch reads.
    """

    name: str
    text: str

    def path(self, run_dir: Path) -> Path:
        """Return its file in a run folder."""
        return script_path(run_dir, self.name)


def folder(run_dir: Path) -> Path:
    """Return the folder in a run folder for the scripts and the record of the jobs."""
    return run_dir / "slurm"


def script_path(run_dir: Path, name: str) -> Path:
    """Return the file of a script in a run folder."""
    return folder(run_dir) / f"{name}.sh"


def log_folder(run_dir: Path) -> Path:
    """Return the folder for the output of the jobs."""
    return run_dir / "logs" / "slurm"


def worker_script(section: "SlurmSettings", run_dir: Path, here: Path) -> Script:
    """Return the script of the worker jobs.

    The run folder is absolute; `here` is the folder that relative paths of the configuration start
    from.
    """
    processes = max(1, section.gpus)
    options = [
        *_common(section, "workers", run_dir),
        *_asked(partition=section.partition, qos=section.qos, constraint=section.constraint),
        *_asked(cpus_per_task=section.cpus * processes, mem=section.mem, time=section.time),
        "--output=workers-%A_%a.log",
    ]
    if section.gpus:
        options.append(f"--gres={section.gres or 'gpu'}:{section.gpus}")
    return Script("workers", _text(section, options, "worker", run_dir, here, gpu=section.gpus > 0))


def coordinator_script(section: "SlurmSettings", run_dir: Path, here: Path) -> Script:
    """Return the script of the job that hands out blocks; parameters as `worker_script`."""
    options = _cpu_job(section, section.coordinator, "coordinator", run_dir)
    return Script("coordinator", _text(section, options, "coordinator", run_dir, here))


def stitch_script(section: "SlurmSettings", run_dir: Path, here: Path) -> Script:
    """Return the script of the stitch job; parameters as `worker_script`."""
    options = _cpu_job(section, section.stitch, "stitch", run_dir)
    return Script("stitch", _text(section, options, "stitch", run_dir, here))


def trial_script(section: "SlurmSettings", run_dir: Path, here: Path, time: str | None) -> Script:
    """Return the script of a job that times one block within a time limit; see `worker_script`."""
    options = [
        *_named(section, "trial", run_dir),
        "--no-requeue",
        *_asked(partition=section.partition, qos=section.qos, constraint=section.constraint),
        *_asked(cpus_per_task=section.cpus, mem=section.mem, time=time),
        "--output=%j.log",
    ]
    if section.gpus:
        options.append(f"--gres={section.gres or 'gpu'}:1")
    # Not requeued, whatever ends it: somebody waits for it.
    once = section.model_copy(update={"requeue": False})
    text = _text(once, options, "trial.program", run_dir, here, gpu=section.gpus > 0)
    return Script("trial", text)


def trial_folder(run_dir: Path) -> Path:
    """Return the folder in a run folder for what a timed block needs and says."""
    return folder(run_dir) / "trial"


def _cpu_job(
    section: "SlurmSettings", job: "CpuJobSettings", name: str, run_dir: Path
) -> list[str]:
    return [
        *_common(section, name, run_dir),
        *_asked(
            partition=job.partition or section.partition,
            qos=job.qos or section.qos,
            constraint=job.constraint,
            cpus_per_task=job.cpus,
            mem=job.mem,
            time=job.time,
        ),
        f"--output={name}-%j.log",
    ]


def _named(section: "SlurmSettings", name: str, run_dir: Path) -> list[str]:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in run_dir.name)
    return [
        f"--job-name=agq-{name}-{plain[:40]}",
        *_asked(account=section.account),
        "--nodes=1",
        "--ntasks=1",
    ]


def _common(section: "SlurmSettings", name: str, run_dir: Path) -> list[str]:
    return [
        *_named(section, name, run_dir),
        # Otherwise a job that is requeued overwrites the log of its first run.
        "--open-mode=append",
        "--requeue" if section.requeue else "--no-requeue",
        f"--signal=B:USR1@{section.lead_s}",
    ]


def _asked(**options: str | int | None) -> list[str]:
    given = {name.replace("_", "-"): value for name, value in options.items() if value is not None}
    return [f"--{name}={value}" for name, value in given.items()]


def program(section: "SlurmSettings", role: str, run_dir: Path, *, gpu: bool = False) -> list[str]:
    """Return the command line that a job runs."""
    python = section.python or (sys.executable if section.container is None else "python")
    inner = [python, "-P", "-m", f"agq.pipeline.slurm.{role}", str(run_dir)]
    if section.container is None:
        return inner
    kind, _, image = section.container.partition("://")
    return [kind, "exec", *(["--nv"] if gpu else []), *section.container_options, image, *inner]


def _text(
    section: "SlurmSettings",
    options: Sequence[str],
    role: str,
    run_dir: Path,
    here: Path,
    *,
    gpu: bool = False,
) -> str:
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    lines += ["# Pass SLURM's signals on to the program, once it runs."]
    lines += [
        f'trap \'[ -n "$!" ] || exit 143; kill -{name} "$!"\' {name}'
        for name in ("TERM", "USR1", "USR2")
    ]
    lines += [f"cd -- {shlex.quote(str(here))} || exit 1", *section.prologue, ""]
    command = shlex.join(program(section, role, run_dir, gpu=gpu))
    lines += [
        f"{command} &",
        "child=$!",
        "# A signal ends `wait` early: wait again until the program itself has ended.",
        "while :; do",
        '  wait "$child"; status=$?',
        '  [ "$status" -gt 128 ] && kill -0 "$child" 2>/dev/null || break',
        "done",
        "# It may have ended just then: ask the shell again for its status.",
        'if [ "$status" -gt 128 ]; then',
        '  wait "$child"; again=$?; [ "$again" = 127 ] || status=$again',
        "fi",
    ]
    if section.requeue:
        killed = shlex.quote(str(folder(run_dir) / "killed"))
        lines += [
            "# 137: killed (kill -9, out of memory): run it again, a few times. Requeues of",
            "# other kinds do not count, unless the deaths cannot be written down.",
            'if [ "$status" = 137 ]; then',
            f'  deaths={killed}; {{ [ -d "$deaths" ] || mkdir "$deaths"; }} &&',
            '    echo "$(date) $SLURMD_NODENAME" >> "$deaths/$SLURM_JOB_ID" &&',
            '    count=$(wc -l < "$deaths/$SLURM_JOB_ID") ||',
            "    count=$((${SLURM_RESTART_COUNT:-0} + 1))",
            f'  if [ "$count" -le {_MAX_KILLED} ]; then',
            f"    status={EXIT_REQUEUE}",
            "  else",
            '    echo "killed $count times (kill -9, or out of memory): not started again" >&2',
            "  fi",
            "fi",
            f'if [ "$status" = {EXIT_REQUEUE} ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, 'exit "$status"', ""])


def submit_arguments(
    name: ScriptName,
    run_dir: Path,
    section: "SlurmSettings",
    *,
    array: str | None = None,
    after: str | None = None,
    exclude: Sequence[str] = (),
) -> list[str | Path]:
    """Return sbatch's arguments for a script, named as in `Script`, of a run folder.

    `array` are tasks, such as ``0-7%4``, `after` a dependency, such as ``afterany:17``, and
    `exclude` nodes that the job must not get, besides those that the settings exclude.
    """
    further = _excluding(section.extra_of(name), exclude)
    arguments: list[str | Path] = [f"--chdir={log_folder(run_dir)}", *further]
    if array is not None:
        arguments.append(f"--array={array}")
    if after is not None:
        arguments += [f"--dependency={after}", "--kill-on-invalid-dep=yes"]
    return [*arguments, script_path(run_dir, name)]


def _excluding(options: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """Return options of sbatch, which takes the last ``--exclude``, with nodes added to it."""
    said = [option for option in options if option.startswith("--exclud")]
    lists = [option.partition("=")[2] for option in said[-1:]]
    if not nodes or any("/" in text for text in lists):
        return list(options)  # a list in a file stays as it is
    return [*(o for o in options if o not in said), f"--exclude={','.join([*lists, *nodes])}"]
