"""What a predictor says besides affinities goes into the evidence inside a block alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.label_pairs import MaskAgreement, PairColumns
from agq.blockwise.blocks.sidecar import build_sidecar
from agq.blockwise.predict.block_threads import BlockError, BlockFiles
from agq.errors import InputError
from tests.helpers import fakes
from tests.helpers.predict_runs import make_run, raw_volume
from tests.helpers.sidecars import read_sidecar

GRID = BlockGrid(volume_shape=(4, 9, 9), voxel_size=(30, 6, 6), write_shape=(4, 9, 9))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weight=st.floats(0, 1),
    labels=st.integers(2, 12),
    coordinates=st.integers(0, 5),
)
def test_mixed_against_the_definition(seed, weight, labels, coordinates):
    rng = np.random.default_rng(seed)
    # Up to the largest sums there can be: 65536 a voxel, in 10^7 voxels.
    table = rng.integers(0, 2 ** int(rng.integers(1, 40)), (1 + labels, coordinates))
    table[rng.random(1 + labels) < 0.2] = 0
    u, v = np.triu_indices(labels, 1)
    count = rng.integers(1, 10**6, len(u))
    total = (count * rng.integers(0, 256, len(u))).astype(np.int64)
    pairs = PairColumns((u + 1).astype(np.uint64), (v + 1).astype(np.uint64), total, count)
    found = MaskAgreement(table, weight).mixed(pairs)
    assert found.dtype == np.int64
    for i, (a, b) in enumerate(zip(u + 1, v + 1, strict=True)):
        one, two = [int(x) for x in table[a]], [int(x) for x in table[b]]
        if not any(one) or not any(two):
            assert found[i] == total[i]
            continue
        cosine = sum(x * y for x, y in zip(one, two, strict=True)) / (
            sum(x * x for x in one) ** 0.5 * sum(x * x for x in two) ** 0.5
        )
        expected = (1 - weight) * total[i] + weight * 255 * cosine * count[i]
        assert abs(found[i] - expected) <= 0.5 + 1e-9 * 255 * count[i]
        assert 0 <= found[i] <= 255 * count[i]


def test_weight_0_changes_nothing_and_1_forgets_affinities():
    labels, affinities = _block()
    table = np.array([[0, 0], [5, 0], [0, 5], [3, 3]])
    plain = build_sidecar(labels, affinities, GRID, 0)
    none = build_sidecar(labels, affinities, GRID, 0, agreement=MaskAgreement(table, 0.0))
    assert none.to_bytes() == plain.to_bytes()
    alone = build_sidecar(labels, affinities, GRID, 0, agreement=MaskAgreement(table, 1.0))
    found = dict(zip(zip(alone.u, alone.v, strict=True), alone.aff_sum / alone.count, strict=True))
    assert found[1, 2] == 0
    assert found[1, 3] == pytest.approx(255 / 2**0.5, abs=0.1)
    assert found[2, 3] == pytest.approx(found[1, 3], abs=0.1)
    for name in ("nodes", "sizes", "boxes", "u", "v", "count"):
        assert np.array_equal(getattr(alone, name), getattr(plain, name))
    for ours, other in zip(alone.planes, plain.planes, strict=True):
        assert np.array_equal(ours.low_affinity, other.low_affinity)


@pytest.mark.parametrize(
    ("table", "weight", "message"),
    [
        (np.zeros(3, np.int64), 0.5, r"shape \(3,\) and dtype int64"),
        (np.zeros((4, 2)), 0.5, "dtype float64"),
        (np.full((4, 2), -1), 0.5, "non-negative"),
        (np.ones((4, 2), np.int64), 1.5, "1.5 is not between 0 and 1"),
        (np.ones((4, 2), np.int64), float("nan"), "nan is not between 0 and 1"),
    ],
)
def test_tables_that_cannot_be_used(table, weight, message):
    with pytest.raises(InputError, match=message):
        MaskAgreement(table, weight)


def test_a_label_without_a_row_is_an_error():
    labels, affinities = _block()
    few = MaskAgreement(np.ones((3, 2), np.int64), 0.5)
    with pytest.raises(InputError, match="3 rows, but there is a label 3"):
        build_sidecar(labels, affinities, GRID, 0, agreement=few)


@dataclass(frozen=True)
class WithMemberships:
    """A prediction of the tests' predictor with a table besides."""

    labels: Any
    affinities: Any
    components: int
    dropped: int
    n_labels: int
    memberships: Any
    mask_weight: float = 0.5


def test_a_block_is_written_with_its_agreement(tmp_path: Path):
    spec = make_run(tmp_path, raw_volume(), None)
    files = BlockFiles.open(spec, Path(spec.run_dir))
    (plain,) = fakes.threshold().predict([files.read(0)])
    n = int(plain.labels.max())
    told = WithMemberships(plain.labels, plain.affinities, 0, 0, n, np.eye(1 + n, dtype=np.int64))
    before = files.write(0, plain)
    without = read_sidecar(files.run_dir, 0)
    after = files.write(0, told)
    found = read_sidecar(files.run_dir, 0)
    assert before["fragments"] == after["fragments"]
    # Nothing agrees, so every contact counts half of its affinity.
    assert np.array_equal(found.aff_sum, np.rint(without.aff_sum / 2))
    with pytest.raises(BlockError, match=r"cannot be used: memberships .*: expected"):
        files.write(0, replace(told, memberships=np.ones(3)))


def _block() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = np.zeros((4, 9, 9), np.uint16)
    labels[:, :, :3], labels[:, :4, 3:], labels[:, 4:, 3:] = 1, 2, 3
    return labels, rng.integers(0, 256, (3, 4, 9, 9)).astype(np.uint8)
