"""Do weights or thresholds by the size of a contact, or prices, score better? On a finished run.

    python benchmarks/contact_sizes.py runs/ac4

Each rule keeps scores ratios of additive sums, so that a stitch with it would be exact: a price is
taken from the sum of every contact; contacts or fragments below a size get another threshold; pairs
without evidence are added to a contact; a contact counts a power or the logarithm of its pairs
(`stitch.contact_weight: sqrt` is the power 0.5). For each, the best of the thresholds nearby is
printed, on the truth of the run's configuration, predicted background filled.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agq.blockwise.stitch.contacts import ContactTable, merge_contacts, read_evidence
from agq.blockwise.stitch.merge.agglomeration import (
    Graph,
    ScoreTable,
    contract,
    positions,
    scores,
)
from agq.blockwise.stitch.merge.kernel import connected_components
from agq.pipeline.cli.score.score import truth_of
from agq.pipeline.evaluate.baseline.compare import fragment_counts, stitch_settings
from agq.pipeline.evaluate.sweep import Point, point, thresholds_of
from agq.pipeline.folder import RunFolder

Numbers = NDArray[np.int64]
Rule = Callable[[Numbers, Numbers, int], tuple[Numbers, Numbers]]
"""Changes numerators and denominators, given the units of an affinity of 1."""

ACROSS, WITHIN = (0.5, 0.55, 0.6, 0.65), (0.5, 0.525, 0.55, 0.575, 0.6)


def price(value: float) -> Rule:
    """Take so many affinities from each contact."""
    return lambda top, below, units: (top - np.int64(value * units), below)


def threshold_of(some: NDArray[np.bool_], more: float) -> Rule:
    """Raise the threshold of some contacts."""
    return lambda top, below, units: (top - some * np.int64(round(more * units)) * below, below)


def prior(pairs: int) -> Rule:
    """Add pairs of voxels whose affinity is the threshold."""
    return lambda top, below, units: (top, below + np.int64(pairs))


def weight(of: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Rule:
    """Let a contact count a function of its pairs."""

    def rule(top: Numbers, below: Numbers, units: int) -> tuple[Numbers, Numbers]:
        weights = np.rint(64 * of(below.astype(float))).astype(np.int64)
        return np.rint(top * (weights / np.maximum(below, 1))).astype(np.int64), weights

    return rule


def rules(contacts: ContactTable, smaller: Numbers) -> Iterator[tuple[str, Rule]]:
    """Yield what is tried, with its name."""
    pairs = contacts.across_count + contacts.within_count
    yield "as it is", price(0)
    for exponent in (0.75, 0.5, 0.25, 0):
        yield f"weight n^{exponent}", weight(lambda n, e=exponent: (n > 0) * n**e)  # type: ignore[misc]
    yield "weight log(1 + n)", weight(np.log1p)
    for value in (0.5, 1, 2, 5):
        yield f"price {value}", price(value)
    for what, size, limits in (
        ("contacts", pairs, (30, 100, 300, 1000)),
        ("fragments", smaller, (100, 500, 2000, 10_000)),
    ):
        for limit, more in itertools.product(limits, (-0.1, -0.05, 0.05, 0.1)):
            yield f"{what} below {limit}: {more:+}", threshold_of(size < limit, more)
    for count in (5, 20, 50, 100, 200):
        yield f"prior {count}", prior(count)


def main() -> None:
    """Print a line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    run = RunFolder(parser.parse_args().run)
    evidence, counts = read_evidence(run.path), fragment_counts(run, truth_of(run, None))
    base, contacts = stitch_settings(run), merge_contacts([evidence.contacts])
    order = np.argsort(evidence.nodes.ids, kind="stable")
    ids, sizes = evidence.nodes.ids[order], evidence.nodes.sizes[order]
    u, v = positions(ids, contacts.u), positions(ids, contacts.v)

    def score(rule: Rule, across: float, within: float) -> Point:
        thresholds = thresholds_of(base, across=across, within=within, contact_weight="voxels")
        changed = rule(*scores(contacts, thresholds), thresholds.units)
        table = ScoreTable(contacts.u, contacts.v, *changed)
        merges, _ = contract(Graph.of_fragments(ids, table.take(table.denominator > 0)))
        roots = connected_components(len(ids), positions(ids, merges.u), positions(ids, merges.v))
        setting = {"across": across, "within": within}
        return point("AGQ", setting, counts, ids, ids[roots])

    for name, rule in rules(contacts, np.minimum(sizes[u], sizes[v])):
        found = [score(rule, a, w) for a, w in itertools.product(ACROSS, WITHIN)]
        best = min(found, key=lambda p: p.value("voi_sum"))
        filled = best.scores["background_filled"]
        assert filled is not None
        print(
            f"{name:28} {best.setting['across']} {best.setting['within']}  "
            f"{filled.voi_split:.3f} + {filled.voi_merge:.3f} = {filled.voi_sum:.3f}, "
            f"{filled.adapted_rand_error:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
