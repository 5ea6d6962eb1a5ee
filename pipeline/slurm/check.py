"""Compare the `slurm` settings with the cluster before anything is submitted."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from agq.errors import InputError
from agq.pipeline.slurm.client import call, fields_of
from agq.pipeline.slurm.settings import SlurmSettings

_UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


class Node(NamedTuple):
    """One kind of node."""

    cpus: int
    memory: int
    """In MiB."""
    gpus: dict[str, int]
    """Number of GPUs by type."""
    features: frozenset[str]


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes
    ----------
    max_minutes
        Longest time limit; None for no limit.
    grace_s
        Seconds between SIGTERM and SIGKILL when a job is pre-empted.
    """

    name: str
    default: bool
    up: bool
    max_minutes: float | None
    grace_s: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Cluster:
    """The parts of a cluster that the checks read."""

    partitions: dict[str, Partition]
    max_array: int
    kill_wait_s: int


def read_cluster() -> Cluster:
    """Ask sinfo and scontrol.

    Raises
    ------
    SlurmError
        If SLURM is missing or does not answer.
    """
    nodes: dict[str, list[Node]] = {}
    for line in call(["sinfo", "--noheader", "--format=%R|%c|%m|%G|%f"]).splitlines():
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
            max_minutes=_minutes(fields.get("MaxTime", "UNLIMITED")),
            grace_s=int(fields.get("GraceTime", "0")),
            nodes=tuple(nodes.get(name, ())),
        )
    config = call(["scontrol", "show", "config"])
    return Cluster(
        partitions, _number(config, "MaxArraySize", 1001), _number(config, "KillWait", 30)
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


def _minutes(text: str) -> float | None:
    """Minutes of a SLURM time; None for no limit."""
    if text in ("UNLIMITED", "INFINITE", "infinite"):
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
    where = "slurm."
    worker = _partition(where, section.partition, cluster)
    cpus = section.cpus * max(1, section.gpus)
    _time(where, section.time, worker)
    _gpus_fit(section, worker)
    _fits(where, worker, cpus, section.mem, section.constraint)
    warnings = []
    for name, job in (("coordinator", section.coordinator), ("stitch", section.stitch)):
        where = f"slurm.{name}."
        partition = _partition(where, job.partition or section.partition, cluster)
        _time(where, job.time, partition)
        _fits(where, partition, job.cpus, job.mem, job.constraint)
        if name == "coordinator" and partition.grace_s and not section.requeue:
            warnings.append(
                f"partition {partition.name} is pre-emptible and slurm.requeue is off: a "
                "coordinator that is pre-empted does not come back"
            )
    limit = _minutes(section.time) if section.time else worker.max_minutes
    if limit is not None and limit * 60 <= 2 * section.lead_s:
        warnings.append(
            f"slurm.lead_s {section.lead_s} takes most of the time limit of {limit:g} minutes"
        )
    return warnings


def grace_s(section: SlurmSettings, cluster: Cluster) -> int:
    """Return the seconds between SIGTERM and SIGKILL on a cluster, with a margin."""
    if section.grace_s is not None:
        return section.grace_s
    partition = _partition("slurm.", section.partition, cluster)
    shortest = min([cluster.kill_wait_s, *([partition.grace_s] if partition.grace_s else [])])
    return max(1, shortest - max(1, shortest // 5))


def _partition(where: str, names: str | None, cluster: Cluster) -> Partition:
    if names is None:
        defaults = [p for p in cluster.partitions.values() if p.default]
        if not defaults:
            raise InputError(
                f"{where}partition is missing, and the cluster has no default; name one of "
                f"{', '.join(sorted(cluster.partitions))}"
            )
        return defaults[0]
    for name in names.split(","):
        if name not in cluster.partitions:
            raise InputError(
                f"{where}partition: the cluster has no {name!r}; name one of "
                f"{', '.join(sorted(cluster.partitions))}"
            )
    first = cluster.partitions[names.split(",")[0]]
    if not first.up:
        raise InputError(f"{where}partition: {first.name} takes no jobs now (sinfo); name another")
    return first


def _time(where: str, asked: str | None, partition: Partition) -> None:
    if asked is None or partition.max_minutes is None:
        return
    if (minutes := _minutes(asked)) is not None and minutes > partition.max_minutes:
        raise InputError(
            f"{where}time: {asked} is over the limit of partition {partition.name}, "
            f"{partition.max_minutes:g} minutes; ask for less, a requeued job goes on"
        )


def _fits(where: str, partition: Partition, cpus: int, mem: str, constraint: str | None) -> None:
    if not partition.nodes:
        return
    most = max(node.cpus for node in partition.nodes)
    if cpus > most:
        raise InputError(
            f"{where}cpus: a job would need {cpus} cores, nodes of {partition.name} have at most "
            f"{most}"
        )
    memory = max(node.memory for node in partition.nodes)
    wanted = float(mem.rstrip("KMGT")) * _UNITS[mem[-1] if mem[-1] in _UNITS else "M"]
    if wanted > memory:
        raise InputError(
            f"{where}mem: {mem} is more than a node of {partition.name} has, {memory}M"
        )
    features = frozenset().union(*(node.features for node in partition.nodes))
    if constraint and re.fullmatch(r"[\w.-]+", constraint) and constraint not in features:
        listed = ", ".join(sorted(features)) or "none"
        raise InputError(
            f"{where}constraint: no node of {partition.name} has the feature {constraint!r}; its "
            f"features: {listed}"
        )


def _gpus_fit(section: SlurmSettings, partition: Partition) -> None:
    if not section.gpus or not partition.nodes:
        return
    kind = (section.gres or "gpu").partition(":")[2]
    have = [n.gpus.get(kind, 0) if kind else sum(n.gpus.values()) for n in partition.nodes]
    if max(have) < section.gpus:
        counts = {count for node in partition.nodes for count in node.gpus.items()}
        kinds = sorted(f"gpu:{k}:{n}".replace("::", ":") for k, n in counts)
        raise InputError(
            f"slurm.gpus: {section.gpus} of {section.gres or 'gpu'} is more than a node of "
            f"partition {partition.name} has ({', '.join(kinds) or 'no GPUs'}); "
            "0 asks for CPU workers"
        )
