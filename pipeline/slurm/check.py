"""Compare the `slurm` settings with the cluster before anything is submitted."""

import getpass
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agq.errors import InputError
from agq.pipeline.slurm.client import SlurmError, call, fields_of
from agq.pipeline.slurm.settings import CpuJobSettings, SlurmSettings
from agq.pipeline.status.text import duration

_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


class Node(NamedTuple):
    """One kind of node."""

    cpus: int
    memory: int
    """In MiB."""
    gpus: dict[str, int]
    """Number of GPUs by type."""
    features: frozenset[str]

    def __str__(self) -> str:
        gpus = [f"gpu:{kind}:{n}".replace("::", ":") for kind, n in sorted(self.gpus.items())]
        return " ".join([f"{self.cpus} cores", f"{self.memory}M", *gpus, *sorted(self.features)])


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes
    ----------
    max_minutes
        Longest time limit; None for no limit.
    default_minutes
        Time limit of a job that asks for none; None: `max_minutes`.
    grace_s
        Seconds between SIGTERM and SIGKILL when a job is pre-empted.
    accounts
        Accounts that may use it; None: all.
    """

    name: str
    default: bool
    up: bool
    max_minutes: float | None
    grace_s: int
    nodes: tuple[Node, ...]
    accounts: frozenset[str] | None = None
    default_minutes: float | None = None

    def limit_minutes(self, asked: str | None) -> float | None:
        """Return the time limit of a job that asks for one, or for none; None for no limit."""
        if asked is not None:
            return limit_minutes(asked)
        return self.max_minutes if self.default_minutes is None else self.default_minutes


class Association(NamedTuple):
    """What the accounting lets the user be; an empty partition means all of them."""

    account: str
    partition: str
    qos: frozenset[str]


@dataclass(frozen=True)
class Cluster:
    """The parts of a cluster that the checks read.

    Attributes
    ----------
    enforced
        What a job must name rightly, such as ``associations`` and ``qos``.
    associations
        Those of this user; None if the accounting does not answer.
    """

    partitions: dict[str, Partition]
    max_array: int
    kill_wait_s: int
    enforced: frozenset[str] = frozenset()
    associations: tuple[Association, ...] | None = None


def read_cluster() -> Cluster:
    """Ask sinfo and scontrol.

    Raises
    ------
    SlurmError
        If SLURM is missing or does not answer.
    """
    nodes: dict[str, list[Node]] = {}
    # Exact: otherwise nodes of several kinds are one line with the smallest numbers.
    asked = ["sinfo", "--noheader", "--exact", "--format=%R|%c|%m|%G|%f"]
    for line in call(asked).splitlines():
        name, cpus, memory, gres, features = (part.strip() for part in line.split("|"))
        words = frozenset(re.findall(r"[^,()&|]+", features.replace("(null)", "")))
        kind = Node(int(cpus.rstrip("+")), int(memory.rstrip("+")), _gpus(gres), words)
        nodes.setdefault(name, []).append(kind)
    partitions = {}
    for line in call(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        fields = fields_of(line)
        name = fields.get("PartitionName", "")
        if not name:
            continue
        partitions[name] = Partition(
            name=name,
            default=fields.get("Default") == "YES",
            up=fields.get("State") == "UP",
            max_minutes=limit_minutes(fields.get("MaxTime", "UNLIMITED")),
            grace_s=int(fields.get("GraceTime", "0")),
            nodes=tuple(nodes.get(name, ())),
            accounts=_named(fields.get("AllowAccounts", "ALL")),
            default_minutes=limit_minutes(fields.get("DefaultTime", "NONE")),
        )
    config = call(["scontrol", "show", "config"])
    enforced = re.search(r"^AccountingStorageEnforce\s*=\s*(\S+)", config, re.MULTILINE)
    rules = frozenset(enforced[1].lower().split(",") if enforced else ()) - {"none"}
    return Cluster(
        partitions,
        _number(config, "MaxArraySize", 1001),
        _number(config, "KillWait", 30),
        rules,
        _associations() if rules else None,
    )


def _named(text: str) -> frozenset[str] | None:
    return None if text in ("ALL", "(null)", "") else frozenset(text.split(","))


def _associations() -> tuple[Association, ...] | None:
    """Ask the accounting what the user may be; None if it does not answer."""
    asked = ["sacctmgr", "--noheader", "--parsable2", "--readonly", "show", "associations"]
    try:
        text = call([*asked, f"user={getpass.getuser()}", "format=account,partition,qos"])
    except (SlurmError, KeyError, OSError):
        return None
    rows = [line.split("|") for line in text.splitlines()]
    return tuple(
        Association(row[0], row[1], frozenset(filter(None, row[2].split(","))))
        for row in rows
        if len(row) == 3
    )


def _number(config: str, name: str, default: int) -> int:
    match = re.search(rf"^{name}\s*=\s*(\d+)", config, re.MULTILINE)
    return int(match[1]) if match else default


def _gpus(gres: str) -> dict[str, int]:
    """GPUs by type from ``gpu:a100:4(S:0-1),gpu:2``."""
    gpus: dict[str, int] = {}
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        words = part.split(":")
        if words[0] == "gpu" and words[-1].isdigit():
            kind = words[1] if len(words) > 2 else ""
            gpus[kind] = gpus.get(kind, 0) + int(words[-1])
    return gpus


def limit_minutes(text: str) -> float | None:
    """Return the minutes of a SLURM time; None for no limit."""
    if text in ("UNLIMITED", "INFINITE", "infinite", "NONE"):
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def check(section: SlurmSettings, cluster: Cluster) -> list[str]:
    """Compare the settings with the cluster.

    Returns
    -------
    warnings
        About settings that work, but perhaps not as meant.

    Raises
    ------
    InputError
        Naming the field, its value and what the cluster allows.
    """
    if section.workers - 1 >= cluster.max_array:
        raise InputError(
            f"slurm.workers: {section.workers} is over this cluster's limit (MaxArraySize "
            f"{cluster.max_array}); ask for fewer with more GPUs each (slurm.gpus)"
        )
    _jobs_fit(section, cluster)
    worker = _partitions("slurm.", section.partition, cluster)[0]
    warnings = []
    named = section.coordinator.partition or section.partition
    for partition in _partitions("slurm.coordinator.", named, cluster):
        if partition.grace_s and not section.requeue:
            warnings.append(
                f"partition {partition.name} is pre-emptible and slurm.requeue is off: a "
                "coordinator that is pre-empted does not come back"
            )
    if section.container is not None and not section.prologue:
        program = section.container.partition("://")[0]
        if shutil.which(program) is None:
            warnings.append(
                f"slurm.container: {program} is not on the PATH of this machine, which the jobs "
                "take over; if the nodes do not have it there either, name in slurm.prologue what "
                f"brings it, such as `module load {program}`"
            )
    limit = worker.limit_minutes(section.time)
    if limit is not None and limit * 60 <= 2 * section.lead_s:
        warnings.append(
            f"slurm.lead_s {section.lead_s} takes most of the time limit of {limit:g} minutes"
            + _by_default(section.time, worker)
        )
    return warnings


def short_limits(
    section: SlurmSettings, cluster: Cluster, expected: Mapping[str, float]
) -> list[str]:
    """Say which jobs get less time, because they ask for none, than a forecast expects of them.

    Parameters
    ----------
    expected
        Seconds of wall time of ``predict`` and of what the stitch's job does, as in `Forecast`.
    """
    predict_s = expected.get("predict", 0.0)
    stitch_s = sum(expected.values()) - predict_s
    notes = []
    for where, job, seconds in (
        ("slurm.", section, predict_s),
        ("slurm.coordinator.", section.coordinator, predict_s),
        ("slurm.stitch.", section.stitch, stitch_s),
    ):
        partition = _partitions(where, job.partition or section.partition, cluster)[0]
        limit = partition.limit_minutes(job.time)
        if job.time is None and limit is not None and limit * 60 < seconds:
            then = "goes on after a requeue" if section.requeue else "is not requeued"
            notes.append(
                f"{where}time is not set: the job gets {limit:g} minutes"
                f"{_by_default(None, partition)}, the forecast is {duration(seconds)}; it {then}"
            )
    return notes


def _by_default(asked: str | None, partition: Partition) -> str:
    """Say where a limit is from that nobody asked for."""
    if asked is not None or partition.default_minutes is None:
        return ""
    return f" (DefaultTime of partition {partition.name})"


def grace_s(section: SlurmSettings, cluster: Cluster) -> int:
    """Return the seconds between SIGTERM and SIGKILL on a cluster, with a margin."""
    if section.grace_s is not None:
        return section.grace_s
    partitions = _partitions("slurm.", section.partition, cluster)
    shortest = min([cluster.kill_wait_s, *(p.grace_s for p in partitions if p.grace_s)])
    return max(1, shortest - max(1, shortest // 5))


@dataclass(frozen=True)
class _Job:
    """What one job asks of a node."""

    cpus: int
    mem: str
    constraint: str | None
    gpus: int = 0
    gres: str = "gpu"

    @property
    def feature(self) -> str | None:
        """The constraint if it is one feature; others, such as ``a|b``, are left to SLURM."""
        plain = self.constraint and re.fullmatch(r"[\w.-]+", self.constraint)
        return self.constraint if plain else None

    def gpus_of(self, node: Node) -> int:
        kind = self.gres.partition(":")[2]
        return node.gpus.get(kind, 0) if kind else sum(node.gpus.values())

    def fits(self, node: Node) -> bool:
        return (
            self.cpus <= node.cpus
            and _mebibytes(self.mem) <= node.memory
            and self.gpus <= self.gpus_of(node)
            and (self.feature is None or self.feature in node.features)
        )


def _jobs_fit(section: SlurmSettings, cluster: Cluster) -> None:
    """Refuse a job that no partition of those named takes; SLURM starts it in any that does."""
    cpus, gres = section.cpus * max(1, section.gpus), section.gres or "gpu"
    asked: list[tuple[str, SlurmSettings | CpuJobSettings, _Job]] = [
        ("slurm.", section, _Job(cpus, section.mem, section.constraint, section.gpus, gres))
    ]
    for name, cpu in (("coordinator", section.coordinator), ("stitch", section.stitch)):
        asked.append((f"slurm.{name}.", cpu, _Job(cpu.cpus, cpu.mem, cpu.constraint)))
    for where, settings, job in asked:
        errors = []
        for partition in _partitions(where, settings.partition or section.partition, cluster):
            try:
                _time(where, settings.time, partition, section.lead_s)
                _gpus_fit(job, partition)
                _fits(where, partition, job)
                qos = settings.qos or section.qos
                _may_use(where, section.account, qos, partition, cluster)
            except InputError as error:
                errors.append(error)
            else:
                break
        else:
            raise errors[0]


def _partitions(where: str, names: str | None, cluster: Cluster) -> Sequence[Partition]:
    """Return the partitions of a list that take jobs, or the default one."""
    if names is None:
        defaults = [p for p in cluster.partitions.values() if p.default]
        if not defaults:
            raise InputError(
                f"{where}partition is missing, and the cluster has no default; name one of "
                f"{', '.join(sorted(cluster.partitions))}"
            )
        names = defaults[0].name
    for name in names.split(","):
        if name not in cluster.partitions:
            raise InputError(
                f"{where}partition: the cluster has no {name!r}; name one of "
                f"{', '.join(sorted(cluster.partitions))}"
            )
    found = [cluster.partitions[name] for name in names.split(",")]
    if up := [partition for partition in found if partition.up]:
        return up
    raise InputError(f"{where}partition: {names} takes no jobs now (sinfo); name another")


def _may_use(
    where: str, account: str | None, qos: str | None, partition: Partition, cluster: Cluster
) -> None:
    """Refuse an account or a quality of service that the accounting would refuse."""
    if account and partition.accounts is not None and account not in partition.accounts:
        raise InputError(
            f"slurm.account: partition {partition.name} is not for {account}; it is for "
            f"{', '.join(sorted(partition.accounts))}"
        )
    if cluster.associations is None or "associations" not in cluster.enforced:
        return
    mine = [a for a in cluster.associations if a.partition in ("", partition.name)]
    accounts = sorted({a.account for a in mine})
    if not mine or (account and account not in accounts):
        have = f"you have {', '.join(accounts)}" if accounts else "you have none"
        raise InputError(
            f"slurm.account: {account or 'a job'} needs an account of yours in the accounting of "
            f"the cluster for partition {partition.name}; {have} (sacctmgr show associations)"
        )
    allowed = {q for a in mine if account in (None, a.account) for q in a.qos}
    if qos and "qos" in cluster.enforced and qos not in allowed:
        raise InputError(
            f"{where}qos: {qos} is none of yours; you have {', '.join(sorted(allowed)) or 'none'}"
        )


def _time(where: str, asked: str | None, partition: Partition, lead_s: int) -> None:
    limit = partition.limit_minutes(asked)
    if limit and limit * 60 <= lead_s:
        raise InputError(
            f"slurm.lead_s: {lead_s} seconds are all of the time limit of {limit:g} minutes"
            f"{_by_default(asked, partition)}, so a job would be told to leave at its start; lower "
            f"it, or raise {where}time"
        )
    if asked is None or partition.max_minutes is None:
        return
    if (minutes := limit_minutes(asked)) is not None and minutes > partition.max_minutes:
        raise InputError(
            f"{where}time: {asked} is over the limit of partition {partition.name}, "
            f"{partition.max_minutes:g} minutes; ask for less, a requeued job goes on"
        )


def _mebibytes(mem: str) -> float:
    return float(mem.rstrip("KMGT")) * _UNITS[mem[-1] if mem[-1] in _UNITS else "M"]


def _fits(where: str, partition: Partition, job: "_Job") -> None:
    if not partition.nodes:
        return
    most = max(node.cpus for node in partition.nodes)
    if job.cpus > most:
        raise InputError(
            f"{where}cpus: a job would need {job.cpus} cores, nodes of {partition.name} have at "
            f"most {most}"
        )
    memory = max(node.memory for node in partition.nodes)
    if _mebibytes(job.mem) > memory:
        raise InputError(
            f"{where}mem: {job.mem} is more than a node of {partition.name} has, {memory}M"
        )
    features = frozenset().union(*(node.features for node in partition.nodes))
    if job.feature and job.feature not in features:
        listed = ", ".join(sorted(features)) or "none"
        raise InputError(
            f"{where}constraint: no node of {partition.name} has the feature {job.feature!r}; its "
            f"features: {listed}"
        )
    # Each of these is somewhere; a job needs them on one node.
    if not any(job.fits(node) for node in partition.nodes):
        gpus = f", {job.gpus} of {job.gres}" if job.gpus else ""
        feature = f" and the feature {job.feature}" if job.feature else ""
        kinds = "; ".join(sorted({str(node) for node in partition.nodes}))
        raise InputError(
            f"{where.removesuffix('.')}: no node of {partition.name} has {job.cpus} cores, "
            f"{job.mem}{gpus}{feature} together; its kinds of nodes: {kinds}"
        )


def _gpus_fit(job: "_Job", partition: Partition) -> None:
    if not job.gpus or not partition.nodes:
        return
    if max(map(job.gpus_of, partition.nodes)) < job.gpus:
        counts = {count for node in partition.nodes for count in node.gpus.items()}
        kinds = sorted(f"gpu:{k}:{n}".replace("::", ":") for k, n in counts)
        raise InputError(
            f"slurm.gpus: {job.gpus} of {job.gres} is more than a node of partition "
            f"{partition.name} has ({', '.join(kinds) or 'no GPUs'}); 0 asks for CPU workers"
        )
