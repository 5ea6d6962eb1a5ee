"""What scripts and notebooks use; `import agq` gives it.

The commands call the same: `agq run` is `Run.run`, `agq predict` is `Run.predict`, and so on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agq import waiting
from agq.blockwise.predict.coordinator import PredictReport
from agq.blockwise.stitch.run import StitchReport
from agq.blockwise.volumes.open import Kind, Volume, open_volume
from agq.blockwise.volumes.triples import Box
from agq.errors import InputError, RunStoppedError
from agq.pipeline.config.recorded import read_target, require_trusted
from agq.pipeline.config.schema import Config, parse_config
from agq.pipeline.config.yaml_settings import expand_variables
from agq.pipeline.data.arrays import array_of, store_array
from agq.pipeline.data.inputs import open_input
from agq.pipeline.data.sections import is_importable
from agq.pipeline.evaluate.plausibility import Plausibility, recorded_plausibility
from agq.pipeline.evaluate.scores import EvaluationReport
from agq.pipeline.folder import RunFolder
from agq.pipeline.notify.notifier import Notifier, notifying
from agq.pipeline.run import stages
from agq.pipeline.run.chosen_blocks import choose_blocks
from agq.pipeline.run.fragments import (
    DEFAULT_THRESHOLD,
    location_settings,
    prepare_fragments,
)
from agq.pipeline.run.prepare import prepare, prepare_stitch
from agq.pipeline.run.session import Session, open_session
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.progress import Shown
from agq.pipeline.status.run_status import ForecastStatus, RunStatus
from agq.pipeline.status.text import forecast_table
from agq.tables import Tabled

if TYPE_CHECKING:
    from funlib.persistence import Array
    from rich.console import RenderableType

Location = str | os.PathLike[str]


class BlocksFailedError(RunStoppedError):
    """Blocks that failed in the end, so that the run was not stitched.

    Attributes
    ----------
    failed
        Their numbers.
    """

    def __init__(self, path: Path, failed: tuple[int, ...]) -> None:
        super().__init__(
            f"{len(failed)} block{'s' * (len(failed) > 1)} of {path} failed, the first is "
            f"{failed[0]}; predict them again with only_failed, or allow stitch.allow_missing"
        )
        self.failed = failed


@dataclass(frozen=True)
class RunReport(Tabled):
    """What a whole run made; a notebook shows it as tables.

    Attributes
    ----------
    run_dir
        Run folder.
    predict, stitch
        Reports of the two stages.
    evaluation
        Scores; None without ground truth.
    plausibility
        Figures that need no truth, and advice; None if they cannot be measured.
    forecast
        What the run was expected to take beside what it took.
    """

    run_dir: Path
    predict: PredictReport
    stitch: StitchReport
    evaluation: EvaluationReport | None
    plausibility: Plausibility | None = None
    forecast: tuple[ForecastStatus, ...] = ()

    def table(self) -> RenderableType:
        """Return the report for a rich console."""
        from rich.console import Group

        from agq.terminal import facts

        run, rows = RunFolder(self.run_dir), self.stitch.facts()
        if self.predict.dropped:
            rows.insert(2, ("dropped by the query limit", f"{self.predict.dropped:,}"))
        rows += [
            ("segmentation", str(run.container / "segmentation")),
            ("picture", str(run.path / f"{run.path.name}.png")),
            ("viewer", f"agq view {run.path}"),
        ]
        parts = (self.plausibility, self.evaluation)
        more: list[RenderableType] = [part.table() for part in parts if part]
        if self.forecast:
            more.append(forecast_table(self.forecast))
        return Group(facts(f"Run {run.path.name}", rows), *more)


class Run:
    """A run: a volume, its settings, and the folder that everything goes to.

    Whatever is done already is not done again, in this process or another one.

    Parameters
    ----------
    source
        Folder of a run, YAML file, or configuration.
    on_progress
        Called with (step, items done, items in all); what it raises stops the run, which can go
        on later. ``"bars"``: shown on standard error, as the commands do.
    trust
        Run what a folder of somebody else names: its `model.factory`, or its dask scheduler.
    **settings
        Sections of the configuration, such as ``stitch={"across": 0.6}``, that replace those of
        the source.

    Raises
    ------
    InputError
        If the source cannot be read or a setting is wrong; nothing is opened yet.
    """

    def __init__(
        self,
        source: Location | Config,
        *,
        on_progress: Shown = None,
        trust: bool = False,
        **settings: Any,
    ) -> None:
        config = source if isinstance(source, Config) else read_target(Path(source))
        self.config = _changed(config, settings)
        self._on_progress = on_progress
        self._trust = trust
        # Whether arrays of another model are those that were imported, as far as their names say.
        self._again = True
        self._session: Session | None = None
        self._notifier: Notifier | None = None

    def __repr__(self) -> str:
        return f"agq.Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        return self.status()._repr_html_() if self._folder.exists() else repr(self)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(Path(self.config.run_dir))

    @contextmanager
    def _open(self, *, overwrite: bool = False, predicts: bool = True) -> Iterator[Session]:
        """Hold the run for one stage, or for all of `run`."""
        if self._session is not None:
            yield self._session
            return
        waiting.doing("checking the input" + (" and the checkpoint" if predicts else ""))
        if self.config.input.fragments is not None and not predicts:
            prepared = prepare_fragments(self.config, again=self._again, trust=self._trust)
        elif predicts:
            prepared = prepare(self.config, overwrite=overwrite, trust=self._trust)
        else:
            prepared = prepare_stitch(self.config, trust=self._trust)
        notify = self.config.notify
        if notify is not None:
            require_trusted(self.path, "notify", trust=self._trust)
            notify.address()
        with (
            open_session(prepared, overwrite=overwrite, on_progress=self._on_progress) as session,
            notifying(self.path, notify) as notifier,
        ):
            session.on_move = notifier.moved
            self._session, self._notifier = session, notifier
            try:
                yield session
            finally:
                self._session = self._notifier = None

    def run(self, *, overwrite: bool = False) -> RunReport:
        """Do the whole job: predict, stitch, evaluate if there is a truth, draw a picture.

        Parameters
        ----------
        overwrite
            Delete the run that the folder holds, and start over.

        Raises
        ------
        InputError
            If an input cannot be used, or the folder holds a run with other settings.
        BlocksFailedError
            If blocks failed and the settings do not say ``stitch.allow_missing``.
        RunStoppedError
            If the disk is full or workers keep dying; the same call goes on later.
        """
        with self._open(overwrite=overwrite) as session:
            predicted = self.predict()
            if predicted.failed and not self.config.stitch.allow_missing:
                raise BlocksFailedError(self.path, predicted.failed)
            stitched = self.stitch()
            scores = stages.score(session)
            stages.picture(session)
        plausible = recorded_plausibility(self._folder.record()["stages"]["stitch"])
        forecast = load_status(self.path).forecast
        return RunReport(self.path, predicted, stitched, scores, plausible, forecast)

    def predict(
        self,
        *,
        only_failed: bool = False,
        overwrite: bool = False,
        blocks: Iterable[int] | None = None,
        roi: Box | None = None,
    ) -> PredictReport:
        """Label every block that is not done yet, or some blocks again.

        Parameters
        ----------
        only_failed
            Try only the blocks that failed before.
        overwrite
            Delete the run that the folder holds, and start over.
        blocks
            Numbers of blocks to compute, and only them, done or not.
        roi
            The same for the blocks of a box of voxels: its first, and one past its last, (z, y, x).

        Returns
        -------
        report
            Blocks that failed do not raise; its `failed` lists them.
        """
        with self._open(overwrite=overwrite) as session:
            again = None
            if blocks is not None or roi is not None:
                again = choose_blocks(session.prepared, blocks, roi)
            report = stages.predict(session, only_failed=only_failed, again=again)
            if report.failed and self._notifier and not self.config.stitch.allow_missing:
                self._notifier.failure = str(BlocksFailedError(self.path, report.failed))
            return report

    def stitch(self, **settings: Any) -> StitchReport:
        """Join the labels of all blocks into one segmentation with its pyramid.

        Parameters
        ----------
        **settings
            Of the section `stitch`, such as ``across=0.6``; they stay those of the run.
        """
        if settings:
            self.config = _changed(self.config, {"stitch": settings})
        with self._open(predicts=False) as session:
            return stages.stitch(session)

    def evaluate(self) -> EvaluationReport:
        """Score the segmentation against the ground truth that `evaluate.truth` names.

        Raises
        ------
        InputError
            If the settings name none.
        """
        if self.config.evaluate is None:
            raise InputError("evaluate.truth: no ground truth is named; give evaluate={'truth': …}")
        with self._open(predicts=False) as session:
            report = stages.score(session)
        assert report is not None
        return report

    def status(self) -> RunStatus:
        """Say how far the run is, whichever process works on it."""
        from agq.pipeline.slurm.jobs import queue_status

        return load_status(self.path, queue=queue_status)

    def raw(self) -> Array:
        """Return the raw volume; nothing is read before it is sliced."""
        return array_of(
            open_input(
                self.config.input.raw, self._folder, "raw", "input.raw", self.config.input.unit
            )
        )

    def fragments(self) -> Array:
        """Return the labels of all blocks before the stitch; 0 where there are none yet."""
        return self._labels("fragments")

    def segmentation(self, level: int = 0) -> Array:
        """Return the segmentation.

        Parameters
        ----------
        level
            Level of the pyramid; 0 is full resolution.
        """
        return self._labels("segmentation", level)

    def _labels(self, name: str, level: int | None = None) -> Array:
        unit = self.config.input.unit
        container = self._folder.container
        return array_of(open_volume(container, name, level=level, kind="labels", unit=unit))


def segment(
    raw: Any,
    voxel_size: Sequence[int] | None,
    out: Location,
    *,
    mask: Any = None,
    truth: Any = None,
    unit: Literal["nm", "angstrom", "pm"] = "nm",
    on_progress: Shown = None,
    **settings: Any,
) -> Run:
    """Segment a volume: predict, stitch, evaluate; called again it goes on where it was.

    Parameters
    ----------
    raw
        An array (z, y, x), written into the run folder once; or ``path`` or ``path::dataset`` of a
        volume or an image stack. What an array of xarray, funlib.persistence or zarr says of its
        axes, voxel size and offset counts.
    voxel_size
        (z, y, x) in `unit`, whole numbers; None where files and arrays say it.
    out
        Run folder.
    mask, truth
        Like `raw`: voxels outside the mask's nonzero ones are hidden; the result is scored against
        the ground-truth labels. An array that does not say its place lies where `raw` does.
    unit
        World unit; a voxel of 4.2 nm is 42 ``angstrom``.
    on_progress
        As for `Run`.
    **settings
        Sections of the configuration, such as ``model={"checkpoint": "my.safetensors"}``.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    InputError, BlocksFailedError, RunStoppedError
        As `Run.run`.
    """
    folder = Path(out)

    def volume(data: Any, kind: Kind) -> dict[str, Any]:
        return _section(data, kind, voxel_size, unit, folder, given["input"].get("raw"))

    given: dict[str, Any] = {"run_dir": str(folder), "input": {}}
    given["input"]["raw"] = volume(raw, "raw")
    if mask is not None:
        given["input"]["mask"] = volume(mask, "mask")
    if truth is not None:
        given["evaluate"] = {"truth": volume(truth, "labels")}
    values = _merged(given, expand_variables(settings))
    run = Run(parse_config(values, "segment"), on_progress=on_progress)
    run.run()
    return run


def stitch_fragments(
    fragments: Any,
    affinities: Any,
    voxel_size: Sequence[int] | None,
    out: Location,
    *,
    threshold: float = DEFAULT_THRESHOLD,
    unit: Literal["nm", "angstrom", "pm"] = "nm",
    channels: Sequence[int] = (0, 1, 2),
    on_progress: Shown = None,
    trust: bool = False,
    **settings: Any,
) -> StitchReport:
    """Stitch fragments of another model by its affinities, as ``agq stitch --fragments`` does.

    Parameters
    ----------
    fragments
        Labels (z, y, x), 0 is background: an array, written into the folder once, or ``path`` or
        ``path::dataset``.
    affinities
        (channels, z, y, x), uint8 or 0 to 1, likewise: at a voxel the affinity to the voxel before.
    voxel_size
        (z, y, x) in `unit`; None where the fragments' file says it.
    out
        Run folder for the result, ``data.zarr/segmentation`` and ``lut/segments.parquet``.
    threshold
        Affinity that a contact must exceed on average.
    unit
        World unit.
    channels
        Channels of the affinities on z, y and x.
    on_progress, trust
        As for `Run`.
    **settings
        Sections of the configuration, such as ``stitch={"min_size": 500}``.

    Raises
    ------
    InputError
        If an array cannot be used, or the folder holds something else.
    """
    folder = Path(out)

    def location(given: Any, name: str, beside: str | None = None) -> str:
        if isinstance(given, str | os.PathLike):
            return os.fspath(given)
        like = _beside(beside, "labels", voxel_size, unit)
        return f"{store_array(folder, name, given, voxel_size, unit, like)}::{name}"

    joined = location(fragments, "fragments")
    weighed = location(affinities, "affinities", joined)
    given = {
        "run_dir": str(folder),
        "input": {
            "fragments": location_settings(joined) | {"voxel_size": voxel_size, "unit": unit},
            "affinities": location_settings(weighed) | {"channels": channels},
        },
        "stitch": {"across": threshold, "within": threshold},
    }
    values = _merged(given, expand_variables(settings))
    run = Run(parse_config(values, "stitch"), on_progress=on_progress, trust=trust)
    run._again = False
    return run.stitch()


def _section(
    given: Any,
    kind: Kind,
    voxel_size: Sequence[int] | None,
    unit: str,
    folder: Path,
    beside: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the section of a configuration that names a volume, written first if need be."""
    if isinstance(given, str | os.PathLike):
        path, _, dataset = expand_variables(os.fspath(given), (kind,)).partition("::")
        return {"path": path, "dataset": dataset or None, "voxel_size": voxel_size, "unit": unit}
    near = None if beside is None else "::".join(filter(None, (beside["path"], beside["dataset"])))
    like = _beside(near, "raw", voxel_size, unit)
    path = str(store_array(folder, kind, given, voxel_size, unit, like))
    return {"path": path, "dataset": kind, "unit": unit}


def _beside(
    location: str | None, kind: Kind, voxel_size: Sequence[int] | None, unit: str
) -> Volume | None:
    """Open the volume beside which an array lies; None for image files, and without any."""
    path, _, dataset = (location or "").partition("::")
    if location is None or is_importable(path):
        return None
    return open_volume(path, dataset or None, voxel_size=voxel_size, kind=kind, unit=unit)


def _changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with some settings replaced."""
    if not settings:
        return config
    # What is not set stays so: a checkpoint may have a setting for it.
    values = config.model_dump(exclude_unset=True)
    return parse_config(_merged(values, expand_variables(settings)), "settings")


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings, some of them replaced."""
    merged = dict(values)
    for name, value in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        merged[name] = value
    return merged
