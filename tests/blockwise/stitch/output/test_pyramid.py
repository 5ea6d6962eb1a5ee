"""Pyramid: levels, the tie rule, metadata, and chunks."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05 import ImageLabel

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.journal.reader import Journal
from agq.blockwise.stitch.output.boxes import Coarsen
from agq.blockwise.stitch.output.pyramid import Pyramid, downsample, plan_levels, plan_passes
from agq.blockwise.volumes.create import open_array
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


GRID = BlockGrid(volume_shape=(10, 23, 17), write_shape=CHUNKS, voxel_size=SIZE, offset=OFFSET)


def planned(folder, grid=GRID):
    return Pyramid.planned(folder, "segmentation", grid)


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        ((400, 4000, 4000), (16, 256, 256)),
        ((100, 1, 7000), (16, 16, 16)),
        ((30, 300, 300), (2, 3, 5)),
        ((5, 5, 5), (9, 9, 9)),
        ((4000, 4000, 4000), (500, 500, 500)),
    ],
)
def test_passes_make_every_level_once_in_whole_files(shape, chunks):
    levels, passes = plan_levels(shape, chunks, SIZE), plan_passes(shape, chunks, SIZE)
    assert [made.base for made in passes] == [0, *(made.last for made in passes[:-1])]
    assert passes[-1].last == len(levels) - 1
    grid = BlockGrid(volume_shape=shape, write_shape=chunks, voxel_size=SIZE)
    pyramid = planned(Path(), grid)
    for made in passes:
        held = [min(b, n) for b, n in zip(made.box, pyramid.grid(made.base), strict=True)]
        assert np.prod(held) <= max(8, min(64, np.prod(pyramid.grid(made.base)) // 16))
        for level in range(made.base, made.last + 1):
            covered = pyramid.covered(level, made.base)
            assert all(b % c == 0 for b, c in zip(made.box, covered, strict=True))
            if level:
                assert (
                    pyramid.maker(level)
                    is pyramid.passes[passes.index(made) - (level == made.base)]
                )
    numbers = np.arange(pyramid.first(len(levels)))
    for number, (level, place) in zip(numbers, pyramid.places(numbers), strict=True):
        assert pyramid.numbers(level, np.array([place])).tolist() == [number]


def build(folder, volume, chosen=None, how="majority", pyramid=None):
    """Write the levels over s0 as the stitch does; `chosen` selects the chunks with data."""
    pyramid = pyramid or planned(folder)
    pyramid.create(slice(None))
    open_array(folder, "segmentation/s0")[:] = volume
    (folder / "journal/pyramid").mkdir(parents=True)
    chunks = np.array(list(np.ndindex(*GRID.shape)) if chosen is None else chosen)
    for made in pyramid.passes:
        places = [tuple(p) for p in np.unique(chunks // np.array(made.box), axis=0).tolist()]
        task = Coarsen(places, pyramid, how, folder / "journal", (0, 0), made=made)
        assert task.run() == 0
        chunks = np.unique(chunks // np.array(pyramid.covered(made.last, made.base)), axis=0)
    pyramid.write_metadata(how)
    return pyramid


@pytest.mark.parametrize("how", sorted(PLAIN_DOWNSAMPLE))
def test_boxes_give_the_levels_of_the_whole_volume(tmp_path, how):
    """Also where windows cross from one chunk into the next: the sides of these are odd."""
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 3, GRID.volume_shape).astype(np.uint64)
    pyramid = build(tmp_path, volume, how=how)
    assert len(pyramid.passes) > 1
    files = pyramid.first(len(pyramid.levels))
    assert Journal(tmp_path / "journal/pyramid").done(files).all()
    for level in pyramid.levels[1:]:
        volume = PLAIN_DOWNSAMPLE[how](volume, level.step)
        assert np.array_equal(open_array(tmp_path, f"segmentation/{level.name}", "r")[:], volume)


def test_only_files_over_data_are_written(tmp_path):
    volume = np.zeros(GRID.volume_shape, np.uint64)
    volume[3:6, 5:10, 4:8] = 8
    pyramid = build(tmp_path, volume, chosen=[(1, 1, 1)])
    for level in pyramid.levels[1:]:
        volume = PLAIN_DOWNSAMPLE["majority"](volume, level.step)
        assert np.array_equal(open_array(tmp_path, f"segmentation/{level.name}", "r")[:], volume)
        files = [p for p in (tmp_path / "segmentation" / level.name).rglob("*") if p.is_file()]
        assert len(files) == 1 + volume.any()


@pytest.mark.parametrize("how", sorted(PLAIN_DOWNSAMPLE))
def test_metadata_is_valid_and_in_place(tmp_path, how):
    volume = np.zeros((10, 23, 17), np.uint64)
    volume[5, 11, 9] = 4
    levels = build(tmp_path, volume, how=how).levels
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


def test_a_damaged_chunk_fails_its_box_alone(tmp_path):
    volume = np.full(GRID.volume_shape, 5, np.uint64)
    pyramid = planned(tmp_path)
    pyramid.create(slice(None))
    open_array(tmp_path, "segmentation/s0")[:] = volume
    files = pyramid.shards(0)
    assert np.prod(files) > 2
    (tmp_path / "segmentation" / "s0" / "c" / "0" / "0" / "0").write_bytes(b"damaged")
    (tmp_path / "journal/pyramid").mkdir(parents=True)
    made, places = pyramid.passes[0], [(0, 0, 0), (0, 0, 1)]
    task = Coarsen(places, pyramid, "majority", tmp_path / "journal", (0, 0), made=made)
    assert task.run() == 1
    journal = Journal(tmp_path / "journal/pyramid")
    assert [record.block for record in journal.failed()] == [0]
    assert journal.counts()["done"] == made.last - made.base
    width = pyramid.shard(1)[2] * CHUNKS[2]
    written = open_array(tmp_path, "segmentation/s1", "r")[:]
    assert (written[: CHUNKS[0], : CHUNKS[1], width : width + 1] == 5).all()
