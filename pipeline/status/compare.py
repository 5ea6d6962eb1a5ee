"""What a run was expected to take beside what it took."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from agq.blockwise.journal.progress import StageProgress
from agq.pipeline.status.run_status import ForecastStatus, StageStatus

Record = dict[str, Any]

_STITCH: Final = ("stitch", "pyramid")
"""Steps of the forecast that the stage of the stitch does."""


def compare(
    entries: Mapping[str, Record],
    stages: Iterable[StageStatus],
    progress: StageProgress | None,
    now: float,
) -> tuple[ForecastStatus, ...]:
    """Put the forecast that a run was begun with beside the facts.

    Parameters
    ----------
    entries
        What the record says of each stage.
    stages
        The stages of the status.
    progress
        What journal or ledger say of the prediction.
    now
        Seconds since the epoch.

    Returns
    -------
    tuple of ForecastStatus
        Empty for a run without a forecast, or with one for another ROI.
    """
    predict, by_name = entries.get("predict", {}), {stage.name: stage for stage in stages}
    told: Record | None = predict.get("forecast")
    if told is None or told["selected"] != predict.get("blocks_total", told["selected"]):
        return ()
    disk = entries.get("stitch", {}).get("disk") or {}
    whole = disk.get("whole", False)
    hours = predict_s = None
    if _done(by_name, "predict") and progress is not None:
        lives = [max(0.0, w.last - w.info.started) for w in progress.workers.values()]
        hours = sum(lives) / 3600
        sums = progress.progress(None, now)
        predict_s = sums["finished"] - sums["started"]
    seconds, expected = told.get("seconds", {}), told.get("worker_hours")
    price = None if not expected else (told.get("cost") or 0.0) / expected
    rows = [
        ("gpu_hours" if told["gpus"] else "worker_hours", expected, hours),
        ("cost", told.get("cost"), None if hours is None or price is None else hours * price),
        ("predict_s", seconds.get("predict"), predict_s),
        ("stitch_s", sum(seconds.get(name, 0.0) for name in _STITCH), _wall(by_name, "stitch")),
        ("evaluate_s", seconds.get("evaluate"), _wall(by_name, "evaluate")),
        ("disk_bytes", _sum(told.get("disk_bytes")), disk.get("bytes") if whole else None),
        ("files", _sum(told.get("files")), disk.get("files") if whole else None),
    ]
    return tuple(
        ForecastStatus(name=name, forecast=forecast, fact=fact)
        for name, forecast, fact in rows
        if forecast is not None
    )


def _done(stages: Mapping[str, StageStatus], name: str) -> bool:
    return name in stages and stages[name].state == "done"


def _wall(stages: Mapping[str, StageStatus], name: str) -> float | None:
    if not _done(stages, name):
        return None
    stage = stages[name]
    return (
        None if stage.started is None or stage.finished is None else stage.finished - stage.started
    )


def _sum(kinds: Mapping[str, float] | None) -> float | None:
    return float(sum(kinds.values())) if kinds else None
