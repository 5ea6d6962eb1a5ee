"""What `agq train` reads: one YAML, checked before anything starts."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from agq.model.config import ModelConfig
from agq.settings import Settings, Size


class SyntheticConfig(Settings):
    """A synthetic volume, as `agq synthetic` makes it."""

    shape: Size = Field(description="Voxels (z, y, x).")
    seed: int = Field(0, description="The same seed gives the same volume.")


class VolumeConfig(Settings):
    """One annotated volume: a zarr container with a raw and a label array, axes (z, y, x)."""

    container: Path = Field(description="Folder of the zarr container.")
    raw: str = Field("raw", description="Path of the raw array (uint8) inside the container.")
    labels: str = Field("labels", description="Path of the label array (integers, 0 background).")
    mask: str | None = Field(
        None, description="Path of an array that is nonzero where labels are valid; all by default."
    )
    weight: float = Field(1.0, gt=0, description="How often crops come from it, relatively.")
    synthetic: SyntheticConfig | None = Field(
        None,
        description="`agq train` makes the container with these settings if it does not exist.",
    )
    optional: bool = Field(
        False,
        description="`agq train` leaves the volume out if the container does not exist.",
    )


class AugmentConfig(Settings):
    """How crops are varied; every probability is per crop."""

    flips: bool = Field(True, description="Mirror along z, y and x.")
    rotations: bool = Field(True, description="Rotate in-plane by multiples of 90 degrees.")
    turn_axes: bool = Field(
        False, description="Also exchange z, y and x; for isotropic data and cubic crops."
    )
    contrast: float = Field(0.25, ge=0, lt=1, description="Largest relative change of contrast.")
    brightness: float = Field(0.15, ge=0, lt=1, description="Largest shift, 1 is white.")
    gamma: float = Field(0.3, ge=0, lt=1, description="Gamma between 2^-g and 2^g.")
    section_jitter: float = Field(
        0.1, ge=0, lt=1, description="Largest extra change of brightness and contrast by section."
    )
    noise: float = Field(0.03, ge=0, lt=1, description="Largest standard deviation of noise.")
    missing_section: float = Field(0.1, ge=0, le=1, description="Chance of one blank section.")
    misalignment: float = Field(0.2, ge=0, le=1, description="Chance of a jump between sections.")
    max_shift: int = Field(10, ge=0, description="Largest jump in voxels, in y and in x.")
    warp: float = Field(
        0.5, ge=0, le=1, description="Chance of rescaling and elastic deformation in-plane."
    )
    rescale: float = Field(0.2, ge=0, lt=1, description="Largest relative change of scale.")
    elastic: float = Field(4.0, ge=0, description="Largest elastic displacement in voxels.")
    blur: float = Field(0.1, ge=0, le=1, description="Chance of one section out of focus.")
    motion_blur: float = Field(0.1, ge=0, le=1, description="Chance of one smeared section.")
    missing_part: float = Field(0.1, ge=0, le=1, description="Chance of a dark stripe.")
    cut_blur: float = Field(0.1, ge=0, le=1, description="Chance of a box of lower resolution.")
    cut_noise: float = Field(0.1, ge=0, le=1, description="Chance of a box of noise.")


class LossWeights(Settings):
    """Weights of the loss terms; the defaults are the published ones."""

    dice: float = Field(3.0, ge=0)
    cross_entropy: float = Field(0.3, ge=0)
    discrimination: float = Field(0.1, ge=0)
    affinity: float = Field(1.0, ge=0)
    zero_background: float = Field(
        0.0,
        ge=0,
        description=(
            "Of a second cross-entropy, on the last prediction with a background logit of 0, as "
            "inference sets it. Not published; short runs need it to learn logits below 0."
        ),
    )
    background_weight: float = Field(
        1.0,
        gt=0,
        description=(
            "Of background voxels in that second cross-entropy: a gap in a membrane joins two "
            "neurites, a hole in a neurite can be filled."
        ),
    )
    temperature: float = Field(0.3, gt=0, description="Temperature of the discrimination loss.")
    samples: int = Field(4096, ge=0, description="Voxels drawn for the discrimination loss.")
    exponent: float = Field(
        0.6, ge=0, le=1, description="A voxel of an instance of s voxels is drawn with s^-exponent."
    )


class OptimizerConfig(Settings):
    """Adam with linear warm-up, then a cosine to zero."""

    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(1000, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Of the weights that are exported.")
    freeze_norm_after: float = Field(
        1.0,
        ge=0,
        le=1,
        description=(
            "From this share of the schedule on, batch norms use their running statistics, as at "
            "inference. With one crop per step the statistics of a step differ from them."
        ),
    )


class TrainConfig(Settings):
    """A training run."""

    output: Path = Field(description="Folder for the state, the metrics and the exported model.")
    network: ModelConfig = ModelConfig()
    init_from: Path | None = Field(
        None, description="Checkpoint of the same network to start from instead of at random."
    )
    volumes: list[VolumeConfig] = Field(min_length=1, description="What crops are taken from.")
    validation: list[VolumeConfig] = Field(
        default_factory=list, description="Held-out volumes that the export is chosen by."
    )
    crop: Size | None = Field(
        None, description="Crop (z, y, x) in voxels; the network's input_shape if absent."
    )
    pad: tuple[int, int, int] = Field(
        (4, 64, 64), description="How far crops may reach beyond a volume (filled by reflection)."
    )
    min_instance_voxels: int = Field(40, ge=1, description="Smaller instances get no mask.")
    background_margin: float = Field(
        0.0,
        description=(
            "Lowers all query logits of the exported model by this much (raises them if negative), "
            "so that background wins where no query is surer than that. Much background leaves "
            "gaps, little joins neurites across membranes unless network.min_affinity cuts them."
        ),
    )
    augment: AugmentConfig = AugmentConfig()
    losses: LossWeights = LossWeights()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = 0
    batch_size: PositiveInt = 1
    steps: PositiveInt = Field(200_000, description="Length of the schedule.")
    time_budget_minutes: float | None = Field(
        None,
        gt=0,
        description=(
            "The schedule also ends after this much training time, whichever comes first; the "
            "learning rate then depends on the clock, so runs are not repeatable to the bit."
        ),
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: PositiveInt | None = Field(None, description="CPU threads of torch.")
    loader_threads: PositiveInt = Field(1, description="Threads that prepare crops.")
    checkpoint_minutes: float = Field(10.0, gt=0, description="Time between saved states.")
    validate_minutes: float = Field(15.0, gt=0, description="Time between validations.")
    validation_crops: PositiveInt = Field(4, description="Crops per validation volume.")
    log_every: PositiveInt = Field(20, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = Field(
        False, description="Also write scalars and pictures for TensorBoard (pip extra `train`)."
    )
