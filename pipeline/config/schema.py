"""One YAML file describes a run: the configuration model (`config.yaml_settings` reads it)."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, NonNegativeInt, model_validator

from agq.blockwise.blocks.settings import BlocksSettings
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.settings import WorkersSettings
from agq.blockwise.stitch.settings import OutputType, PyramidSettings, StitchSettings
from agq.credentials import hidden
from agq.model.settings import NetworkSettings
from agq.pipeline.config.yaml_settings import load_yaml, parse_values
from agq.pipeline.notify.settings import NotifySettings
from agq.pipeline.slurm.settings import SlurmSettings
from agq.settings import LocalPath, Settings, Size

DEFAULT_FACTORY = "agq.model.predictor:AGQPredictor"
EARLIER_FACTORY = "model.predictor:AGQPredictor"
"""The name of the default factory in configurations and records of earlier releases."""


def _present_factory(name: object) -> object:
    return DEFAULT_FACTORY if name == EARLIER_FACTORY else name


def _sections(value: object) -> object:
    """Read a list of sections: numbers, and texts such as ``40-44`` or ``3,40-44``."""
    items = value if isinstance(value, list | tuple) else [value]
    found: set[int] = set()
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError(f"{item!r} is neither a section nor a range such as 40-44")
        for part in str(item).split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None or int(match[2] or match[1]) < int(match[1]):
                raise ValueError(f"{part!r} is neither a section nor a range such as 40-44")
            found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


class VolumeSettings(Settings):
    """Where a volume is and, if its file does not say so, how it lies in the world."""

    path: str
    """Container: zarr v2/v3, OME-Zarr, N5 or neuroglancer's precomputed (local path, s3://, gs://,
    https://, also after precomputed://), or a tif stack, h5, npz or npy file, which is imported
    once into the run folder."""

    dataset: str | None = None
    """Array inside the container (zarr, N5, h5) or key of an npz file."""

    level: NonNegativeInt | None = None
    """Resolution level of an OME-Zarr multiscale; 0 is full resolution."""

    voxel_size: Size | None = None
    """Voxel size (z, y, x) in world units; needed where the file does not hold it, checked where
    it does."""

    offset: tuple[int, int, int] | None = None
    """World position (z, y, x) of the first voxel in world units, where the file does not say."""

    unit: Literal["nm", "angstrom", "pm"] = "nm"
    """Unit of `voxel_size` and `offset`. That of `input.raw` (or `input.fragments`) is the
    world unit of the run. World coordinates are whole numbers: a voxel of 4.2 nm needs `angstrom`
    (42) or `pm`."""

    allow_gaps: bool = False
    """Whether sections whose number no file of a folder or glob has are filled, not an error."""

    gap_value: float = 0
    """Value of all voxels of such a section."""


class RoiSettings(Settings):
    """The part of the volume to process; blocks that touch it are processed whole."""

    offset: tuple[int, int, int]
    """First voxel, or first world coordinate, (z, y, x)."""

    shape: Size
    """Extent (z, y, x) in the same units."""

    units: Literal["voxels", "world"] = "voxels"
    """`voxels` count from the first voxel of the volume; `world` is the volume's world unit."""


class AffinitiesSettings(Settings):
    """Affinities of another model."""

    path: str
    """Container: zarr v2/v3 or N5 (local path, s3://, gs://, https://)."""

    dataset: str | None = None
    """Array (channels, z, y, x) inside it, uint8 or 0 to 1."""

    channels: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] = (0, 1, 2)
    """Channels that hold, at a voxel, the affinity to the voxel before on z, y and x."""


class InputSettings(Settings):
    """What is segmented."""

    raw: VolumeSettings | None = None
    """The EM volume: 3-D, uint8, uint16 or float32 in [0, 1]. A prediction needs it; with
    `fragments` it is only looked at."""

    fragments: VolumeSettings | None = None
    """Fragments of another model, in the place of a prediction: `agq stitch` joins them."""

    affinities: AffinitiesSettings | None = None
    """The affinities by which `fragments` are joined."""

    mask: VolumeSettings | None = None
    """Optional mask at any scale: voxels whose centre lies in no nonzero voxel of it stay
    background, and blocks without any other are skipped. A label that it cuts apart becomes its
    6-connected pieces."""

    classes: VolumeSettings | None = None
    """Optional classes of tissue (nucleus, vessel, glia, ...), integers at any scale: fragments of
    two classes never become one segment (see `stitch.classes_may_merge`). 0 says nothing."""

    roi: RoiSettings | None = None
    """Optional part of the volume."""

    bad_sections: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_sections)] = ()
    """Sections (z) of the raw volume, counted from 0, that are not used, such as
    `[12, 40-44]`: the nearest other section, of two the one before, is read in their
    place."""

    bad_sections_fill: Literal["neighbour", "mask"] = "neighbour"
    """`mask`: bad sections also get no label, as where a mask is zero."""

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if (self.fragments is None) != (self.affinities is None):
            raise ValueError("fragments and affinities go together")
        if self.raw is None and self.fragments is None:
            raise ValueError("raw is missing: name the EM volume, input.raw.path")
        return self

    @property
    def unit(self) -> str:
        """World unit of the run."""
        first = self.fragments or self.raw
        assert first is not None
        return first.unit


