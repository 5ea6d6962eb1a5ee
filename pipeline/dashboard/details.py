"""Details on the page of a run: speed over time, rates of workers, grouped failures, logs."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import yaml

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.records import BlockState
from agq.blockwise.storage.logs import log_end, log_files
from agq.credentials import hidden
from agq.pipeline.status.failures import error_kind
from agq.pipeline.status.run_status import Failure, StageStatus

_BINS: Final = 120
_SHORTEST: Final = 1e-3
_RECENT: Final = 200
_MANY: Final = 20_000
_MAX_GROUPS: Final = 50
_MAX_EXAMPLES: Final = 20
_LOG_BYTES: Final = 8 << 10
_MAX_LARGEST: Final = 10


def history(
    rows: npt.NDArray[Any], started: float | None, until: float, begun: Sequence[float] = ()
) -> dict[str, Any]:
    """Return blocks and voxels per second, over time.

    A block counts while it is worked on, by the part of its time in each bin: counted at its end,
    blocks that take longer than a bin would make a row of spikes. Those under way, begun at the
    times `begun`, count as if they took the median time of the last ones.

    Blocks done before `started`, the last start of the stage, are left out (None: the first block);
    the last bin ends at `until`. The mapping has ``start``, ``seconds`` of one bin, and the lists
    ``blocks_per_s`` and ``voxels_per_s``.
    """
    done = rows[rows["rank"] == BlockState.DONE]
    finished = done["finished"]
    if started is None or not (finished >= started).any():
        started = float(finished.min()) if finished.size else until
    inside = finished >= started
    voxels = done["voxels"][inside].astype(float)
    # A block that ends between two polls may be later than "now".
    ends = np.minimum(finished[inside], until)
    starts = done["started"][inside]
    starts = np.where(starts > 0, np.clip(starts, started, ends), ends)
    length = max((until - started) / _BINS, 1.0)
    count = max(1, int(np.ceil((until - started) / length)))
    places = ((starts - started) / length, (ends - started) / length)
    rates = np.array([_spread(*places, amounts, count) for amounts in (np.ones(ends.size), voxels)])
    if ends.size and len(begun):
        usual = max(float(np.median((ends - starts)[-_RECENT:])), _SHORTEST)
        since = np.clip(np.asarray(begun), started, until)
        parts = (until - since) / np.maximum(usual, until - since)
        places = ((since - started) / length, np.full(since.size, (until - started) / length))
        rates += np.outer((1, float(np.median(voxels[-_RECENT:]))), _spread(*places, parts, count))
    return {
        "start": started,
        "seconds": length,
        "blocks_per_s": [round(float(v), 4) for v in rates[0] / length],
        "voxels_per_s": [round(float(v), 1) for v in rates[1] / length],
    }


def _spread(
    starts: npt.NDArray[np.float64],
    ends: npt.NDArray[np.float64],
    amounts: npt.NDArray[np.float64],
    count: int,
) -> npt.NDArray[np.float64]:
    """Spread amounts evenly from their starts to their ends, in bins; return the sum in each.

    Of very many, each counts where it ends: that is smooth already, and much quicker.
    """
    if ends.size > _MANY:
        place = np.minimum(ends.astype(np.int64), count - 1)
        return np.bincount(place, amounts, count).astype(np.float64)
    starts = np.minimum(starts, ends - _SHORTEST)
    rates = amounts / (ends - starts)
    level, inside = np.zeros((2, count + 1))
    for edges, sign in ((starts, 1), (ends, -1)):
        # In its bin a step counts for what is left of the bin, in later ones whole.
        place = np.clip(edges.astype(np.int64), 0, count - 1)
        inside[:-1] += sign * np.bincount(place, rates * (place + 1 - edges), count)
        level[1:] += sign * np.bincount(place, rates, count)
    return np.clip((inside + np.cumsum(level))[:-1], 0, None)


def worker_rows(
    stage: StageStatus, begun: dict[str, float], usual_s: float, now: float
) -> list[dict[str, Any]]:
    """Return the workers of a stage with their rates, and the reason why one lags behind.

    `begun` has the start time of the oldest block that each worker holds, by its name; `usual_s` is
    the median time of a block, 0 if unknown.
    """
    rows = []
    for worker in stage.workers:
        held = max(0.0, now - begun[worker.name]) if worker.name in begun else None
        lags = None
        if worker.state == "silent":
            lags = "silent"
        elif worker.state == "running" and held and usual_s and held > max(30.0, 5 * usual_s):
            lags = f"a block takes {held / usual_s:.0f} times the usual"
        elif worker.slow:
            lags = "less than half the usual rate"
        more = {"rate": worker.blocks_per_s, "held_s": held, "lags": lags}
        rows.append(worker.model_dump(mode="json") | more)
    return rows


def group_failures(
    failures: Iterable[Failure], grid: BlockGrid | None
) -> tuple[int, list[dict[str, Any]]]:
    """Group failed blocks by their error, ignoring numbers in it.

    Return the number of failed blocks, and the groups, the largest first: ``summary``, ``count``,
    ``error`` (traceback of the first) and ``blocks`` (some of them, with the voxel in their middle
    if a grid is given).
    """
    counts: Counter[str] = Counter()
    groups: dict[str, dict[str, Any]] = {}
    for failure in failures:
        key = error_kind(failure.summary)
        counts[key] += 1
        group = groups.setdefault(
            key, {"summary": failure.summary, "error": failure.error, "blocks": []}
        )
        if len(group["blocks"]) < _MAX_EXAMPLES:
            group["blocks"].append(
                {
                    "block": failure.block,
                    "attempt": failure.attempt,
                    "worker": failure.worker,
                    "offset": failure.offset,
                    "shape": failure.shape,
                    "at": None if grid is None else middle_voxel(grid, failure.block),
                }
            )
    largest = [groups[key] | {"count": n} for key, n in counts.most_common(_MAX_GROUPS)]
    return counts.total(), largest


def middle_voxel(grid: BlockGrid, block: int) -> list[int] | None:
    """Return the voxel (z, y, x) in the middle of a block; None if the grid has no such block."""
    if not 0 <= block < grid.n_blocks:
        return None
    return list(grid.middle_voxel(block))


def log_tail(run_dir: Path, worker: str) -> str | None:
    """Return the end of a worker's log; None if the run folder has no log of that name."""
    # Names are compared, not joined: a name from a journal line must not lead out of the folder.
    files = {file.stem: file for file in log_files(run_dir) if file.suffix == ".log"}
    file = files.get(worker)
    return None if file is None else log_end(run_dir, file, _LOG_BYTES)


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration as YAML text, versions, and the last commands of a run."""
    commands = record.get("commands") or [record]
    last = commands[-1]
    return {
        "config": yaml.safe_dump(hidden(record.get("config", {})), sort_keys=False),
        "versions": last.get("versions", {}),
        "commands": [
            {key: c.get(key) for key in ("argv", "time", "host", "user")} for c in commands[-10:]
        ],
        "identity": record.get("identity_hash"),
    }


def results(record: dict[str, Any]) -> dict[str, Any]:
    """Return the reports of the finished stages: counts, largest segments, scores."""
    stages = record.get("stages", {})
    reports = {name: dict(entry.get("report") or {}) for name, entry in stages.items()}
    for report in reports.values():
        # Only the number of blocks: the page lists the failures with their reasons.
        if isinstance(report.get("failed"), list):
            report["failed"] = len(report["failed"])
    stitch = reports.get("stitch", {})
    if "largest" in stitch:
        stitch["largest"] = stitch["largest"][:_MAX_LARGEST]
    return {name: report for name, report in reports.items() if report}
