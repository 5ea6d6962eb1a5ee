"""Runs whose blocks are cut into supervoxels: `model.pieces`."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from agq.pipeline.data.synthetic.volume import write
from tests.helpers.runs import agq, results
from tests.helpers.sidecars import read_sidecar

SUPERVOXELS = ("--set", "model.pieces=supervoxels", "--set", "stitch.within=0.6")


def write_config(folder: Path, tissue: Path, name: str = "run") -> Path:
    config = {
        "run_dir": str(folder / name),
        "input": {"raw": {"path": str(tissue), "dataset": "raw"}},
        "model": {"checkpoint": "demo", "device": "cpu"},
        "workers": {"count": 1, "threads": 1},
        "stitch": {"across": 0.6, "within": 0.6},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def tissue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue") / "in.zarr"
    write(folder, (16, 96, 120), seed=5)
    return folder


@pytest.fixture(scope="module")
def finished(tissue, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = agq("run", write_config(folder, tissue), *SUPERVOXELS)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_every_voxel_is_in_a_segment_and_pieces_are_joined(finished):
    import zarr

    fragments = zarr.open_array(finished / "data.zarr" / "fragments", mode="r")[:]
    segments = zarr.open_array(finished / "data.zarr" / "segmentation" / "s0", mode="r")[:]
    assert (fragments > 0).all()
    assert len(np.unique(segments)) < len(np.unique(fragments)) / 4


def test_workers_and_batches_do_not_change_a_byte(finished, tissue, tmp_path):
    config = write_config(tmp_path, tissue)
    more = ("--set", "workers.count=2", "--set", "model.batch_size=2")
    again = agq("run", config, *SUPERVOXELS, *more)
    assert again.returncode == 0, again.stderr
    assert results(tmp_path / "run") == results(finished)


def test_the_weight_of_masks_is_in_the_evidence_and_in_the_identity(finished, tissue, tmp_path):
    config = write_config(tmp_path, tissue)
    alone = agq("predict", config, *SUPERVOXELS, "--set", "model.mask_weight=0")
    assert alone.returncode == 0, alone.stderr
    ours, plain = read_sidecar(finished, 0), read_sidecar(tmp_path / "run", 0)
    assert np.array_equal(ours.u, plain.u)
    assert np.array_equal(ours.count, plain.count)
    # 0.3 of the evidence is not the affinities'.
    assert (np.abs(ours.aff_sum - plain.aff_sum) <= 0.3 * 255 * ours.count + 0.5).all()
    assert (ours.aff_sum != plain.aff_sum).mean() > 0.5
    refused = agq("predict", config, *SUPERVOXELS)
    assert refused.returncode == 2
    assert "mask_weight" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.min_affinity=0.9", "model.min_affinity cuts masks"),
        ("stitch.within=1", "stitch.within: 1 joins nothing inside a block"),
        ("model.pieces=blocks", "model.pieces"),
        ("model.mask_weight=2", "model.mask_weight"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(tissue, tmp_path, change, message):
    config = write_config(tmp_path, tissue)
    refused = agq("predict", config, *SUPERVOXELS, "--set", change)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run" / "data.zarr").exists()
