"""Turn a configuration into opened inputs and a block grid, or one clear line of what is wrong.

Everything that can be found out before a block runs is found out here: `agq plan` stops after it,
the other commands start with it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.overlay import require_overlap
from agq.blockwise.predict.predictor import option_files, resolve_factory
from agq.blockwise.predict.raw_blocks import nearest_good
from agq.blockwise.storage.files import require_free_space, require_writable
from agq.blockwise.volumes.open import Kind, Volume
from agq.blockwise.volumes.triples import Box, Triple
from agq.credentials import hidden
from agq.errors import InputError
from agq.model.recommended import Recommended
from agq.model.settings import NetworkSettings
from agq.pipeline.config.recorded import require_own_folder, require_trusted
from agq.pipeline.config.resolved import Origins, resolve, takes
from agq.pipeline.config.schema import (
    DEFAULT_FACTORY,
    EARLIER_FACTORY,
    Config,
    VolumeSettings,
    masked,
    parse_config,
)
from agq.pipeline.data.inputs import open_input, roi_box, world_roi
from agq.pipeline.folder import RunFolder
from agq.pipeline.forecast.forecast import Work, disk_bytes
from agq.pipeline.run.fit import Size, fits, misfit, nanometres, require_fit, show
from agq.pipeline.run.greys import check_greys

if TYPE_CHECKING:
    from agq.model.checkpoint import LoadedCheckpoint

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A checked run: nothing of it has been computed yet.

    Attributes
    ----------
    config
        With what the checkpoint recommends in the place of what it leaves open.
    grid
        Blocks of the whole volume.
    identity
        What decides the bytes of a block.
    raw, mask, truth
        Opened volumes; None: there is none, or a stitch has not opened it (`prepare_stitch`).
    box
        Voxel box (start, stop) of the ROI; None for the whole volume.
    predictor_options
        Keyword arguments for the predictor's factory.
    trained_voxel_size
        Voxel size (z, y, x) in nanometres of the checkpoint; None if nothing says it.
    notes
        What the user is told, one line each.
    files
        SHA-256 of the files that `predictor_options` name, by option.
    device
        Kind of device that this machine predicts on; None: not known here.
    recommended
        What the checkpoint recommends, or did when the run was begun.
    origins
        Where settings come from (`agq.pipeline.config.resolved.resolve`).
    """

    config: Config
    run: RunFolder
    grid: BlockGrid
    identity: dict[str, Any]
    raw: Volume | None = None
    mask: Volume | None = None
    truth: Volume | None = None
    box: Box | None = None
    predictor_options: dict[str, Any] = field(default_factory=dict)
    trained_voxel_size: Size | None = None
    notes: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    device: str | None = None
    recommended: Recommended = field(default_factory=Recommended)
    origins: Origins = field(default_factory=dict)

    @cached_property
    def selected(self) -> npt.NDArray[np.int64]:
        """Numbers of the blocks that the ROI touches, ascending; int64."""
        return self.grid.select(*(self.box or ((0, 0, 0), self.grid.volume_shape)))

    @property
    def unit(self) -> str:
        """World unit of the run."""
        return self.config.input.unit

    def opened_raw(self) -> Volume:
        """Return the raw volume, opened now if it was not needed before."""
        section = self.config.input.raw
        return self.raw or open_input(section, self.run, "raw", "input.raw", self.unit)

    @property
    def hides_voxels(self) -> bool:
        """Whether the mask hides voxels, and not whole blocks only."""
        return bool(self.identity["mask"]) and "hides" in self.identity["mask"]

    def as_begun(self) -> Prepared:
        """Return the run as the folder holds it.

        Earlier releases left out whole blocks without tissue and hid no voxel. What they began
        goes on so: its blocks would not match others, and may be stitched again at any time.
        """
        if not self.hides_voxels or not self.run.exists():
            return self
        begun = self.run.record()["identity"].get("mask")
        if not begun or "hides" in begun:
            return self
        mask = {name: value for name, value in self.identity["mask"].items() if name != "hides"}
        return replace(self, identity={**self.identity, "mask": mask})

    def opened_truth(self) -> Volume | None:
        """Return the truth, opened now if it was not needed before; None if there is none."""
        return self.truth or _open_truth(self.config, self.run, self.grid)

    def opened_classes(self) -> Volume | None:
        """Open the classes of tissue, which the stitch alone needs; None if there are none."""
        settings, field = self.config.input.classes, "input.classes"
        classes = _open_beside(self.config, settings, self.run, "labels", field)
        if classes is not None:
            try:
                require_overlap(classes, self.grid)
            except InputError as error:
                raise InputError(f"{field}: {error}") from None
        return classes

    def scored_truth(self) -> Volume | None:
        """Return the truth inside the ROI: outside of it nothing is segmented."""
        truth = self.opened_truth()
        try:
            return truth and truth.crop(world_roi(self.box, self.grid))
        except InputError as error:
            raise InputError(f"evaluate.truth: {error}") from None

    def work(self, blocks: int | None = None, todo: int | None = None) -> Work:
        """Return what there is to do, of so many blocks (default: all that are selected).

        Parameters
        ----------
        blocks
            Blocks that the run will hold in the end.
        todo
            Of these, those that are not done; default: all.
        """
        config = self.config
        selected = int(self.selected.size)
        blocks = selected if blocks is None else blocks
        return Work(
            grid=self.grid,
            selected=selected,
            blocks=blocks,
            todo=blocks if todo is None else todo,
            levels=None if config.pyramid.levels == "auto" else config.pyramid.levels + 1,
            affinities=config.output.affinities,
            evaluated=config.evaluate is not None,
        )


