"""What a stitch should give, and the runs, clusters and results that its tests share."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import LocalCluster

from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.merge.agglomeration import agglomerate
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings, Thresholds
from agq.blockwise.volumes.create import open_array
from tests.helpers.fragments import GRID, Run, folder_bytes, make_run, write_run
from tests.helpers.whole_volume import contacts_from_volume

STEPS = ["contacts", "agglomerate", "lut", "relabel", "pyramid"]


@pytest.fixture(scope="module")
def client():
    with dask_client(DaskSettings(workers=2), processes=False) as made:
        yield made


def open_cluster(workers: int, **options: Any) -> LocalCluster:
    """Start a cluster as a user might for `stitch.dask.address`; of threads, without TLS."""
    given = {"protocol": "tcp://", "processes": False, "threads_per_worker": 1, **options}
    return LocalCluster(
        n_workers=workers, host="127.0.0.1", dashboard_address="127.0.0.1:0", **given
    )


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(GRID, seed=5)


@pytest.fixture
def run_dir(run, tmp_path) -> Path:
    write_run(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def undisturbed(run, client, tmp_path_factory) -> dict[str, bytes]:
    """Return the files of a stitch that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    write_run(run, run_dir)
    run_stitch(run.spec(run_dir), client)
    return results(run_dir)


def expected_segments(run: Run, thresholds: Thresholds = Thresholds()) -> np.ndarray:  # noqa: B008
    """Segments of the whole arrays, numbered by their smallest fragment."""
    evidence = contacts_from_volume(run.fragments, run.half_units, run.border)
    result = agglomerate(evidence.nodes.ids, evidence.contacts, thresholds)
    numbers = np.searchsorted(np.unique(result.representatives), result.representatives) + 1
    names = dict(zip(result.ids.tolist(), numbers.tolist(), strict=True)) | {0: 0}
    return np.vectorize(names.__getitem__, otypes=[np.uint64])(run.fragments)


def segmentation(run_dir: Path, level: int = 0) -> np.ndarray:
    return open_array(run_dir / "data.zarr", f"segmentation/s{level}", "r")[:]


def results(run_dir: Path) -> dict[str, bytes]:
    """Return what a stitch makes: the segmentation and the table of segments.

    What it keeps by superblock follows their layout; journals hold times and tokens.
    """
    files = folder_bytes(run_dir)
    return {
        name: data
        for name, data in files.items()
        if name.startswith(("lut/s", "data.zarr/segmentation/"))
    }


def plain_mode(labels: np.ndarray, step) -> np.ndarray:
    shape = [-(-n // f) for n, f in zip(labels.shape, step, strict=True)]
    out = np.zeros(shape, np.uint64)
    for index in np.ndindex(*shape):
        window = tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, step, strict=True))
        votes = Counter(labels[window].ravel().tolist())
        # Most votes, then foreground before background, then the smallest id.
        out[index] = min(votes, key=lambda label: (-votes[label], label == 0, label))
    return out


def plain_stride(labels: np.ndarray, step) -> np.ndarray:
    shape = [-(-n // f) for n, f in zip(labels.shape, step, strict=True)]
    out = np.zeros(shape, np.uint64)
    for index in np.ndindex(*shape):
        out[index] = labels[tuple(i * f for i, f in zip(index, step, strict=True))]
    return out


PLAIN_DOWNSAMPLE = {"majority": plain_mode, "stride": plain_stride}
