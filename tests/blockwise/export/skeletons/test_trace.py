"""Centre lines of single shapes, and twigs."""

import numpy as np
import pytest

from agq.blockwise.export.skeletons.join import Skeleton, join
from agq.blockwise.export.skeletons.run import _EDGE
from agq.blockwise.export.skeletons.trace import trace

SIZE = (30.0, 24.0, 24.0)


def skeleton_of(labels: np.ndarray, segment: int = 1) -> Skeleton:
    segments, a, b, radii = trace(labels, (0, 0, 0), labels.shape, SIZE)
    rows = np.zeros(np.count_nonzero(segments == segment), _EDGE)
    for name, ends in (("a", a), ("b", b)):
        rows[name] = np.ravel_multi_index(tuple(ends[segments == segment].T), labels.shape)
    rows["radii"] = radii[segments == segment]
    return join(rows, labels.shape, labels.shape, SIZE, (3000.0, 0.0, -24.0))


def test_a_rod_is_a_line_in_its_middle():
    labels = np.zeros((11, 13, 80), np.uint64)
    z, y = np.mgrid[:11, :13]
    labels[:, :, 5:75][((z - 5) * 30) ** 2 + ((y - 6) * 24) ** 2 <= 100**2] = 1
    labels[0, 0, 0] = 2
    rod = skeleton_of(labels)
    degree = np.bincount(rod.edges.reshape(-1))
    assert sorted(degree)[:2] == [1, 1]
    assert degree.max() == 2
    assert rod.cable_nm == pytest.approx(69 * 24, rel=0.08)  # to the rims of its ends
    middle = rod.nodes[(rod.nodes[:, 2] > 400) & (rod.nodes[:, 2] < 1400)]
    # World positions of the middles of voxels.
    assert np.abs(middle[:, 0] - (3000 + 5.5 * 30)).max() <= 30
    assert np.abs(middle[:, 1] - 6.5 * 24).max() <= 24
    assert rod.radii.max() == pytest.approx(100, abs=25)


def test_branches_have_tips_and_bumps_have_none():
    labels = np.zeros((40, 40, 90), np.uint64)
    labels[17:23, 17:23, 2:88] = 1
    labels[17:23, 23:38, 40:46] = 1
    labels[23:25, 19:21, 60:62] = 1  # a bump
    tree = skeleton_of(labels)
    degree = np.bincount(tree.edges.reshape(-1))
    assert (degree == 1).sum() == 3
    assert (degree > 2).sum() == 1
    assert len(tree.edges) == len(tree.nodes) - 1


def test_nothing_to_trace():
    segments, a, b, radii = trace(np.zeros((4, 5, 6), np.uint8), (0, 0, 0), (4, 5, 6), SIZE)
    assert len(segments) == len(a) == len(b) == len(radii) == 0
    segments, *_ = trace(np.full((4, 5, 6), 3, np.uint8), (1, 1, 1), (2, 2, 2), SIZE)
    assert set(segments) <= {3}
