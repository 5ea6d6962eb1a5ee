"""Choose the settings of a stitch on half of a small truth, and say what they cost on the other.

The truth is cut into tiles, and every other one is held out, so both halves lie all over the
volume. What is minimised is VOI split + price x VOI merge: a merger costs a proofreader more than a
split. Thresholds come first, then the smallest contact, then the smallest segment. Segments that
are too small go to the segment that they touch most, as filling the background would give their
voxels away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from funlib.geometry import Coordinate, Roi

from agq.blockwise.stitch.classes import Kinds
from agq.blockwise.stitch.contacts import Evidence
from agq.blockwise.stitch.merge.agglomeration import Agglomeration, agglomerate, positions
from agq.blockwise.stitch.settings import StitchSettings
from agq.blockwise.volumes.open import Volume
from agq.errors import InputError
from agq.pipeline.evaluate.contingency import BlockCounts, Contingency
from agq.pipeline.evaluate.scores import Scores
from agq.pipeline.evaluate.sweep import thresholds_of
from agq.tables import Tabled
from agq.terminal import WholeTable

TILES = 4
"""Along the longer axes of the truth, as many as make this number of tiles on each."""

LEAST_TILES = 4


@dataclass(frozen=True)
class Grid:
    """Values that are tried."""

    across: tuple[float, ...]
    within: tuple[float, ...]
    min_contact: tuple[int, ...]
    min_size: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """What one choice of settings scores.

    Attributes
    ----------
    setting
        By name.
    chosen_on, held_out
        VOI split and merge of both halves.
    tiles
        VOI split and merge of each tile.
    """

    setting: dict[str, float]
    chosen_on: tuple[float, float]
    held_out: tuple[float, float]
    tiles: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Calibration(Tabled):
    """What was chosen.

    Attributes
    ----------
    price
        Of a bit of VOI merge, in bits of VOI split.
    best
        Lowest cost on the half that it was chosen on.
    best_held_out
        Of all trials, the one that is best on the held-out half: what a choice there would give.
    before
        The settings of the run.
    trials
        How many were tried.
    """

    name: str
    price: float
    best: Trial
    best_held_out: Trial
    before: Trial
    trials: int

    def cost(self, parts: tuple[float, float]) -> float:
        """Return VOI split + price x VOI merge."""
        return parts[0] + self.price * parts[1]

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest cost of a tile at the best setting."""
        costs = [self.cost(tile) for tile in self.best.tiles]
        return min(costs), max(costs)

    @property
    def lost(self) -> float:
        """What the choice costs on the held-out half, above the best one there."""
        return self.cost(self.best.held_out) - self.cost(self.best_held_out.held_out)

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        named = {"best": self.best, "best_held_out": self.best_held_out, "before": self.before}
        return {
            "price": self.price,
            "trials": self.trials,
            "lost_on_held_out": self.lost,
            "spread": list(self.spread),
            **{name: vars(trial) for name, trial in named.items()},
        }

    def table(self) -> WholeTable:
        """Return the report for a rich console."""
        numbers = ("across", "within", "contact", "size", "chosen on", "held out")
        low, high = self.spread
        table = WholeTable(
            f"{self.name}: the best of {self.trials} settings",
            ("", *numbers),
            numbers=numbers,
            legend=f"VOI split + merge of both halves; cost: split + {self.price:g} x merge. Cost "
            f"of the chosen: {self.cost(self.best.chosen_on):.4f}, held out "
            f"{self.cost(self.best.held_out):.4f} ({self.lost:.4f} above the best there), tiles "
            f"{low:.4f} to {high:.4f}",
        )
        rows = {"chosen": self.best, "run": self.before, "best held out": self.best_held_out}
        for name, trial in rows.items():
            values = [f"{value:.12g}" for value in trial.setting.values()]
            halves = [f"{a:.4f} + {b:.4f}" for a, b in (trial.chosen_on, trial.held_out)]
            table.add_row(name, *values, *halves)
        return table


