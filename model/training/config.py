"""What `agq train` reads: one YAML, checked before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from agq.model.config import ModelConfig
from agq.model.recommended import Recommended
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
    mask: str | None = None
    """Path of an array that is nonzero where labels are valid; all by default."""
    weight: float = Field(1.0, gt=0, description="How often crops come from it, relatively.")
    synthetic: SyntheticConfig | None = None
    """`agq train` makes the container with these settings if it does not exist."""
    optional: bool = False
    """`agq train` leaves the volume out if the container does not exist."""


class Preset(Settings):
    """Settings that take one word for many values, alone or as `preset` beside other fields."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]]

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, given: object) -> object:
        if isinstance(given, str):
            given = {"preset": given}
        if not isinstance(given, Mapping) or "preset" not in given:
            return given
        rest = dict(given)
        name = rest.pop("preset")
        if name not in cls.PRESETS:
            raise ValueError(f"no preset {name!r}: there are {' and '.join(cls.PRESETS)}")
        return {**cls.PRESETS[name], **rest}


class AugmentConfig(Preset):
    """How crops are varied; every probability is per crop.

    `published` has the strengths of the published training, as far as they are known.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "published": {
            "gamma": 1.0,
            "gamma_chance": 0.75,
            "section_jitter": 0.0,
            "noise": 0.0,
            "missing_section": 0.0,
            "deleted_sections": 0.5,
            "misalignment": 0.5,
            "max_shift": 15,
            "rotation": 0.5,
            "warp": 0.5,
            "rescale": 0.25,
            "rescale_apart": True,
            "elastic_chance": 0.75,
            "elastic": 1.7,
            "blur": 0.0,
            "motion_blur": 0.5,
            "motion_blur_sections": 2,
            "missing_part": 0.0,
            "wide_parts": 0.9,
            "cut_blur": 0.5,
            "cut_noise": 0.75,
            "cut_noise_size": 0.3,
        }
    }

    flips: bool = Field(True, description="Mirror along z, y and x.")
    rotations: bool = Field(True, description="Rotate in-plane by multiples of 90 degrees.")
    turn_axes: bool = False
    """Also exchange z, y and x; for isotropic data and cubic crops."""
    contrast: float = Field(0.25, ge=0, lt=1, description="Largest relative change of contrast.")
    brightness: float = Field(0.15, ge=0, lt=1, description="Largest shift, 1 is white.")
    gamma: float = Field(0.3, ge=0, le=1, description="Gamma between 2^-g and 2^g.")
    gamma_chance: float = Field(1.0, ge=0, le=1, description="Chance of that gamma.")
    section_jitter: float = Field(0.1, ge=0, lt=1)
    """Largest extra change of brightness and contrast by section."""
    noise: float = Field(0.03, ge=0, lt=1, description="Largest standard deviation of noise.")
    missing_section: float = Field(0.1, ge=0, le=1, description="Chance of one blank section.")
    deleted_sections: float = Field(0.0, ge=0, le=1)
    """Chance that two sections are gone, labels and all."""
    misalignment: float = Field(0.2, ge=0, le=1, description="Chance of a jump between sections.")
    max_shift: int = Field(10, ge=0, description="Largest jump in voxels, in y and in x.")
    rotation: float = Field(0.0, ge=0, le=1)
    """Share of jumps that turn a section, by at most `max_shift` at its border."""
    warp: float = Field(0.5, ge=0, le=1)
    """Chance of rescaling and elastic deformation in-plane."""
    rescale: float = Field(0.2, ge=0, lt=1, description="Largest relative change of scale.")
    rescale_apart: bool = Field(False, description="Whether y and x are rescaled by themselves.")
    elastic_chance: float | None = Field(None, ge=0, le=1)
    """Chance of elastic deformation; null: whenever rescaled."""
    elastic: float = Field(4.0, ge=0, description="Largest elastic displacement in voxels.")
    blur: float = Field(0.1, ge=0, le=1, description="Chance of one section out of focus.")
    motion_blur: float = Field(0.1, ge=0, le=1, description="Chance of one smeared section.")
    motion_blur_sections: PositiveInt = Field(1, description="How many are smeared.")
    missing_part: float = Field(0.1, ge=0, le=1, description="Chance of a dark stripe.")
    wide_parts: float = Field(0.0, ge=0, le=1)
    """Chance that 42 % of every other section, at random, are its mean grey."""
    cut_blur: float = Field(0.1, ge=0, le=1, description="Chance of a box of lower resolution.")
    cut_noise: float = Field(0.1, ge=0, le=1, description="Chance of a box of noise.")
    cut_noise_size: float = Field(0.1, ge=0, le=1, description="Largest change by that noise.")


class LossWeights(Preset):
    """Weights and forms of the loss terms: `published` or `ours` in one word, or each by itself.

    The defaults are the published ones; `ours` is for short trainings of a small network.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "published": {},
        "ours": {
            "dice": 4.0,
            "cross_entropy": 0.6,
            "discrimination": 0.5,
            "samples": 384,
            "zero_background": 3.0,
            "background_weight": 4.0,
            "dice_mean": "pairs",
            "dice_on_borders": True,
            "features": "unit",
        },
    }

    dice: float = Field(3.0, ge=0, description="Of the overlap of masks with instances.")
    cross_entropy: float = Field(0.3, ge=0, description="Of the label of each voxel.")
    discrimination: float = Field(0.1, ge=0)
    """Of how far apart the mask features of different instances are."""
    affinity: float = Field(1.0, ge=0, description="Of the affinities.")
    zero_background: float = Field(0.0, ge=0)
    """Of a second cross-entropy, on the last prediction with a background logit of 0, as inference
    sets it. Not published; short runs need it to learn logits below 0."""
    background_weight: float = Field(1.0, gt=0)
    """Of background voxels in that second cross-entropy: a gap in a membrane joins two neurites, a
    hole in a neurite can be filled."""
    dice_mean: Literal["channels", "pairs"] = "channels"
    """Dice is summed over matched pairs and divided by all channels (1 + queries), as published, or
    by the pairs: four to eight times heavier, which short runs need."""
    dice_on_borders: bool = False
    """Whether dice also counts predictions on voxels that no instance claims whole; published:
    not."""
    features: Literal["raw", "unit"] = "raw"
    """Mask features that the discrimination loss sees: as the branch gives them, as published, or
    of unit length, which leaves the losses of the masks to lead short runs."""
    temperature: float = Field(0.3, gt=0, description="Temperature of the discrimination loss.")
    samples: int = Field(4096, ge=0, description="Voxels drawn for the discrimination loss.")
    exponent: float = Field(0.6, ge=0, le=1)
    """A voxel of an instance of s voxels is drawn with s^-exponent."""


