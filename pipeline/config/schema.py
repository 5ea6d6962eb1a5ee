"""One YAML file describes a run: the configuration model (`config.yaml_settings` reads it)."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from agq.blockwise.ledger.settings import LedgerSettings
from agq.model.settings import NetworkSettings
from agq.pipeline.config.yaml_settings import load_yaml, parse_values
from agq.pipeline.slurm.settings import SlurmSection
from agq.settings import File, Margin, Settings, Size

DEFAULT_FACTORY = "agq.model.predictor:AGQPredictor"
EARLIER_FACTORY = "model.predictor:AGQPredictor"
"""The name of the default factory in configurations and records of earlier releases."""


def _present_factory(name: object) -> object:
    return DEFAULT_FACTORY if name == EARLIER_FACTORY else name


Triple = Size
Section = Settings


class VolumeSection(Section):
    """Where a volume is and, if its file does not say so, how it lies in the world."""

    path: str
    """Container: zarr v2/v3, OME-Zarr or N5 (local path, s3://, gs://, https://), or a tif stack,
    h5, npz or npy file, which is imported once into the run folder."""

    dataset: str | None = None
    """Array inside the container (zarr, N5, h5) or key of an npz file."""

    level: NonNegativeInt | None = None
    """Resolution level of an OME-Zarr multiscale; 0 is full resolution."""

    voxel_size: Triple | None = None
    """Voxel size (z, y, x) in world units; needed where the file does not hold it, checked where
    it does."""

    offset: tuple[int, int, int] | None = None
    """World position (z, y, x) of the first voxel in world units, where the file does not say."""

    unit: Literal["nm", "angstrom", "pm"] = "nm"
    """World unit. World coordinates are whole numbers: a voxel of 4.2 nm needs `angstrom` (42)
    or `pm`; every volume of a run uses the same unit."""


class RoiSection(Section):
    """The part of the volume to process; blocks that touch it are processed whole."""

    offset: tuple[int, int, int]
    """First voxel, or first world coordinate, (z, y, x)."""

    shape: Triple
    """Extent (z, y, x) in the same units."""

    units: Literal["voxels", "world"] = "voxels"
    """`voxels` count from the first voxel of the volume; `world` is the volume's world unit."""


class InputSection(Section):
    """What is segmented."""

    raw: VolumeSection
    """The EM volume: 3-D, uint8, uint16 or float32 in [0, 1]."""

    mask: VolumeSection | None = None
    """Optional mask at any scale; blocks without a nonzero mask voxel are skipped."""

    roi: RoiSection | None = None
    """Optional part of the volume."""


class ModelSection(NetworkSettings):
    """The network that labels one block."""

    factory: Annotated[str, BeforeValidator(_present_factory)] = DEFAULT_FACTORY
    """`module:callable` that makes the predictor; another model can be put here. Its module is
    found through `PYTHONPATH` or an installed package, not in the current folder."""

    options: dict[str, Any] | None = None
    """Keyword arguments for a factory other than the default one."""


class BlocksSection(Section):
    """How the volume is cut into blocks (z, y, x), in voxels."""

    read_shape: Triple | None = None
    """What the network sees; default: the size the checkpoint was trained at."""

    before: Margin = (0, 0, 0)
    """Context read before the written part, per axis."""

    after: Margin = (1, 1, 1)
    """Context read after the written part, per axis; (0,0,0) and (1,1,1) is the published
    overlap of one voxel."""

    @model_validator(mode="after")
    def _write_shape_is_positive(self) -> "BlocksSection":
        if self.read_shape is not None:
            for axis, read, low, high in zip(
                "zyx", self.read_shape, self.before, self.after, strict=True
            ):
                if read <= low + high:
                    raise ValueError(
                        f"read_shape {read} on {axis} leaves nothing to write after the context "
                        f"{low} + {high}; enlarge read_shape or shrink before/after"
                    )
        return self


class WorkersSection(Section):
    """Prediction worker processes on this machine."""

    count: PositiveInt | Literal["auto"] = "auto"
    """Worker processes; `auto` is one per visible GPU, or one per CPU core that memory allows."""

    threads: PositiveInt = 1
    """CPU threads per worker for the network. Sums on a CPU depend in their last bits on the
    number of threads, so it is fixed for a run and does not follow the number of workers."""

    prefetch: PositiveInt = 2
    """Blocks read ahead per worker while another is computed."""

    retries: NonNegativeInt = 2
    """How often a failed block is tried again in the same run."""

    timeout_s: PositiveInt = 3600
    """A block that takes longer is given to another worker."""

    max_restarts: PositiveInt = 100
    """How many killed workers are replaced before the run is given up."""


class DaskSection(Section):
    """Where the stitch runs."""

    address: str | None = None
    """Address of a running scheduler (tcp:// or tls://); default: a local cluster. Its workers need
    this package and the run folder under the same path."""

    ca_file: File | None = None
    """For a tls:// address: PEM file of the authority that signed the scheduler's certificate."""

    cert_file: File | None = None
    """For a tls:// address: PEM file of this client's certificate."""

    key_file: File | None = None
    """For a tls:// address: PEM file of this client's private key."""

    workers: PositiveInt | None = None
    """Processes of the local cluster, one thread each; default: one per core."""

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> "DaskSection":
        files = (self.ca_file, self.cert_file, self.key_file)
        if any(files) and not all(files):
            raise ValueError("ca_file, cert_file and key_file go together")
        if any(files) and not (self.address or "").startswith("tls://"):
            raise ValueError("certificates are for an address that starts with tls://")
        return self


class StitchSection(Section):
    """How fragments of different blocks become segments."""

    across: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Affinity that a contact across a block border must exceed to count for a merge (published:
    0.7)."""

    within: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The same for contacts inside a block; at 1.0 (published) they only veto."""

    evidence: Literal["affinity", "overlap", "both"] = "affinity"
    """What speaks for a merge across a border: `affinity` (published); `overlap`: how well the
    labels of two blocks agree where both predicted; `both`: affinities, but a contact whose own
    overlap is below `overlap` only vetoes, like one inside a block."""

    overlap: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Intersection over union that labels of two blocks must exceed (`overlap` and `both`)."""

    min_contact: NonNegativeInt = 0
    """Border contacts of fewer touching voxel pairs are left out."""

    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Added to all thresholds of the score. A later stitch with a larger margin cuts the stored
    merges again, in seconds, instead of merging anew."""

    margin_floor: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Merge down to this margin, so that later stitches may use any margin from here on; default:
    the margin itself."""

    superblock: Triple | None = None
    """Blocks (z, y, x) of a leaf superblock of the hierarchical agglomeration; default: chosen from
    the number of blocks and workers. Never changes the result."""

    segment_ids: Literal["consecutive", "fragment"] = "consecutive"
    """Ids 1..n in the order of the smallest fragment id, or that fragment id itself."""

    min_size: NonNegativeInt = 0
    """Segments with fewer voxels become background (counted in the report); 0 keeps all."""

    allow_missing: bool = False
    """Stitch even when blocks failed or are missing; they stay background."""

    dask: DaskSection = DaskSection()
    """Scheduler and workers."""


class PyramidSection(Section):
    """Lower resolutions of the segmentation."""

    levels: Annotated[int, Field(ge=0, le=20)] | Literal["auto"] = "auto"
    """Levels beyond full resolution; `auto` stops when a level fits into one block."""

    downsampling: Literal["majority", "stride"] = "majority"
    """A coarse voxel takes the most frequent label of the voxels that it covers (`majority`), or
    that of the first of them (`stride`: quicker, with rougher borders)."""


class OutputSection(Section):
    """What is kept."""

    affinities: bool = False
    """Also keep the affinities (3 bytes per voxel before compression)."""


class EvaluateSection(Section):
    """Scores of the result against ground truth."""

    truth: VolumeSection
    """Ground-truth labels with the voxel size of the raw volume; 0 is ignored."""


class Config(Section):
    """A run of the pipeline."""

    run_dir: str
    """Folder of the run: journal, output volumes, reports. Relative to where the command runs."""

    input: InputSection
    """The volume, its mask and the part of it to process."""

    model: ModelSection = ModelSection()
    """The network."""

    blocks: BlocksSection = BlocksSection()
    """The block grid."""

    workers: WorkersSection = WorkersSection()
    """Prediction workers."""

    stitch: StitchSection = StitchSection()
    """Agglomeration of fragments into segments."""

    pyramid: PyramidSection = PyramidSection()
    """Multiscale output."""

    output: OutputSection = OutputSection()
    """What is kept besides fragments and segmentation."""

    ledger: LedgerSettings | None = None
    """Block progress in MongoDB. Without it, a URI in the environment variable AGQ_MONGO_URI is
    used; without that, the run folder alone is enough."""

    evaluate: EvaluateSection | None = None
    """Ground truth, if there is one."""

    slurm: SlurmSection | None = None
    """How `agq submit` runs it on a cluster."""


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read and check the configuration of a run; see `config.yaml_settings.load_yaml`."""
    return load_yaml(Config, path, overrides)


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Check the configuration of a run given as a mapping."""
    return parse_values(Config, data, source=source)


def masked(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data without any secret, for records and logs."""
    return config.model_dump(mode="json")
