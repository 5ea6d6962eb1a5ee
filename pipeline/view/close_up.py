"""Small pictures of suspects: raw, the segments as they are, and as they would be if mended."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate, Roi
from matplotlib.image import imsave

from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.volumes.open import Volume
from agq.errors import InputError
from agq.pipeline.config.schema import Config
from agq.pipeline.suspects.candidates import MERGE
from agq.pipeline.suspects.find import Suspect
from agq.pipeline.suspects.listed import picture_of
from agq.pipeline.view.layers import LazyVolume, config_layers
from agq.pipeline.view.picture import Plane, at_borders, stretched

PIXELS: Final = 224
"""Voxels of the section that are shown along y and x at most."""

_COLOURS: Final = np.array([(0.0, 0.0, 0.0), (1.0, 0.6, 0.15), (0.15, 0.7, 1.0)])
_OPACITY: Final = 0.4
_GAP: Final = 6
_RING: Final = (7.0, 9.0)


def draw_suspects(
    config: Config, suspects: Sequence[Suspect], on_progress: Callable[[int, int], None]
) -> int:
    """Draw suspects into the run folder, in the place of those drawn before; return how many.

    `on_progress` is called with pictures drawn and pictures in all. Labels are drawn on black where
    no raw volume can be opened.
    """
    run_dir = Path(config.run_dir)
    folder = (run_dir / picture_of(1)).parent
    if folder.is_dir():
        for old in folder.glob("*.png"):
            old.unlink()
    if not suspects:
        return 0
    layers = config_layers(config)
    volumes = {
        layer.name: layer.data.volume
        for layer in layers
        if layer.name in ("raw", "fragments", "segmentation") and isinstance(layer.data, LazyVolume)
    }
    close_ups = CloseUps(volumes)
    make_folder(folder)
    on_progress(0, len(suspects))
    for rank, suspect in enumerate(suspects, 1):
        write_atomic(run_dir / picture_of(rank), close_ups.draw(suspect))
        on_progress(rank, len(suspects))
    return len(suspects)


@dataclass(frozen=True)
class CloseUps:
    """Draws suspects of one run.

    Parameters
    ----------
    volumes
        ``fragments`` and ``segmentation``, and ``raw`` if there is one, at full resolution.
    """

    volumes: Mapping[str, Volume]

    def __post_init__(self) -> None:
        for name in ("fragments", "segmentation"):
            if name not in self.volumes:
                raise InputError(f"pictures of suspects: the run has no {name}")

    def draw(self, suspect: Suspect) -> bytes:
        """Return three panels side by side as PNG: raw, now, mended.

        A contact between two sections is shown in a section across them. Both sides of the suspect
        are coloured, the borders of all other segments are lines; without a raw volume they lie on
        black. Equal suspects give equal bytes.
        """
        plane = self._plane(suspect)
        images = {name: plane.read(volume) for name, volume in self.volumes.items()}
        segments = images["segmentation"]
        grey = stretched(images["raw"] if "raw" in images else np.zeros_like(segments, np.uint8))
        now = self._sides(segments, suspect.segments)
        if suspect.kind == MERGE:
            if suspect.side is None:
                raise ValueError("the sides of this suspect are not known")
            mended = np.where((now == 1) & np.isin(images["fragments"], suspect.side), 2, now)
        else:
            mended = np.minimum(now, 1)
        borders = at_borders(segments) & (segments != 0)
        panels = [grey, *(_coloured(grey, sides, borders) for sides in (now, mended))]
        stretch = self._stretch(plane)
        ring = self._ring(plane, suspect, stretch)
        shown = []
        for panel in panels:
            image = np.repeat(np.repeat(panel, stretch[0], axis=0), stretch[1], axis=1)
            image[ring] = 1.0
            shown += [image, np.ones((image.shape[0], _GAP, 3))]
        buffer = io.BytesIO()
        imsave(buffer, np.concatenate(shown[:-1], axis=1), format="png")
        return buffer.getvalue()

    def _plane(self, suspect: Suspect) -> Plane:
        """Return the plane around a suspect, moved into the volume where it would leave it."""
        base = self.volumes["segmentation"]
        size = base.voxel_size
        axis, name = (1, "xz") if suspect.axis == 0 else (0, "xy")
        reach = PIXELS * min(size[1], size[2])
        low, shape = [], []
        for k in range(3):
            begin = (suspect.world[k] - base.offset[k]) // size[k]
            count = 1 if k == axis else min(base.shape[k], max(1, reach // size[k]))
            low.append(int(max(0, min(begin - count // 2, base.shape[k] - count))))
            shape.append(int(count))
        roi = Roi(base.offset + Coordinate(low) * size, Coordinate(shape) * size)
        return Plane(roi, size, axis, name)

    @staticmethod
    def _sides(labels: npt.NDArray[Any], segments: tuple[int, ...]) -> npt.NDArray[np.int64]:
        return sum(
            (number * (labels == np.uint64(one)) for number, one in enumerate(segments, 1)),
            start=np.zeros(labels.shape, np.int64),
        )

    @staticmethod
    def _stretch(plane: Plane) -> tuple[int, int]:
        """Return how often rows and columns are repeated, so that voxels have their proportions."""
        rows, columns = (plane.voxel_size[k] for k in range(3) if k != plane.axis)
        least = min(rows, columns)
        return max(1, round(rows / least)), max(1, round(columns / least))

    @staticmethod
    def _ring(plane: Plane, suspect: Suspect, stretch: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Return where a ring around the place of the suspect is drawn."""
        kept = [k for k in range(3) if k != plane.axis]
        shape = [
            int(plane.roi.shape[k] // plane.voxel_size[k]) * n
            for k, n in zip(kept, stretch, strict=True)
        ]
        middle = [
            (suspect.world[k] - plane.roi.begin[k]) / plane.voxel_size[k] * n
            for k, n in zip(kept, stretch, strict=True)
        ]
        rows, columns = np.ogrid[: shape[0], : shape[1]]
        away = np.hypot(rows + 0.5 - middle[0], columns + 0.5 - middle[1])
        inside: npt.NDArray[np.bool_] = (away >= _RING[0]) & (away <= _RING[1])
        return inside


def _coloured(
    grey: npt.NDArray[np.float64], sides: npt.NDArray[np.int64], borders: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    opacity = np.where(sides > 0, _OPACITY, 0.0)[..., None]
    image = grey * (1 - opacity) + _COLOURS[sides] * opacity
    image[borders] = 0.5 * image[borders] + 0.5
    image[at_borders(sides) & (sides != 0)] = 0.15
    return image