class OptimizerConfig(Settings):
    """Adam with linear warm-up, then a cosine to zero."""

    learning_rate: float = Field(1e-4, gt=0, description="Of Adam, after the warm-up.")
    warmup_steps: int = Field(1000, ge=0, description="Steps until it is reached.")
    weight_decay: float = Field(1e-4, ge=0, description="Not of norms and biases.")
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this norm; null, as published: never."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Of the exported weights; 0, as published: none."""
    freeze_norm_after: float = Field(1.0, ge=0, le=1)
    """From this share of the schedule on, batch norms use their running statistics, as at
    inference. With one crop per step the statistics of a step differ from them."""


class TrainConfig(Settings):
    """A training run."""

    output: Path = Field(description="Folder for the state, the metrics and the exported model.")
    network: ModelConfig = Field(ModelConfig(), description="The network that is trained.")
    init_from: Path | None = None
    """Checkpoint of the same network to start from instead of at random."""
    volumes: list[VolumeConfig] = Field(min_length=1, description="What crops are taken from.")
    validation: list[VolumeConfig] = Field(default_factory=list)
    """Held-out volumes that the export is chosen by."""
    crop: Size | None = None
    """Crop (z, y, x) in voxels; the network's input_shape if absent."""
    pad: tuple[int, int, int] = (4, 64, 64)
    """How far crops may reach beyond a volume (filled by reflection)."""
    min_instance_voxels: int = Field(40, ge=1, description="Smaller instances get no mask.")
    recommended: Recommended = Recommended()
    """Settings that the exported model recommends for runs with it. What is not said here is taken
    from the checkpoint of `init_from`, if pieces are the same."""
    background_margin: float = 0.0
    """Lowers all query logits of the exported model by this much (raises them if negative), so that
    background wins where no query is surer than that. Much background leaves gaps, little joins
    neurites across membranes unless network.min_affinity cuts them."""
    augment: AugmentConfig = AugmentConfig()
    losses: LossWeights = LossWeights()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = Field(0, description="Decides the crops, their order and the first weights.")
    batch_size: PositiveInt = Field(1, description="Crops per step and process.")
    steps: PositiveInt = Field(200_000, description="Length of the schedule.")
    time_budget_minutes: float | None = Field(None, gt=0)
    """The schedule also ends after this much training time, whichever comes first; the learning
    rate then depends on the clock, so runs are not repeatable to the bit."""
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; weights are kept in fp32."""
    threads: PositiveInt | None = Field(None, description="CPU threads of torch.")
    loader_threads: PositiveInt = Field(1, description="Threads that prepare crops.")
    checkpoint_minutes: float = Field(10.0, gt=0, description="Time between saved states.")
    validate_minutes: float = Field(15.0, gt=0, description="Time between validations.")
    validation_crops: PositiveInt = Field(4, description="Crops per validation volume.")
    log_every: PositiveInt = Field(20, description="Steps between lines of metrics.jsonl.")
    tensorboard: bool = False
    """Also write scalars and pictures for TensorBoard (pip extra `train`)."""
