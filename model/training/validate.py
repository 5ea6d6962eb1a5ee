"""Scores of an exported checkpoint on held-out blocks, through the same path users run."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from skimage import metrics

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

    Label 0 of the truth is ignored; a predicted 0 counts as one segment. Without two voxels of one
    label there is no error.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error = float(metrics.adapted_rand_error(truth, labels)[0])
    return 0.0 if math.isnan(error) else error


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
        scores: list[dict[str, float]] = []
        by_volume: dict[str, list[float]] = {}
        self.samples = []
        for name, raw, truth in self.blocks:
            (prediction,) = predictor.predict([raw])
            labels, affinities = prediction.labels, prediction.affinities
            filled = fill_background(labels, self.config.network.spacing)
            if name not in by_volume:
                arrays = {"prediction": labels, "affinities": affinities}
                self.samples.append({"raw": raw, "truth": truth, **arrays})
            scores.append(
                {
                    "error": adapted_rand_error(filled, truth),
                    "error_as_is": adapted_rand_error(labels, truth),
                    "background": float((labels == 0).mean()),
                    "labels": prediction.n_labels,
                    "truth": len(np.unique(truth)) - 1,
                    "affinity_accuracy": _affinity_accuracy(affinities, truth),
                }
            )
            by_volume.setdefault(name, []).append(scores[-1]["error"])
        return Score(
            **{key: float(np.mean([score[key] for score in scores])) for key in scores[0]},
            by_volume={name: float(np.mean(errors)) for name, errors in by_volume.items()},
        )


def _affinity_accuracy(affinities: np.ndarray, truth: np.ndarray) -> float:
    wanted = affinities_of(erode_borders(truth)) > 0.5
    return float(((affinities > 127) == wanted).mean())
