"""Pyramid: levels, the tie rule, metadata, and chunks."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05 import ImageLabel

from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.output.pyramid import (
    Coarsen,
    Pyramid,
    coarse_chunks,
    downsample,
    plan_levels,
)
from agq.blockwise.volumes.create import create_array, open_array
from agq.blockwise.volumes.open import open_volume
from tests.helpers.stitch_runs import PLAIN_DOWNSAMPLE


@pytest.mark.parametrize("how", sorted(PLAIN_DOWNSAMPLE))
@settings(max_examples=150, deadline=None)
@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.sampled_from([(1, 2, 2), (2, 2, 2), (2, 1, 2), (1, 1, 1)]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
)
def test_downsample_equals_the_plain_rule(how, shape, step, seed, labels):
    rng = np.random.default_rng(seed)
    values = np.array([0, 2**63 + 7, 3, 2**40, 5], np.uint64)[: labels + 1]
    volume = rng.choice(values, shape)
    assert np.array_equal(downsample(volume, step, how), PLAIN_DOWNSAMPLE[how](volume, step))


def test_ties():
    def one(*labels):
        return int(downsample(np.array(labels, np.uint64).reshape(1, 2, -1), (1, 2, 2))[0, 0, 0])

    assert one(9, 9, 4, 4) == 4
    assert one(0, 0, 9, 9) == 9
    assert one(0, 0, 0, 9) == 0
    assert one(0, 4, 3, 9) == 3


def test_levels_halve_the_fine_axes_first():
    levels = plan_levels((400, 4000, 4000), (16, 256, 256), (30, 6, 6))
    assert [level.step for level in levels[:4]] == [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)]
    assert [level.voxel_size for level in levels[:4]] == [
        (30, 6, 6),
        (30, 12, 12),
        (30, 24, 24),
        (60, 48, 48),
    ]
    assert levels[2].shape == (400, 1000, 1000)
    assert levels[3].factor == (2, 8, 8)
    assert all(n <= c for n, c in zip(levels[-1].shape, (16, 256, 256), strict=True))
    assert not all(n <= c for n, c in zip(levels[-2].shape, (16, 256, 256), strict=True))
    assert [level.name for level in levels] == [f"s{i}" for i in range(len(levels))]
    assert len(plan_levels((400, 4000, 4000), (16, 256, 256), (30, 6, 6), 2)) == 2
    assert len(plan_levels((16, 256, 256), (16, 256, 256), (30, 6, 6))) == 1


@pytest.mark.parametrize(
    "shape", [(1000, 3, 3), (1, 1000, 5), (7, 1, 999), (1000, 1, 1), (300, 300, 300)]
)
def test_levels_end_for_any_shape(shape):
    levels = plan_levels(shape, (16, 16, 16), (30, 6, 6))
    assert len(levels) < 20
    assert max(levels[-1].shape) <= 16


CHUNKS, SIZE, OFFSET = (3, 5, 4), (30, 6, 6), (60, -12, 18)


def build(folder, volume, chosen=None, how="majority"):
    """Write a pyramid as the stitch does; `chosen` selects the chunks of s0 that have data."""
    levels = plan_levels(volume.shape, CHUNKS, SIZE)
    pyramid = Pyramid(folder, "segmentation", levels, CHUNKS, OFFSET)
    pyramid.create(slice(None))
    open_array(folder, "segmentation/s0")[:] = volume
    grid = [-(-n // c) for n, c in zip(volume.shape, CHUNKS, strict=True)]
    indices = np.array(list(np.ndindex(*grid)) if chosen is None else chosen)
    numbers = []
    for i, level in enumerate(levels[1:], 1):
        indices, _ = coarse_chunks(indices, level.step)
        named = pyramid.numbers(i, indices).tolist()
        numbers += named
        chunks = list(zip(named, indices.tolist(), strict=True))
        failed = Coarsen(chunks, pyramid, i, how, folder / "journal").run()
        assert failed == 0
    pyramid.write_metadata(how)
    return levels, numbers


@pytest.mark.parametrize("how", sorted(PLAIN_DOWNSAMPLE))
def test_chunks_give_the_levels_of_the_whole_volume(tmp_path, how):
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 3, (10, 23, 17)).astype(np.uint64)
    levels, numbers = build(tmp_path, volume, how=how)
    assert sorted(numbers) == list(
        range(Pyramid(tmp_path, "", levels, CHUNKS, OFFSET).first(len(levels)))
    )
    assert Journal(tmp_path / "journal").done(len(numbers)).all()
    for level in levels[1:]:
        volume = PLAIN_DOWNSAMPLE[how](volume, level.step)
        assert np.array_equal(open_array(tmp_path, f"segmentation/{level.name}", "r")[:], volume)


def test_only_chunks_over_data_are_written(tmp_path):
    volume = np.zeros((10, 23, 17), np.uint64)
    volume[3:6, 5:10, 4:8] = 8
    levels, numbers = build(tmp_path, volume, chosen=[(1, 1, 1)])
    assert len(numbers) == len(levels) - 1
    for level in levels[1:]:
        volume = PLAIN_DOWNSAMPLE["majority"](volume, level.step)
        assert np.array_equal(open_array(tmp_path, f"segmentation/{level.name}", "r")[:], volume)


@pytest.mark.parametrize("how", sorted(PLAIN_DOWNSAMPLE))
def test_metadata_is_valid_and_in_place(tmp_path, how):
    volume = np.zeros((10, 23, 17), np.uint64)
    volume[5, 11, 9] = 4
    levels, _ = build(tmp_path, volume, how=how)
    with warnings.catch_warnings():
        # funlib.persistence 0.7 defines a pydantic model in a deprecated way when imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from funlib.persistence import open_ds
    group = zarr.open_group(str(tmp_path / "segmentation"), mode="r")
    label = ImageLabel.from_zarr(group)
    assert label.ome_attributes.version == "0.5"
    assert label.ome_attributes.image_label is not None
    (multiscale,) = label.ome_attributes.multiscales
    assert multiscale.type == how
    assert multiscale.metadata["method"] == "agq.blockwise.stitch.output.pyramid.downsample"
    assert [(axis.name, axis.unit) for axis in multiscale.axes] == [
        (name, "nanometer") for name in "zyx"
    ]
    for level, entry in zip(levels, multiscale.datasets, strict=True):
        scale, translation = (t.model_dump() for t in entry.coordinateTransformations)
        assert tuple(scale["scale"]) == level.voxel_size
        # Centre of the first voxel = corner of the volume plus half a voxel, at every level,
        # when centres of s0 are counted from its first one.
        corner = [
            t - (v - b) / 2
            for t, v, b in zip(translation["translation"], level.voxel_size, SIZE, strict=True)
        ]
        assert corner == list(OFFSET)
        array = open_ds(tmp_path / "segmentation" / level.name)
        assert tuple(array.voxel_size) == level.voxel_size
        assert tuple(array.offset) == OFFSET
        assert tuple(array.shape) == level.shape
        plain = zarr.open_array(str(tmp_path / "segmentation" / level.name), mode="r")
        assert np.array_equal(array[:], plain[:])
        assert np.array_equal(
            zarr.open_array(str(tmp_path / f"segmentation/{level.name}"))[:].shape, level.shape
        )
    for i, level in enumerate(levels):
        seen = open_volume(tmp_path, "segmentation", level=i, kind="labels")
        assert (tuple(seen.voxel_size), tuple(seen.offset)) == (level.voxel_size, OFFSET)


def test_metadata_of_one_level():
    levels = plan_levels((2, 2, 2), CHUNKS, SIZE)
    ome = Pyramid(Path(), "segmentation", levels, CHUNKS, OFFSET).ome_metadata()
    (dataset,) = ome["multiscales"][0]["datasets"]
    assert dataset["coordinateTransformations"] == [
        {"type": "scale", "scale": [30.0, 6.0, 6.0]},
        {"type": "translation", "translation": [60.0, -12.0, 18.0]},
    ]


def test_damaged_chunk_fails_alone(tmp_path):
    levels = plan_levels((6, 10, 16), CHUNKS, SIZE, 2)
    pyramid = Pyramid(tmp_path, "segmentation", levels, CHUNKS, OFFSET)
    pyramid.create(slice(None))
    fine = create_array(
        tmp_path, "segmentation/s0", shape=levels[0].shape, chunks=CHUNKS, dtype=np.uint64,
        voxel_size=SIZE, offset=OFFSET,
    )  # fmt: skip
    fine[:] = 5
    (tmp_path / "segmentation" / "s0" / "c" / "0" / "0" / "0").write_bytes(b"damaged")
    chunks = [(0, (0, 0, 0)), (1, (0, 0, 1))]
    failed = Coarsen(chunks, pyramid, 1, "majority", tmp_path / "journal").run()
    assert failed == 1
    assert [record.block for record in Journal(tmp_path / "journal").failed()] == [0]
    assert (open_array(tmp_path, "segmentation/s1", "r")[:3, :, 4:] == 5).all()