class ModelSettings(NetworkSettings):
    """The network that labels one block."""

    factory: Annotated[str, BeforeValidator(_present_factory)] = DEFAULT_FACTORY
    """`module:callable` that makes the predictor; another model can be put here. Its module is
    found through `PYTHONPATH` or an installed package, not in the current folder."""

    normalise: Literal["none", "volume", "section"] | None = None
    """Stretch grey values so that the 1st and 99th percentiles, of the volume or of each section,
    become those that the network knows (0.1 and 0.9 of black to white). They are measured once and
    kept with the run; voxels of 0 or of an integer type's largest value are fill and do not count.
    Without it grey values are used as they are, and a volume with little
    contrast is refused; `none` uses that one too."""

    options: dict[str, Any] | None = None
    """Keyword arguments for a factory other than the default one."""

    any_voxel_size: bool = False
    """Predict also where voxels differ by more than 1.5 times, on an axis, from those that the
    checkpoint was trained at."""


class OutputSettings(Settings):
    """What is kept."""

    affinities: bool = False
    """Also keep the affinities (3 bytes per voxel before compression)."""

    dtype: OutputType = "auto"
    """Type of the segmentation. `auto`: uint32 where it holds all ids, which takes less time to
    write and more programs read, else uint64. Ids that are those of fragments
    (`stitch.segment_ids`) are uint64."""


class EvaluateSettings(Settings):
    """Scores of the result against ground truth."""

    truth: VolumeSettings
    """Ground-truth labels with the voxel size of the raw volume; 0 is ignored."""

    ignore_labels: tuple[int, ...] = ()
    """Other labels of the truth that mean unlabelled, such as -1 or 18446744073709551615."""


class Config(Settings):
    """A run of the pipeline."""

    run_dir: LocalPath
    """Folder of the run: journal, output volumes, reports. Relative to where the command runs."""

    input: InputSettings
    """The volume, its mask, its classes and the part of it to process."""

    model: ModelSettings = ModelSettings()
    """The network."""

    blocks: BlocksSettings = BlocksSettings()
    """The block grid."""

    workers: WorkersSettings = WorkersSettings()
    """Prediction workers."""

    stitch: StitchSettings = StitchSettings()
    """Agglomeration of fragments into segments."""

    pyramid: PyramidSettings = PyramidSettings()
    """Multiscale output."""

    output: OutputSettings = OutputSettings()
    """What is kept besides fragments and segmentation."""

    ledger: LedgerSettings | None = None
    """Block progress in MongoDB. Without it, a URI in the environment variable AGQ_MONGO_URI is
    used; without that, the run folder alone is enough."""

    evaluate: EvaluateSettings | None = None
    """Ground truth, if there is one."""

    slurm: SlurmSettings | None = None
    """How `agq submit` runs it on a cluster."""

    notify: NotifySettings | None = None
    """Whom to tell when a run ends, fails or stands still."""


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read and check the configuration of a run; see `config.yaml_settings.load_yaml`."""
    return load_yaml(Config, path, overrides)


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Check the configuration of a run given as a mapping, whose values are taken as they are."""
    return parse_values(Config, data, source=source)


def masked(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data without any secret, for records and logs.

    Paths are absolute: a record is read later, in another folder.
    """
    data: dict[str, Any] = config.model_dump(mode="json")
    for volume in [*data["input"].values(), (data["evaluate"] or {}).get("truth")]:
        if isinstance(volume, dict) and "path" in volume:
            path = volume["path"].removeprefix("precomputed://")
            if "://" not in path:
                volume["path"] = str(Path(path).expanduser().absolute())
    checkpoint = Path(data["model"]["checkpoint"]).expanduser()
    if checkpoint.is_file():
        data["model"]["checkpoint"] = str(checkpoint.absolute())
    if config.input.fragments is not None:
        # Nothing is predicted.
        for name in ("model", "blocks", "workers", "output", "slurm"):
            del data[name]
    found: dict[str, Any] = hidden(data)
    return found
