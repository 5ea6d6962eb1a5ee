"""Whole volumes: any block shape, superblock and number of workers gives one partition."""

import itertools

import numpy as np
import pytest
import zarr
from ome_zarr_models.v05 import ImageLabel

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.merge.agglomeration import scores
from agq.blockwise.stitch.output.pyramid import plan_levels
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings, Thresholds
from agq.blockwise.volumes.create import open_array
from agq.pipeline.data.synthetic.volume import write
from tests.helpers.agglomeration import by_waterz, needs_compiler
from tests.helpers.fragments import make_run, make_truth, same_partition, write_run
from tests.helpers.stitch_runs import (
    PLAIN_DOWNSAMPLE,
    STEPS,
    expected_segments,
    results,
    segmentation,
)
from tests.helpers.whole_volume import contacts_from_volume

SHAPE = (14, 56, 45)
BLOCKS = [(4, 12, 10), (5, 29, 45), (14, 9, 16)]
"""Grids of 4 x 5 x 5, 3 x 2 x 1 and 1 x 7 x 3 blocks, none filled up on every axis."""

SUPERBLOCKS = [(1, 1, 1), (2, 2, 2), (1, 2, 3), (4, 1, 2), None]


def grid(write, shape=SHAPE, **context) -> BlockGrid:
    context = context or {"after": (1, 1, 1)}
    return BlockGrid(volume_shape=shape, voxel_size=(30, 6, 6), write_shape=write, **context)


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> np.ndarray:
    """Labels of a synthetic volume: every label is one connected piece."""
    container = tmp_path_factory.mktemp("synthetic") / "a.zarr"
    write(container, SHAPE, seed=4)
    return open_array(container, "labels", "r")[:].astype(np.uint32)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_superblocks_and_blocks_change_nothing(truth, tmp_path):
    """Real processes. Without noise every block shape joins up to the objects themselves."""
    found: dict = {}
    # Every superblock shape with two workers, some of them with one and four.
    for workers, superblocks in ((2, SUPERBLOCKS), (1, SUPERBLOCKS[::3]), (4, SUPERBLOCKS[1::2])):
        cases = [*itertools.product(superblocks, (0.6,)), (superblocks[-1], 0.0)]
        with dask_client(DaskSettings(workers=workers)) as cluster:
            assert len(cluster.ncores()) == workers
            for block, (superblock, noise) in itertools.product(BLOCKS, cases):
                folder = tmp_path / str((workers, block, superblock, noise))
                run = make_run(grid(block), seed=1, truth=truth, noise=noise)
                write_run(run, folder)
                run_stitch(run.spec(folder, superblock=superblock, batch_blocks=7), cluster)
                if noise == 0:
                    assert same_partition(segmentation(folder), truth)
                kept = found.setdefault((block, noise), results(folder))
                assert results(folder) == kept, (workers, block, superblock, noise)
    noisy = [data for (_, noise), data in found.items() if noise]
    assert len(noisy) == len(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_superblocks_change_nothing(truth, tmp_path, client, block):
    run = make_run(grid(block), seed=2, truth=truth, noise=0.6)
    expected = expected_segments(run)
    assert not same_partition(expected, truth)  # the noise is large enough to matter
    for superblock in SUPERBLOCKS[1:4:2]:
        folder = tmp_path / str(superblock)
        write_run(run, folder)
        run_stitch(run.spec(folder, superblock=superblock), client)
        assert np.array_equal(segmentation(folder), expected), superblock


def test_a_label_through_every_block(tmp_path, client):
    run = make_run(grid((4, 12, 10)), truth=np.ones(SHAPE, np.uint32), noise=0.2)
    write_run(run, tmp_path)
    report = run_stitch(run.spec(tmp_path, superblock=(2, 2, 2)), client)
    assert (report.segments, report.fragments, report.merges) == (1, 100, 99)
    assert (segmentation(tmp_path) == 1).all()


def test_a_block_of_more_than_2_to_the_16_labels(tmp_path, client):
    """Every voxel of two blocks is a label of its own; those at the border are cut by it."""
    half = np.arange(1, 40 * 41 * 41 + 1, dtype=np.uint32).reshape(40, 41, 41)
    truth = np.concatenate((half, half[:, :, ::-1] + half.max()), axis=2)
    truth[:, :, 41] = truth[:, :, 40]
    blocks = grid((40, 41, 41), truth.shape)
    run = make_run(blocks, truth=truth, noise=0.1)
    assert min(len(sidecar.nodes) for sidecar in run.sidecars.values()) > 2**16
    write_run(run, tmp_path)
    report = run_stitch(run.spec(tmp_path), client)
    assert (report.fragments, report.merges) == (truth.size, 40 * 41)
    assert np.array_equal(segmentation(tmp_path), expected_segments(run))


def test_pyramids_of_a_stitch_are_valid_and_redone_alone(truth, tmp_path, client):
    run = make_run(grid((4, 12, 10)), seed=2, truth=truth)
    write_run(run, tmp_path)
    for how in ("majority", "stride"):
        report = run_stitch(run.spec(tmp_path, downsampling=how), client)
        label = ImageLabel.from_zarr(zarr.open_group(tmp_path / "data.zarr/segmentation", mode="r"))
        (multiscale,) = label.ome_attributes.multiscales
        assert (label.ome_attributes.version, multiscale.type) == ("0.5", how)
        assert len(multiscale.datasets) == report.levels > 2
        levels = plan_levels(SHAPE, (4, 12, 10), (30, 6, 6))
        expected = segmentation(tmp_path)
        for i, level in enumerate(levels[1:], 1):
            expected = PLAIN_DOWNSAMPLE[how](expected, level.step)
            assert np.array_equal(segmentation(tmp_path, i), expected)
    assert report.reused == STEPS[:-1]


@needs_compiler
def test_stitched_volumes_equal_waterz(tmp_path, client):
    """The published rule on the whole volume by waterz, where no two scores are equal."""
    compared = 0
    for seed in range(60):
        blocks = grid((7, 13, 10), (14, 28, 26))
        shape = blocks.volume_shape
        run = make_run(blocks, seed, truth=make_truth(shape, seed, cell=8), noise=0.6)
        evidence = contacts_from_volume(run.fragments, run.half_units, run.border)
        numerators, denominators = scores(evidence.contacts, Thresholds())
        positive = (numerators / denominators)[numerators > 0]
        # With float32 means, waterz may merge an edge that lies exactly at the threshold.
        if len(positive) != len(set(positive.round(9).tolist())) or not numerators.all():
            continue
        compared += 1
        expected = by_waterz(run.fragments, run.half_units / 510, run.border)
        folder = tmp_path / str(seed)
        write_run(run, folder)
        superblock = SUPERBLOCKS[compared % len(SUPERBLOCKS)]
        run_stitch(run.spec(folder, superblock=superblock), client)
        assert same_partition(segmentation(folder), expected), seed
        if compared == 5:
            break
    assert compared >= 3
