"""Labels cut into connected pieces: as the whole volume at once, whatever the chunks."""

from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.volumes.create import create_array
from agq.pipeline.data.synthetic.connected import split_labels


def expected(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Pieces of the whole volume, named by their first voxel."""
    pieces, count = cc3d.connected_components(labels, connectivity=6, return_N=True)
    found, first = np.unique(pieces, return_index=True)
    names = np.where(found > 0, first + 1, 0).astype(np.uint64)
    return names[np.searchsorted(found, pieces)], count


def stored(folder: Path, labels: np.ndarray, chunks: tuple[int, ...]) -> Any:
    array = create_array(
        folder, "labels", shape=labels.shape, chunks=chunks, dtype="uint64", voxel_size=(1, 1, 1)
    )
    array[:] = labels
    return array


@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    chunk=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 2**31),
    most=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_whole_volume_at_once(tmp_path_factory, shape, chunk, seed, most):
    labels = np.random.default_rng(seed).integers(0, most + 1, shape).astype(np.uint64)
    labels[labels > 0] += np.uint64(2**52)
    chunks = tuple(min(a, b) for a, b in zip(chunk, shape, strict=True))
    array = stored(tmp_path_factory.mktemp("split"), labels, chunks)
    pieces, count = expected(labels)
    assert split_labels(array, workers=2) == count
    np.testing.assert_array_equal(array[:], pieces)


@pytest.mark.parametrize("chunks", [(4, 4, 4), (1, 8, 2)])
def test_a_neurite_that_meets_itself_only_far_away(tmp_path, chunks):
    labels = np.zeros((4, 8, 8), np.uint64)
    labels[:, 0] = labels[:, 7] = 5  # two sheets of one neurite
    array = stored(tmp_path / "apart", labels, chunks)
    assert split_labels(array) == 2
    labels[3, :, 7] = 5  # joined at one end, through other chunks
    array = stored(tmp_path / "joined", labels, chunks)
    assert split_labels(array) == 1
    assert set(np.unique(array[:])) == {0, 1}