def prepare(
    config: Config,
    *,
    check_output: bool = True,
    check_room: bool = True,
    workers_here: bool = True,
    overwrite: bool = False,
    trust: bool = False,
) -> Prepared:
    """Open and check every input of a run.

    Parameters
    ----------
    config
        The configuration.
    check_output
        Also check that the run folder is writable, the disk has room, and a database that the run
        needs can be written to.
    check_room
        If so, whether the disk has room is checked (`require_room`).
    workers_here
        Whether the network will run on this machine, so that its device must be here.
    overwrite
        Whether the run that the folder holds will be deleted.
    trust
        Whether code that is no part of agq may be run for a folder of somebody else.

    Raises
    ------
    InputError
        One line that names the field or file and the fix.
    """
    if config.input.fragments is not None:
        raise InputError(
            "input.fragments: fragments of another model take the place of a prediction: agq stitch"
            " joins them"
        )
    workers_here = workers_here and config.workers.count != 0
    run = RunFolder(Path(config.run_dir))
    if check_output:
        require_writable(run.path, "run_dir", create=True)
    raw = open_input(config.input.raw, run, "raw", "input.raw")
    mask = _open_beside(config, config.input.mask, run, "mask", "input.mask")
    if check_output:
        _check_ledger(config)
    require_trusted_scheduler(config, run, trust=trust)
    if config.model.factory != DEFAULT_FACTORY:
        require_trusted(run.path, f"model.factory {config.model.factory}", trust=trust)
    if check_output:
        require_own_folder(run.path, trust=trust)
    goes_on = run.exists() and not overwrite
    recommended = run.recommended() if goes_on else Recommended()
    name_factory(config)
    loaded = _checkpoint(config)
    trained = None if loaded is None else loaded.config
    if loaded is not None and not goes_on:
        recommended = loaded.recommended
    unused = _unused(config, recommended)
    config, origins = resolve(config, recommended, trained)
    options, model_identity = _model(config, loaded, workers_here)
    normalise = config.model.normalise
    notes = [] if trained is None else _check_fit(config, raw, trained.voxel_size, goes_on=goes_on)
    if trained is not None and normalise is None and not goes_on:
        notes += check_greys(raw)
    bad = _bad_sections(config, raw)
    if config.model.factory == DEFAULT_FACTORY:
        files = {} if loaded is None else {"checkpoint": loaded.file_sha256}
    else:
        files = option_files(options)
    grid = _grid(config, raw, None if trained is None else trained.input_shape)
    box = roi_box(config.input.roi, grid)
    prepared = Prepared(
        config=config,
        run=run,
        raw=raw,
        mask=mask,
        truth=_open_truth(config, run, grid),
        grid=grid,
        box=box,
        predictor_options=options,
        identity={
            "raw": raw.describe(),
            "mask": mask and {**mask.describe(), "hides": "voxels"},
            "grid": grid.to_dict(),
            "model": model_identity,
            "affinities": config.output.affinities,
            **({"bad_sections": bad} if bad else {}),
            **({"normalise": normalise} if normalise in ("volume", "section") else {}),
        },
        trained_voxel_size=None if trained is None else trained.voxel_size,
        notes=(*raw.notes, *(mask.notes if mask else ()), *notes, *([] if goes_on else unused)),
        files=files,
        device=_kind(options) if workers_here else None,
        recommended=recommended,
        origins=origins,
    )
    prepared.scored_truth()
    prepared.opened_classes()
    if check_output and check_room:
        require_room(prepared)
    return prepared


