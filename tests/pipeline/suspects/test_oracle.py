"""What mending is worth, against scores counted before and after."""

import numpy as np
import pytest

from agq.pipeline.evaluate.contingency import BlockCounts, Contingency
from agq.pipeline.suspects.candidates import MERGE, ROW, SPLIT, Candidates
from agq.pipeline.suspects.oracle import Oracle, Truth

IDS = np.arange(1, 9, dtype=np.uint64)
SEGMENTS = np.array([1, 1, 1, 1, 1, 2, 2, 2], np.uint64)
CHAINS = np.array([(1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8)], np.uint64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [MERGE, SPLIT])
def test_worth_is_the_difference_of_scores(kind: str, seed: int) -> None:
    count = np.random.default_rng(seed).integers(1, 40, (4, len(IDS)))
    truth = np.repeat(np.arange(1, 5, dtype=np.uint64), len(IDS))
    numbers = np.zeros(len(truth), np.int64)
    table = Contingency(truth, np.tile(IDS, 4), count.reshape(-1), numbers, count.reshape(-1))
    counts = BlockCounts(table, Contingency.empty(), Contingency.empty())
    judge = Truth.of({0: IDS}, (IDS, SEGMENTS), counts)
    rows = np.zeros(1, ROW)
    rows["a"], rows["b"] = (1, 1) if kind == MERGE else (1, 2)
    rows["u"], rows["v"] = (2, 3) if kind == MERGE else (5, 6)
    rows["begin"], rows["end"], rows["last"] = 2, 5, 5
    worth = judge.worth(Candidates(kind, rows, np.zeros((1, 0)), np.zeros(1)))[0]
    before, after = Oracle(judge, CHAINS).curve([(kind, int(rows["u"][0]), int(rows["v"][0]))])
    assert before - after == pytest.approx(max(worth, 0.0), abs=1e-12)