def tiles(truth: Volume) -> list[Volume]:
    """Cut a truth into tiles of similar size, in an order in which neighbours alternate.

    Even and odd places of the list are a checkerboard.

    Raises
    ------
    InputError
        If it is too small.
    """
    # Along the two axes with most voxels.
    axes = sorted(np.argsort([-n for n in truth.shape], kind="stable")[:2].tolist())
    size = [int(v) for v in truth.voxel_size]
    cuts = [
        [truth.shape[axis] * k // TILES for k in range(TILES + 1)] if axis in axes else [0, n]
        for axis, n in enumerate(truth.shape)
    ]
    if any(len(set(cut)) < len(cut) for cut in cuts):
        raise InputError(f"{truth.name}: {truth.shape} voxels are too few to hold a part out")
    even: list[Volume] = []
    odd: list[Volume] = []
    spans = [list(itertools.pairwise(cut)) for cut in cuts]
    for place in itertools.product(*(range(len(span)) for span in spans)):
        box = [spans[axis][k] for axis, k in enumerate(place)]
        begin = Coordinate(low * v for (low, _), v in zip(box, size, strict=True))
        shape = Coordinate((high - low) * v for (low, high), v in zip(box, size, strict=True))
        part = truth.crop(Roi(truth.offset + begin, shape))
        (odd if sum(place) % 2 else even).append(part)
    return [part for pair in zip(even, odd, strict=True) for part in pair]


def calibrate(
    name: str,
    evidence: Evidence,
    counts: Sequence[BlockCounts],
    settings: StitchSettings,
    grid: Grid,
    *,
    price: float,
    kinds: Kinds | None = None,
) -> Calibration:
    """Choose settings of a stitch.

    Parameters
    ----------
    name
        Of the run.
    evidence
        Whole.
    counts
        Fragments against the truth in each tile, those of even places are chosen on, the others
        held out.
    settings
        Of the run; what is not chosen stays.
    grid
        Values to try.
    price
        See `Calibration`.
    kinds
        Of `agglomerate`.

    Raises
    ------
    InputError
        If a half of the truth has no labels.
    """
    tables = [Contingency.merge([part.labelled, part.filled]) for part in counts]
    filled = [len(table) > 0 for table in tables]
    if not (any(filled[::2]) and any(filled[1::2])):
        raise InputError("truth: labels lie in one half of its tiles only; give a larger truth")

    def cost(trial: Trial) -> float:
        return trial.chosen_on[0] + price * trial.chosen_on[1]

    def tried(across: float, within: float, contact: int, sizes: Iterable[int]) -> Iterator[Trial]:
        values = {"across": across, "within": within, "min_contact": contact}
        result = agglomerate(
            evidence.nodes.ids,
            evidence.contacts,
            thresholds_of(settings, **values),
            kinds,
            names=evidence.names,
        )
        for size in sizes:
            segments = without_small(result, evidence, size)
            scored = [table.with_segments(result.ids, segments) for table in tables]
            halves = [_voi(Contingency.merge(scored[k::2])) for k in (0, 1)]
            parts = tuple(_voi(table) for table in scored if len(table))
            yield Trial({**values, "min_size": size}, halves[0], halves[1], parts)

    now = (settings.across, settings.within, settings.min_contact)
    before = next(tried(*now, [settings.min_size]))
    trials = [
        trial
        for within in grid.within
        for across in grid.across
        for trial in tried(across, within, settings.min_contact, [settings.min_size])
    ]
    best = min([before, *trials], key=cost).setting
    pair = best["across"], best["within"]
    for contact in grid.min_contact:
        trials += tried(*pair, contact, [settings.min_size])
    contact = int(min([before, *trials], key=cost).setting["min_contact"])
    trials += tried(*pair, contact, grid.min_size)
    every = [before, *trials]
    held_out = min(every, key=lambda trial: trial.held_out[0] + price * trial.held_out[1])
    return Calibration(name, price, min(every, key=cost), held_out, before, len(every))


def _voi(table: Contingency) -> tuple[float, float]:
    scores = Scores.of(table)
    return (0.0, 0.0) if scores is None else (scores.voi_split, scores.voi_merge)


def without_small(result: Agglomeration, evidence: Evidence, least: int) -> npt.NDArray[np.uint64]:
    """Return the segment of each fragment if those of fewer voxels go to their neighbours.

    Each goes to the segment of enough voxels that it touches most; one that touches none stays.
    """
    ids, index = np.unique(result.representatives, return_inverse=True)
    sizes = np.zeros(len(ids), np.int64)
    np.add.at(sizes, index, evidence.nodes.sizes)
    small = sizes < least
    contacts = evidence.contacts
    u = index[positions(result.ids, contacts.u)]
    v = index[positions(result.ids, contacts.v)]
    area = contacts.across_count + contacts.within_count
    one = np.concatenate([u, v])
    other, touching = np.concatenate([v, u]), np.concatenate([area, area])
    rows = small[one] & ~small[other]
    one, other, touching = one[rows], other[rows], touching[rows]
    pair, back = np.unique(np.stack((one, other), axis=1), axis=0, return_inverse=True)
    total = np.zeros(len(pair), np.int64)
    np.add.at(total, back.reshape(-1), touching)
    order = np.lexsort((pair[:, 1], total))
    target = np.arange(len(ids))
    target[pair[order, 0]] = pair[order, 1]  # the last, which touches most, counts
    return ids[target[index]]