def prepare_stitch(config: Config, *, trust: bool = False) -> Prepared:
    """Check what a stitch of a run needs, and the scores after it.

    Where the folder holds a run of the same configuration, that is the folder alone: no input and
    no checkpoint is opened, and they may be gone. Another configuration is compared with the run
    as `prepare` does it.

    Raises
    ------
    InputError
        As `prepare`.
    """
    run, written = RunFolder(Path(config.run_dir)), config
    origins: Origins = {}
    if run.exists():
        config, origins = resolve(config, run.recommended())
    if not run.exists() or not _in_the_same_words(config, run):
        return prepare(written, workers_here=False, trust=trust)
    require_trusted_scheduler(config, run, trust=trust)
    require_own_folder(run.path, trust=trust)
    require_writable(run.path, "run_dir")
    identity = run.identity()
    if identity["model"].get("pieces") == "supervoxels":
        _check_supervoxels(config)
    grid = run.grid()
    box = roi_box(config.input.roi, grid)
    prepared = Prepared(
        config=config,
        run=run,
        grid=grid,
        box=box,
        identity=identity,
        origins=origins,
    )
    _check_ledger(config)
    require_room(prepared)
    return prepared


def _in_the_same_words(config: Config, run: RunFolder) -> bool:
    """Whether the run was recorded with the same settings of all that decides a block."""
    try:
        recorded = parse_config({**run.record()["config"], "ledger": None, "notify": None})
    except InputError:
        return False

    def deciding(config: Config) -> dict[str, Any]:
        values = masked(config)
        del values["input"]["roi"], values["input"]["classes"]
        parts = {name: values[name] for name in ("input", "model", "blocks", "output")}
        return parts | {"threads": config.workers.threads}

    return deciding(config) == deciding(recorded)


def _open_beside(
    config: Config, settings: VolumeSettings | None, run: RunFolder, kind: Kind, field: str
) -> Volume | None:
    """Open an optional volume that lies in the same world as the raw one."""
    if settings is None:
        return None
    return open_input(settings, run, kind, field, config.input.unit)


def _check_fit(config: Config, raw: Volume, trained: Size | None, *, goes_on: bool) -> list[str]:
    """Return notes on the voxel size of the network; refuse to begin a run with another one."""
    model = config.model
    if trained is None:
        return [
            f"checkpoint {model.checkpoint} does not say the voxel size it was trained at; "
            f"the volume has {show(nanometres(raw))} (agq checkpoint convert --voxel-size adds it)"
        ]
    # A run that is there was begun with this volume and this checkpoint; its identity says so.
    if not model.any_voxel_size and not goes_on:
        given = config.input.raw
        require_fit(raw, given.dataset if given else None, model.checkpoint, trained)
    if fits(nanometres(raw), trained):
        return []
    return [
        f"voxels of {show(nanometres(raw))} are not those that checkpoint {model.checkpoint} was "
        f"trained at, {show(trained)}: {misfit(nanometres(raw), trained)}"
    ]


def _bad_sections(config: Config, raw: Volume) -> dict[str, Any] | None:
    """Check the sections that are named as bad; return what they are in the run's identity."""
    settings = config.input
    if not settings.bad_sections:
        return None
    try:
        nearest_good(settings.bad_sections, raw.shape[0])
    except InputError as error:
        raise InputError(f"input.bad_sections: {error}") from None
    return {"sections": list(settings.bad_sections), "fill": settings.bad_sections_fill}


def _open_truth(config: Config, run: RunFolder, grid: BlockGrid) -> Volume | None:
    settings = None if config.evaluate is None else config.evaluate.truth
    truth = _open_beside(config, settings, run, "labels", "evaluate.truth")
    if truth is not None and tuple(truth.voxel_size) != tuple(grid.voxel_size):
        raise InputError(
            f"evaluate.truth: voxel size {tuple(truth.voxel_size)} differs from the raw volume's "
            f"{tuple(grid.voxel_size)}"
        )
    return truth


def require_room(prepared: Prepared) -> None:
    """Check that the disk has room for a run that has not begun.

    Raises
    ------
    InputError
        If it has less than the run is expected to take.
    """
    run = prepared.run
    if not run.exists():
        require_free_space(run.path, sum(disk_bytes(prepared.work()).values()), "run_dir")


