"""What a worker reads and writes of one block."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.label_pairs import MaskAgreement
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.predict.predictor import Prediction
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.volumes.open import Volume, open_volume
from agq.errors import InputError


class BlockError(Exception):
    """A block whose data cannot be used; the message says why."""


@dataclass(frozen=True)
class BlockFiles:
    """The input and the outputs of a run, open; shared by the threads of a worker."""

    raw: Volume
    writer: BlockWriter

    @classmethod
    def open(cls, spec: PredictSpec, run_dir: Path) -> "BlockFiles":
        """Open the raw volume and the output arrays, which must exist.

        Raises
        ------
        InputError
            If one is missing, or does not fit the grid.
        """
        grid = spec.block_grid()
        raw = open_volume(**spec.raw)
        if raw.shape != grid.volume_shape:
            raise InputError(
                f"{raw.name} has {raw.shape} voxels, but the run was made for {grid.volume_shape}; "
                "use another run folder or start over with --overwrite"
            )
        return cls(raw, BlockWriter.open(run_dir, grid, affinities=spec.affinities))

    @property
    def grid(self) -> BlockGrid:
        """The blocks of the whole volume."""
        return self.writer.grid

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.writer.folder

    def read(self, number: int) -> npt.NDArray[Any]:
        """Read the raw voxels of a block, (z, y, x), always of the grid's `read_shape`.

        Where the volume is smaller than the window, it is continued by reflection behind its end.

        Raises
        ------
        BlockError
            If values are NaN or infinite. Errors of the storage pass through.
        """
        raw = self.raw.read(*self.grid.read_box(number))
        if raw.dtype.kind == "f" and not (finite := np.isfinite(raw)).all():
            bad = int(raw.size - np.count_nonzero(finite))
            raise BlockError(f"raw has {bad} NaN or infinite of {raw.size} voxels")
        missing = [(0, want - n) for want, n in zip(self.grid.read_shape, raw.shape, strict=True)]
        return np.pad(raw, missing, mode="reflect") if any(m for _, m in missing) else raw

    def write(self, number: int, prediction: Prediction) -> dict[str, str]:
        """Write the outputs of a block durably; return a checksum of each.

        Parameters
        ----------
        number
            Block number.
        prediction
            Over the `read_shape` of the grid.

        Raises
        ------
        BlockError
            If the prediction has a wrong shape or type.
        """
        labels, affinities = self._checked(number, prediction)
        memberships = getattr(prediction, "memberships", None)
        try:
            agreement = None
            if memberships is not None:
                weight = float(getattr(prediction, "mask_weight", 0))
                agreement = MaskAgreement(np.asarray(memberships), weight)
            return self.writer.write(number, labels, affinities, agreement=agreement)
        except InputError as error:
            raise BlockError(f"the predictor's answer cannot be used: {error}") from None

    def _checked(
        self, number: int, prediction: Prediction
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """Return labels and affinities over the read box, without padding."""
        labels, affinities = np.asarray(prediction.labels), np.asarray(prediction.affinities)
        shape = self.grid.read_shape
        if labels.shape != shape or affinities.shape != (3, *shape):
            raise BlockError(
                f"the predictor returned labels {labels.shape} and affinities {affinities.shape} "
                f"for a block of {shape}"
            )
        if labels.dtype not in (np.uint16, np.uint32) or affinities.dtype != np.uint8:
            raise BlockError(
                f"the predictor returned labels of {labels.dtype} and affinities of "
                f"{affinities.dtype}; uint16 or uint32, and uint8, are expected"
            )
        start, stop = self.grid.read_box(number)
        z, y, x = (slice(0, hi - lo) for lo, hi in zip(start, stop, strict=True))
        return labels[z, y, x], affinities[:, z, y, x]
