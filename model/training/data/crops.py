"""Random crops out of annotated zarr volumes, made ahead of time in background threads.

Everything of step s is drawn from a generator seeded by (seed, s, item): a resumed run sees the
crops that the undisturbed run would have seen.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr

from agq.errors import InputError
from agq.model.training.config import TrainConfig, VolumeConfig
from agq.model.training.data.augment import augment, spare_sections
from agq.model.training.data.augment import margin as augment_margin
from agq.model.training.data.targets import Targets, make_targets
from agq.stores import RegularFiles

Shape = tuple[int, int, int]


class TrainingVolume:
    """A raw and a label array, opened lazily; only crops are ever read.

    Raises
    ------
    InputError
        If an array is missing, not 3-D, of a wrong type, or the shapes differ.
    """

    def __init__(self, config: VolumeConfig) -> None:
        self.config = config
        self.raw = self._open(config.raw)
        self.labels = self._open(config.labels)
        self.mask = None if config.mask is None else self._open(config.mask)
        for name, array in ((config.mask, self.mask), (config.labels, self.labels)):
            if array is not None and array.shape != self.raw.shape:
                raise InputError(
                    f"{config.container}: {config.raw} has shape {self.raw.shape}, "
                    f"{name} {array.shape}; they must cover the same voxels"
                )
        if self.raw.dtype != np.uint8:
            raise InputError(
                f"{config.container}/{config.raw} is {self.raw.dtype}; training reads uint8"
            )
        if self.labels.dtype.kind not in "ui":
            raise InputError(
                f"{config.container}/{config.labels} is {self.labels.dtype}; labels are integers"
            )

    def _open(self, name: str) -> zarr.Array[Any]:
        path = self.config.container / name
        try:
            store = RegularFiles(self.config.container, read_only=True)
            array = zarr.open_array(store, path=name, mode="r")
        except (FileNotFoundError, zarr.errors.BaseZarrError) as error:
            raise InputError(f"no zarr array at {path}; check container and name") from error
        except Exception as error:  # of whatever type zarr raises over damaged metadata
            raise InputError(f"{path}: the array cannot be opened ({error})") from error
        if array.ndim != 3:
            raise InputError(f"{path} has {array.ndim} axes; a training volume has 3 (z,y,x)")
        return array

    @property
    def shape(self) -> Shape:
        """Voxels on each axis (z, y, x)."""
        z, y, x = self.raw.shape
        return (z, y, x)

    def read(self, start: Shape, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
        """Read a box, reflected where it reaches beyond the volume.

        Parameters
        ----------
        start : tuple of int
            First voxel (z, y, x); may be negative.

        Returns
        -------
        raw, labels : numpy.ndarray
            uint8, and the labels' own type, both of the shape asked for. With a mask, labels are
            int64: the crop's own numbers, 0 still 0, and -1 where they are not valid.
        """
        stop = [a + n for a, n in zip(start, shape, strict=True)]
        low = [min(max(a, 0), n - 1) for a, n in zip(start, self.shape, strict=True)]
        high = [max(min(b, n), 1) for b, n in zip(stop, self.shape, strict=True)]
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        width = [(a - s, e - b) for a, s, e, b in zip(low, start, stop, high, strict=True)]
        try:
            raw, labels = np.asarray(self.raw[box]), np.asarray(self.labels[box])
            valid = None if self.mask is None else np.asarray(self.mask[box]) != 0
        except InputError:
            raise
        except Exception as error:  # of whatever type a codec raises
            raise InputError(
                f"{self.config.container}: voxels {low} to {high} cannot be read "
                f"({type(error).__name__}: {error})"
            ) from error
        if valid is not None:
            ids, compact = np.unique(labels, return_inverse=True)
            numbered = compact.reshape(labels.shape).astype(np.int64) + int(ids[0] != 0)
            labels = np.where(valid, numbered, -1)
        return np.pad(raw, width, mode="reflect"), np.pad(labels, width, mode="reflect")


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes
    ----------
    raw : torch.Tensor
        (B, 1, z, y, x) float32, normalised to [-1, 1].
    targets : list of Targets
        One per item.
    """

    step: int
    raw: torch.Tensor
    targets: list[Targets]


def normalize(raw: np.ndarray) -> torch.Tensor:
    """Turn (z, y, x) greys in [0, 1] into the (1, z, y, x) float32 the network expects."""
    return torch.from_numpy((raw.astype(np.float32) - 0.5) / 0.5)[None]


class CropSource:
    """Makes the batch of any step.

    Parameters
    ----------
    rank : int
        Of this process: each makes other items of the same step.

    Raises
    ------
    InputError
        If a volume cannot be used.
    """

    def __init__(self, config: TrainConfig, rank: int = 0) -> None:
        self.config = config
        self.first_item = rank * config.batch_size
        self.shape: Shape = config.crop or config.network.input_shape
        self.volumes = [TrainingVolume(volume) for volume in config.volumes]
        weights = np.array([volume.weight for volume in config.volumes])
        self.chances = weights / weights.sum()

    def crop(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw an augmented crop: raw float32 in [0, 1] and labels (z, y, x), -1 if not valid."""
        volume = self.volumes[int(rng.choice(len(self.volumes), p=self.chances))]
        margin = augment_margin(self.shape, self.config.augment)
        start = []
        for size, n, pad in zip(self.shape, volume.shape, self.config.pad, strict=True):
            last = n + pad - size
            start.append(int(rng.integers(-pad, last + 1)) if last > -pad else (n - size) // 2)
        z, y, x = self.shape
        raw, labels = volume.read(
            (start[0], start[1] - margin, start[2] - margin),
            (z + spare_sections(self.config.augment), y + 2 * margin, x + 2 * margin),
        )
        return augment(raw, labels, self.shape, self.config.augment, rng)

    def batch(self, step: int) -> Batch:
        """Make the batch of a step, the same one whenever it is asked for."""
        raws, targets = [], []
        for item in range(self.config.batch_size):
            rng = np.random.default_rng([self.config.seed, step, self.first_item + item])
            raw, labels = self.crop(rng)
            valid = None
            if labels.min() < 0:
                valid = labels >= 0
                labels = np.where(valid, labels, 0)
            raws.append(normalize(raw))
            targets.append(
                make_targets(
                    labels,
                    isotropic=self.config.network.isotropy[1],
                    min_voxels=self.config.min_instance_voxels,
                    samples=self.config.losses.samples,
                    exponent=self.config.losses.exponent,
                    rng=rng,
                    valid=valid,
                )
            )
        return Batch(step, torch.stack(raws), targets)

    def batches(self, first: int, stop: int, threads: int) -> Generator[Batch]:
        """Yield the batches of steps first..stop-1 in order, made ahead by threads.

        Parameters
        ----------
        threads : int
            Threads; two batches per thread are kept ready.
        """
        pool = ThreadPoolExecutor(threads, thread_name_prefix="crops")
        waiting: deque[Future[Batch]] = deque()
        steps = iter(range(first, stop))
        try:
            for step in steps:
                waiting.append(pool.submit(self.batch, step))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
