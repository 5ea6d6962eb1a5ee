"""Scores of an exported checkpoint on held-out blocks, through the same path users run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage, sparse

from agq.model.predictor import AGQPredictor
from agq.model.training.config import TrainConfig
from agq.model.training.data.crops import TrainingVolume
from agq.model.training.data.targets import affinities_of, erode_borders, relabel_pieces


@dataclass(frozen=True)
class Score:
    """Mean scores over the validation blocks.

    Attributes
    ----------
    error : float
        Adapted Rand error, predicted background filled by the nearest label.
    error_as_is : float
        The same with predicted background as one segment.
    background : float
        Share of voxels predicted background.
    labels, truth : float
        Labels per block, predicted and true.
    affinity_accuracy : float
        Share of voxels and channels whose affinity is on the right side of one half.
    by_volume : dict of str to float
        `error` of each volume.
    """

    error: float
    error_as_is: float
    background: float
    labels: float
    truth: float
    affinity_accuracy: float
    by_volume: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it for the metrics file, keys prefixed by "val_"."""
        return {f"val_{key}": value for key, value in vars(self).items()}


def adapted_rand_error(labels: np.ndarray, truth: np.ndarray) -> float:
    """Return 1 - F of the Rand precision and recall (Arganda-Carreras et al. 2015).

    Label 0 of the truth is ignored; a predicted 0 counts as one segment, as in scikit-image.

    Parameters
    ----------
    labels, truth : numpy.ndarray
        Integer arrays of one shape.
    """
    inside = truth > 0
    if not inside.any():
        return 0.0
    rows = np.unique(truth[inside], return_inverse=True)[1]
    columns = np.unique(labels[inside], return_inverse=True)[1]
    table = sparse.coo_matrix((np.ones(len(rows)), (rows, columns))).tocsr()
    n = table.sum()
    pairs = table.multiply(table).sum() - n
    of_truth = np.square(table.sum(1)).sum() - n
    of_labels = np.square(table.sum(0)).sum() - n
    if of_truth + of_labels == 0:
        return 0.0
    return float(1.0 - 2.0 * pairs / (of_truth + of_labels))


def fill_background(labels: np.ndarray, voxel_size: tuple[float, float, float]) -> np.ndarray:
    """Give background voxels the label of the nearest labelled voxel (distance in nanometres)."""
    if not labels.any():
        return labels
    nearest = ndimage.distance_transform_edt(
        labels == 0, sampling=voxel_size, return_distances=False, return_indices=True
    )
    filled: np.ndarray = labels[tuple(nearest)]
    return filled


class Validator:
    """Blocks drawn from the validation volumes, read once; always the same for a seed.

    Their truth is connected pieces: what leaves the block and comes back is two objects.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        shape = config.crop or config.network.input_shape
        self.blocks: list[tuple[str, np.ndarray, np.ndarray]] = []
        # The first block of each volume as last scored, for pictures.
        self.samples: list[dict[str, np.ndarray]] = []
        for volume_config in config.validation:
            volume = TrainingVolume(volume_config)
            room = [max(0, n - size) for n, size in zip(volume.shape, shape, strict=True)]
            rng = np.random.default_rng([config.seed, len(self.blocks)])
            for _ in range(config.validation_crops):
                z, y, x = (int(rng.integers(n + 1)) for n in room)
                raw, truth = volume.read((z, y, x), shape)
                if volume.mask is not None:
                    truth = np.maximum(truth, 0)  # what is not valid is not scored either
                self.blocks.append((str(volume_config.container), raw, relabel_pieces(truth)))

    def score(self, checkpoint: Path) -> Score:
        """Run a checkpoint over all blocks and compare with the truth."""
        predictor = AGQPredictor(checkpoint, device=self.config.device)
        rows = []
        by_volume: dict[str, list[float]] = {}
        self.samples = []
        for name, raw, truth in self.blocks:
            (prediction,) = predictor.predict([raw])
            labels = prediction.labels
            filled = fill_background(labels, self.config.network.spacing)
            error = adapted_rand_error(filled, truth)
            if name not in by_volume:
                arrays = (raw, truth, labels, prediction.affinities)
                names = ("raw", "truth", "prediction", "affinities")
                self.samples.append(dict(zip(names, arrays, strict=True)))
            by_volume.setdefault(name, []).append(error)
            rows.append(
                (
                    error,
                    adapted_rand_error(labels, truth),
                    float((labels == 0).mean()),
                    prediction.n_labels,
                    len(np.unique(truth)) - 1,
                    _affinity_accuracy(prediction.affinities, truth),
                )
            )
        error, as_is, background, n_labels, true_labels, accuracy = (
            float(value) for value in np.mean(np.array(rows, dtype=np.float64), axis=0)
        )
        return Score(
            error=error,
            error_as_is=as_is,
            background=background,
            labels=n_labels,
            truth=true_labels,
            affinity_accuracy=accuracy,
            by_volume={name: float(np.mean(errors)) for name, errors in by_volume.items()},
        )


def _affinity_accuracy(affinities: np.ndarray, truth: np.ndarray) -> float:
    wanted = affinities_of(erode_borders(truth)) > 0.5
    return float(((affinities > 127) == wanted).mean())
