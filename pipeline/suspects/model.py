"""The probability that a candidate is an error: a logistic function of a few features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from agq.blockwise.storage.files import write_atomic
from agq.errors import InputError
from agq.pipeline.suspects.candidates import FEATURES, Candidates
from agq.reading import read_json

_PENALTY = 1.0
"""Weight of the squares of the coefficients: a small truth must not make any of them large."""

LEAST = 20
"""Candidates, and errors among them, without which coefficients are not fitted."""


@dataclass(frozen=True)
class Logistic:
    """Coefficients of one kind of candidate.

    Attributes
    ----------
    mean, spread
        Of each feature where the coefficients were fitted.
    weights
        Of the features less their mean, in units of their spread.
    bias
        Log odds of a candidate with mean features.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def probability(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a probability for each row of features."""
        scaled = (features - np.array(self.mean)) / np.array(self.spread)
        result: NDArray[np.float64] = expit(scaled @ np.array(self.weights) + self.bias)
        return result

    @classmethod
    def fit(cls, features: NDArray[np.float64], wrong: NDArray[np.bool_]) -> Logistic:
        """Fit coefficients to candidates of which a truth says whether they are errors."""
        mean, spread = features.mean(axis=0), features.std(axis=0)
        spread[spread == 0] = 1.0
        scaled = np.column_stack([(features - mean) / spread, np.ones(len(features))])
        sign = np.where(wrong, 1.0, -1.0)

        def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            margin = sign * (scaled @ weights)
            value = np.logaddexp(0, -margin).sum() + _PENALTY / 2 * (weights[:-1] ** 2).sum()
            slope = -(sign * expit(-margin)) @ scaled
            slope[:-1] += _PENALTY * weights[:-1]
            return float(value), slope

        found = minimize(loss, np.zeros(scaled.shape[1]), jac=True, method="L-BFGS-B").x
        rounded = [
            tuple(round(float(v), 4) for v in values) for values in (mean, spread, found[:-1])
        ]
        return cls(rounded[0], rounded[1], rounded[2], round(float(found[-1]), 4))


@dataclass(frozen=True)
class Model:
    """Coefficients of both kinds, and where they were fitted."""

    kinds: Mapping[str, Logistic]
    source: str

    def probability(self, candidates: Candidates) -> NDArray[np.float64]:
        """Return the probability that each candidate is an error."""
        return self.kinds[candidates.kind].probability(candidates.features)

    def value(self, candidates: Candidates) -> NDArray[np.float64]:
        """Return what candidates are ranked by: squared probability times bits.

        The bits that mending a candidate is expected to be worth are the probability times those of
        an error; squared, because each look at what is none costs as much as one at an error.
        """
        return self.probability(candidates) ** 2 * candidates.gain

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        plain = {
            "source": self.source,
            "kinds": {
                kind: {"features": FEATURES[kind], **vars(model)}
                for kind, model in self.kinds.items()
            },
        }
        write_atomic(path, json.dumps(plain, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read what `save` has written.

        Raises
        ------
        InputError
            If it is not such a file, or of other features.
        """
        try:
            plain = read_json(path)
            kinds = {kind: _logistic(plain["kinds"][kind], kind) for kind in FEATURES}
            return cls(kinds, str(plain["source"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}: no coefficients of this release; `agq suspects RUN --calibrate` on a run "
                "with truth writes them"
            ) from None


DEFAULT: Final = Model(
    {
        "merge": Logistic(
            mean=(0.2018, 0.2506, 7.1836, 7.6384, 10.8189, 1.5108, 0.531, 1.7875, 0.0475, 0.7138),
            spread=(0.089, 0.0925, 0.9167, 1.1147, 1.3534, 0.8853, 0.6362, 0.9232, 0.2127, 0.4282),
            weights=(
                -0.6408,
                -0.2783,
                -0.2067,
                0.1134,
                -0.3739,
                0.2357,
                0.1597,
                0.5468,
                0.0335,
                0.1924,
            ),
            bias=-2.9407,
        ),
        "split": Logistic(
            mean=(
                -0.271,
                5.6228,
                8.5659,
                11.036,
                0.1398,
                -0.1631,
                -0.1753,
                0.9827,
                2.0691,
                0.2898,
                0.9102,
            ),
            spread=(
                0.1213,
                1.7143,
                1.7015,
                1.6967,
                0.1523,
                0.1327,
                0.1235,
                0.9322,
                1.0631,
                0.4537,
                0.2707,
            ),
            weights=(
                1.23,
                -0.0211,
                -0.8174,
                -0.1128,
                0.5386,
                0.1934,
                -0.6427,
                -0.2857,
                -0.1743,
                -0.2766,
                -0.2601,
            ),
            bias=-3.0116,
        ),
    },
    "AC4, sections 80 to 99, weights em (packaged)",
)
"""Coefficients where nothing else is given."""


def _logistic(plain: Mapping[str, Any], kind: str) -> Logistic:
    if tuple(plain["features"]) != FEATURES[kind]:
        raise ValueError(kind)
    columns = [tuple(map(float, plain[name])) for name in ("mean", "spread", "weights")]
    if any(len(column) != len(FEATURES[kind]) for column in columns):
        raise ValueError(kind)
    return Logistic(columns[0], columns[1], columns[2], float(plain["bias"]))
