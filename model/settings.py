"""The settings of a predictor: what of the network a run may choose, and what that decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from agq.model.config import Flips, ModelConfig, Pieces, SeedOrder
from agq.settings import Settings

if TYPE_CHECKING:
    from agq.model.checkpoint import LoadedCheckpoint

Precision = Literal["fp32", "bf16", "fp16"]


class NetworkSettings(Settings):
    """The network that labels one block.

    A field that `ModelConfig` has too overrides that of the checkpoint, unless it is None.
    """

    checkpoint: str = "demo"
    """A safetensors file of ours, a published .pth.tar, or packaged weights: `em` for EM of serial
    sections, `demo` for synthetic volumes. A run takes what the checkpoint recommends where the
    configuration says nothing (`agq checkpoint show`)."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` (one GPU per worker) or `mps`."""

    precision: Precision = "fp32"
    """fp32 is the reference; the others are faster on GPUs and may move a few voxels."""

    batch_size: PositiveInt = 1
    """Blocks that the network gets at once; does not change the result. From 2 on, a GPU convolves
    one while its host looks for seeds in another."""

    seed_order: SeedOrder | None = None
    """Which components become queries when there are more than the limit; default: as trained."""

    max_seeds: PositiveInt | None = None
    """Limit of affinity-guided queries per block; default: as trained. What it drops is counted."""

    min_affinity: Annotated[float, Field(ge=0, le=1)] | None = None
    """Cut masks where the mean affinity of a voxel is below this; default: as the checkpoint says
    (published: 0, never). Helps a network whose masks are less mature than its affinities,
    together with `stitch.within` below 1."""

    flips: Flips | None = None
    """Average affinities over 1, 4 or 8 mirror images of a block; default: as trained."""

    pieces: Pieces | None = None
    """What a block is cut into: its `masks`, as published, or `supervoxels` by affinities alone, of
    which the masks say what belongs together. Helps a network whose masks are vague; needs
    `stitch.within` below 1. Default: as the checkpoint recommends, or else says."""

    mask_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """For supervoxels: weight of the masks against the affinities; default: as the checkpoint
    recommends, or else says (0.3)."""


class PredictorSettings(NetworkSettings):
    """Everything an `AGQPredictor` is told; a worker gets it as the options of `predict.json`."""

    threads: PositiveInt | None = None
    """Threads torch uses on the CPU, in the whole process; default: torch's own choice."""

    def network(self, trained: ModelConfig) -> ModelConfig:
        """Return the configuration of a checkpoint with what these settings override."""
        changes = self.model_dump(include=set(ModelConfig.model_fields), exclude_none=True)
        return ModelConfig.from_values(trained.model_dump() | changes, "predictor settings")

    def identity(self, checkpoint: LoadedCheckpoint) -> dict[str, Any]:
        """Return what decides a block's bytes: runs that differ in it have no block in common.

        That is every setting, as it is after the checkpoint's defaults, but those that cannot
        change a result.
        """
        network = self.network(checkpoint.config)
        values = {
            name: getattr(network, name, value)
            for name, value in self
            if name not in ("checkpoint", "batch_size")
        }
        # Records of earlier releases lack what came later. Their runs go on where it does nothing.
        if network.flips == "none":
            del values["flips"]
        if network.pieces == "masks":
            del values["pieces"], values["mask_weight"]
        return {"checkpoint_sha256": checkpoint.sha256, **values}
