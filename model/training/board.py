"""Scalars and pictures for TensorBoard."""

from pathlib import Path
from typing import Any

import numpy as np

from agq.errors import InputError


class Board:
    """Writes what TensorBoard shows; does nothing without a folder.

    Raises
    ------
    InputError
        If a folder is given and tensorboard is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "tensorboard: true needs TensorBoard: pip install 'agq-pipeline[train]'"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, line: dict[str, Any]) -> None:
        """Show the numbers of a line of metrics at its `step`."""
        if self._writer is None:
            return
        for key, value in line.items():
            if isinstance(value, int | float) and key != "step":
                group = "validation" if key.startswith("val_") else "training"
                self._writer.add_scalar(f"{group}/{key}", value, line["step"])
        self._writer.flush()

    def pictures(self, step: int, samples: list["dict[str, np.ndarray]"]) -> None:
        """Show the middle section of samples: each array of a sample beside the next.

        Parameters
        ----------
        samples : list of dict
            Arrays by name: uint8 (z, y, x) greys, uint8 (3, z, y, x) affinities, or other
            integers (z, y, x): labels.
        """
        if self._writer is None:
            return
        for number, sample in enumerate(samples):
            row = np.concatenate([_picture(array) for array in sample.values()], axis=1)
            name = f"validation/{number}: {', '.join(sample)}"
            self._writer.add_image(name, row, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _picture(array: np.ndarray) -> np.ndarray:
    """Return the middle section as (y, x, 3) uint8."""
    middle = array[..., array.shape[-3] // 2, :, :]
    if array.ndim == 4:
        return np.moveaxis(middle, 0, -1)
    if array.dtype == np.uint8:
        return np.repeat(middle[..., None], 3, axis=-1)
    # A colour per label that is the same in every picture; 0 is black.
    mixed = middle.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    parts = [(mixed >> np.uint64(shift)) & np.uint64(0xFF) for shift in (56, 48, 40)]
    return np.where(middle[..., None] > 0, np.stack(parts, -1) // 2 + 64, 0).astype(np.uint8)
