"""The probability that a candidate is an error: a logistic function of a few features.

It has their squares and products too: a thin contact, say, speaks against large sides only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from agq.blockwise.storage.files import write_atomic
from agq.errors import InputError
from agq.pipeline.suspects.candidates import FEATURES, Candidates
from agq.reading import read_json

_PENALTY = 30.0
"""Weight of the squares of the coefficients: a small truth must not make any of them large."""

_BY_GAIN = 0.25
"""Power of the gain by which candidates count in a fit: large errors matter more."""

_CAUTION = 4
"""Power of the probability in the order of the list; of 2 to 5, 4 found most errors on AC4."""

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
        Of the features less their mean, in units of their spread, then of their products.
    bias
        Log odds of a candidate with mean features.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def probability(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return a probability for each row of features."""
        terms = _terms(features, np.array(self.mean), np.array(self.spread))
        result: NDArray[np.float64] = expit(terms @ np.array((*self.weights, self.bias)))
        return result

    @classmethod
    def fit(
        cls,
        features: NDArray[np.float64],
        wrong: NDArray[np.bool_],
        gain: NDArray[np.float64],
    ) -> Logistic:
        """Fit coefficients to candidates of which a truth says whether they are errors."""
        mean, spread = features.mean(axis=0), features.std(axis=0)
        spread[spread == 0] = 1.0
        terms = _terms(features, mean, spread)
        sign = np.where(wrong, 1.0, -1.0)
        count = gain**_BY_GAIN / (gain**_BY_GAIN).mean()

        def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            margin = sign * (terms @ weights)
            value = count @ np.logaddexp(0, -margin) + _PENALTY / 2 * (weights[:-1] ** 2).sum()
            slope = -(count * sign * expit(-margin)) @ terms
            slope[:-1] += _PENALTY * weights[:-1]
            return float(value), slope

        options = {"maxiter": 2000}
        start = np.zeros(terms.shape[1])
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
        rounded = [
            tuple(round(float(v), 4) for v in values) for values in (mean, spread, found[:-1])
        ]
        return cls(rounded[0], rounded[1], rounded[2], round(float(found[-1]), 4))


def _terms(
    features: NDArray[np.float64], mean: NDArray[np.float64], spread: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return scaled features, their products of two, and 1."""
    scaled = (features - mean) / spread
    i, j = np.triu_indices(scaled.shape[1])
    return np.column_stack([scaled, scaled[:, i] * scaled[:, j], np.ones(len(scaled))])


@dataclass(frozen=True)
class Model:
    """Coefficients of both kinds, and where they were fitted."""

    kinds: Mapping[str, Logistic]
    source: str

    def probability(self, candidates: Candidates) -> NDArray[np.float64]:
        """Return the probability that each candidate is an error."""
        return self.kinds[candidates.kind].probability(candidates.features)

    def value(self, candidates: Candidates) -> NDArray[np.float64]:
        """Return what candidates are ranked by: bits times the fourth power of the probability.

        The bits that mending a candidate is expected to be worth have its first power; a higher one
        prefers what is likely, because each look at what is no error costs as much as one that is.
        """
        return self.probability(candidates) ** _CAUTION * candidates.gain

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


def _logistic(plain: Mapping[str, Any], kind: str) -> Logistic:
    if tuple(plain["features"]) != FEATURES[kind]:
        raise ValueError(kind)
    columns = [tuple(map(float, plain[name])) for name in ("mean", "spread", "weights")]
    n = len(FEATURES[kind])
    if [len(column) for column in columns] != [n, n, n + n * (n + 1) // 2]:
        raise ValueError(kind)
    return Logistic(columns[0], columns[1], columns[2], float(plain["bias"]))