def _check_ledger(config: Config) -> None:
    """Check that a database that the run needs takes its records."""
    if config.ledger is None or not config.ledger.required:
        return
    from agq.blockwise.ledger.database import connect  # imports pymongo

    ledger = connect(config.ledger)
    if ledger is not None:
        # Before the run: a user without the right to write would be refused at its end, or after
        # --overwrite has deleted the earlier run.
        ledger.require_writable()
        ledger.close()


def name_factory(config: Config) -> None:
    """Tell the user which code, beside our own, a configuration runs; before it is imported."""
    factory = config.model.factory
    if factory != DEFAULT_FACTORY and _is_found(factory):
        _logger.warning("model.factory %s is not the built-in one: its code runs as you", factory)


def _is_found(factory: str) -> bool:
    """Whether there is a module to import; nothing of it is imported by looking for it."""
    try:
        return find_spec(factory.partition(":")[0].partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def require_trusted_scheduler(config: Config, run: RunFolder, *, trust: bool) -> None:
    """Refuse the dask scheduler that the folder of somebody else may have chosen."""
    if (address := config.stitch.dask.address) is not None:
        # What a scheduler sends is unpickled.
        require_trusted(run.path, f"stitch.dask.address {address}", trust=trust)


def _checkpoint(config: Config) -> LoadedCheckpoint | None:
    """Read the checkpoint; None with a `model.factory` of the user's own."""
    model = config.model
    if model.factory != DEFAULT_FACTORY:
        return None
    if model.options is not None:
        raise InputError("model.options: only a model.factory of your own takes them; remove it")
    # torch takes seconds to load, and stitching another model's labels never needs it.
    from agq.model.checkpoint import load

    return load(model.checkpoint)


def _unused(config: Config, recommended: Recommended) -> list[str]:
    """Return a note on recommended settings that do not go with the configuration."""
    if not recommended.settings or takes(config, recommended):
        return []
    return [
        f"checkpoint {config.model.checkpoint} recommends settings for pieces: "
        f"{recommended.model.pieces}; this configuration has others, and takes none of them"
    ]


def _model(
    config: Config, loaded: LoadedCheckpoint | None, workers_here: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the settings of the model; return factory options and identity."""
    model = config.model
    if loaded is None:
        resolve_factory(model.factory)
        options = dict(model.options or {})
        return options, {"factory": model.factory, "options": hidden(options)}
    from agq.model.checkpoint import resolve as resolve_file
    from agq.model.predictor import resolve_device
    from agq.model.settings import PredictorSettings

    settings = PredictorSettings(
        **model.model_dump(include=set(NetworkSettings.model_fields)),
        threads=config.workers.threads,
    )
    device = settings.device
    if workers_here:
        # A worker whose GPU has gone must not go on with the CPU.
        found = resolve_device(device)
        device = found.type if device == "auto" else device
    if settings.network(loaded.config).pieces == "supervoxels":
        _check_supervoxels(config)
    path = resolve_file(settings.checkpoint)
    changes = {"checkpoint": str(path.absolute()), "device": device}
    options = settings.model_copy(update=changes).model_dump()
    # Runs of earlier releases have recorded this name of the factory; they go on.
    return options, {"factory": EARLIER_FACTORY, **settings.identity(loaded)}


def _kind(options: dict[str, Any]) -> str | None:
    """Return the kind of device that options name, if they name one."""
    device = options.get("device")
    return device.partition(":")[0] if isinstance(device, str) and device != "auto" else None


def _check_supervoxels(config: Config) -> None:
    if config.model.min_affinity is not None:
        raise InputError(
            "model.min_affinity cuts masks, and model.pieces: supervoxels labels no voxel by its "
            "mask: remove one of the two"
        )
    if config.stitch.within >= 1:
        raise InputError(
            f"stitch.within: {config.stitch.within:g} joins nothing inside a block, and "
            "supervoxels (model.pieces) must be joined there: set it below 1, for example to 0.6"
        )


def _grid(config: Config, raw: Volume, trained: Triple | None) -> BlockGrid:
    blocks = config.blocks
    read = blocks.read_shape or trained
    if read is None:
        raise InputError("blocks.read_shape is needed with a model.factory of your own")
    try:
        write = blocks.write_shape(read)
    except ValueError as error:
        raise InputError(f"blocks: {error}") from None
    return BlockGrid(
        volume_shape=raw.shape,
        voxel_size=raw.voxel_size,
        write_shape=write,
        before=blocks.before,
        after=blocks.after,
        offset=raw.offset,
    )
