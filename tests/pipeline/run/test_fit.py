"""A network is used on voxels of the size that it was trained at, and on others only if asked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import agq
from agq.errors import InputError
from agq.model import checkpoint
from agq.pipeline.config.schema import load_config
from agq.pipeline.folder import RunFolder, identity_hash
from agq.pipeline.run.fit import fits, misfit
from agq.pipeline.run.prepare import prepare
from tests.helpers.networks import SMALL, jittered_network, write_checkpoint
from tests.helpers.runs import blobs, make_config, write_volume
from tests.helpers.volumes import ome_group

SHAPE = (9, 33, 33)


def config_of(folder: Path, size: Any = None, unit: str = "nm", **sections: Any) -> Path:
    """Write a run of the packaged weights, on voxels of a size."""
    if size is not None:
        write_volume(folder / "in.zarr", "raw", blobs(SHAPE), voxel_size=size, unit=unit)
    raw = {"path": str(folder / "in.zarr"), "dataset": "raw", "unit": unit}
    sections.setdefault("input", {"raw": raw})
    sections["model"] = {"factory": "agq.model.predictor:AGQPredictor"} | sections.get("model", {})
    return make_config(folder, **sections)


@pytest.mark.parametrize(
    ("size", "trained", "expected"),
    [
        ((30, 6, 6), (30, 6, 6), ""),
        ((45, 9, 4), (30, 6, 6), ""),
        ((20, 4, 9), (30, 6, 6), ""),
        ((46, 6, 6), (30, 6, 6), "z 1.53 times larger"),
        ((30, 3.9, 6), (30, 6, 6), "y 1.54 times smaller"),
        ((8, 8, 8), (30, 6, 6), "z 3.75 times smaller"),
        ((30, 30, 6), (8, 8, 8), "z 3.75 times larger, y 3.75 times larger"),
    ],
)
def test_sizes_fit_up_to_a_ratio(size, trained, expected):
    assert fits(size, trained) is not bool(expected)
    assert misfit(size, trained) == expected


def test_voxels_of_another_size_are_refused_by_every_command(main, tmp_path):
    config = config_of(tmp_path, (8, 8, 8))
    for command in ("plan", "predict", "run"):
        code, _, err = main(command, config)
        assert code == 2, err
        assert len(err.strip().splitlines()) == 1
        assert "voxels of 8 x 8 x 8 nm" in err
        assert "trained at 30 x 6 x 6 nm: z 3.75 times smaller" in err
        assert "Resample" in err
        assert "model.any_voxel_size: true" in err
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(InputError, match="trained at"):
        agq.segment(blobs(SHAPE), (8, 8, 8), tmp_path / "segment")
    with pytest.raises(InputError, match="trained at"):
        prepare(load_config(config), workers_here=False)  # as agq submit does


@pytest.mark.parametrize(
    ("size", "unit", "advice"),
    [
        ((40, 4, 4), "angstrom", r"factor is about 0\.1: check the unit"),
        ((6, 6, 30), "nm", r"In reverse order they fit: sizes are \(z, y, x\)"),
        ((300, 60, 60), "nm", r"factor is about 10: check the unit .* \(angstrom\?\)"),
        ((30000, 6000, 6000), "nm", r"factor is about 1000: .* \(pm\?\)"),
        ((30, 6, 6), "pm", r"factor is about 0\.001"),
    ],
)
def test_probable_mistakes_are_named(tmp_path, size, unit, advice):
    with pytest.raises(InputError, match=advice):
        prepare(load_config(config_of(tmp_path, size, unit)))


def test_another_size_is_used_if_asked_and_the_plan_says_so(main, tmp_path):
    config = config_of(tmp_path, (80, 80, 80), "angstrom", model={"any_voxel_size": True})
    code, text, err = main("plan", config, "--no-time")
    assert code == 0, err
    assert "voxels of 80 x 80 x 80 angstrom" in text
    assert "trained at 30 x 6 x 6 nm" in text
    assert "z 3.75 times smaller" in text
    plan = json.loads(main("plan", config, "--no-time", "--json")[1])
    assert plan["unit"] == "angstrom"
    assert plan["trained_voxel_size"] == [30, 6, 6]
    assert len(plan["notes"]) == 1
    code, _, err = main("config", "check", config)
    assert code == 0, err


def test_the_level_that_fits_is_named(tmp_path):
    levels = [blobs((8, 64, 64)), blobs((8, 32, 32)), blobs((8, 16, 16)), blobs((4, 8, 8))]
    scales = [[32.0, 2.0, 2.0], [32.0, 4.0, 4.0], [32.0, 8.0, 8.0], [64.0, 16.0, 16.0]]
    ome_group(tmp_path / "p.zarr", "em", levels, scales, version="0.5")
    for given, expected in [
        ({"path": "p.zarr", "dataset": "em"}, "input.raw.level: 2 of the same pyramid"),
        ({"path": "p.zarr/em"}, "input.raw.level: 2 of the same pyramid"),
        ({"path": "p.zarr", "dataset": "em/0"}, "dataset: em/2 of the same pyramid"),
    ]:
        raw = given | {"path": str(tmp_path / given["path"])}
        with pytest.raises(InputError, match=expected):
            prepare(load_config(config_of(tmp_path, input={"raw": raw})))
    raw = {"path": str(tmp_path / "p.zarr"), "dataset": "em", "level": 2}
    assert not prepare(load_config(config_of(tmp_path, input={"raw": raw}))).notes
    ome_group(tmp_path / "q.zarr", "em", levels[:2], [[8, 8, 8], [8, 16, 16]], version="0.5")
    raw = {"path": str(tmp_path / "q.zarr"), "dataset": "em"}
    with pytest.raises(InputError, match="None of the pyramid's 2 levels fits"):
        prepare(load_config(config_of(tmp_path, input={"raw": raw})))


def test_a_checkpoint_without_a_voxel_size_is_a_note(main, tmp_path):
    published = tmp_path / "published.pth.tar"
    torch.save(jittered_network().state_dict(), published)
    for weights in (published, write_checkpoint(tmp_path / "ours.safetensors")):
        config = config_of(tmp_path, (8, 8, 8), model={"checkpoint": str(weights)})
        (note,) = prepare(load_config(config)).notes
        assert f"{weights} does not say the voxel size" in note
        assert "8 x 8 x 8 nm" in note
    code, _, err = main(
        "checkpoint", "convert", published, tmp_path / "c.safetensors", "--voxel-size", "8,8,8.5"
    )
    assert code == 0, err
    config = config_of(tmp_path, model={"checkpoint": str(tmp_path / "c.safetensors")})
    assert not prepare(load_config(config)).notes
    for wrong in ("8,8", "8,8,-8", "8,8,x"):
        code, _, err = main(
            "checkpoint", "convert", published, tmp_path / "d.safetensors", f"--voxel-size={wrong}"
        )
        assert code == 2
        assert "voxel_size" in err


def test_a_run_that_was_begun_goes_on(tmp_path):
    """The setting is of the identity neither way, and earlier releases had none."""
    masks = {"any_voxel_size": True, "pieces": "masks"}
    config = config_of(tmp_path, (8, 8, 8), model=masks)
    prepared = prepare(load_config(config))
    RunFolder(tmp_path / "run").create({}, prepared.identity)
    later = prepare(load_config(config_of(tmp_path)))
    assert identity_hash(later.identity) == identity_hash(prepared.identity)
    assert "z 3.75 times smaller" in later.notes[0]
    with pytest.raises(InputError, match="trained at"):
        prepare(load_config(config_of(tmp_path)), overwrite=True)


def test_another_model_is_not_asked(tmp_path):
    write_volume(tmp_path / "in.zarr", "raw", blobs(SHAPE), voxel_size=(500, 500, 500))
    assert not prepare(load_config(make_config(tmp_path))).notes


def train_config(tmp_path: Path, sizes: Any, network: dict[str, Any]) -> Path:
    containers = []
    for number, size in enumerate(sizes):
        container = tmp_path / f"t{number}.zarr"
        containers.append({"container": str(container)})
        labels = np.ones((6, 34, 34), np.uint32)
        write_volume(container, "raw", blobs(labels.shape), voxel_size=size, unit="angstrom")
        write_volume(container, "labels", labels, voxel_size=size, unit="angstrom")
    values = {
        "output": str(tmp_path / "out"),
        "volumes": containers,
        "steps": 1,
        "threads": 1,
        "device": "cpu",
        "network": SMALL.model_dump(mode="json", exclude={"voxel_size"})
        | {"input_shape": [5, 33, 33]}
        | network,
        "pad": [0, 0, 0],
        "augment": {"max_shift": 2},
        "losses": {"samples": 64},
    }
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_training_writes_the_voxel_size_of_its_volumes(main, tmp_path):
    file = train_config(tmp_path, [(300, 42, 42), (290, 42, 42)], {})
    code, _, err = main("train", file)
    assert code == 0, err
    made = checkpoint.load(tmp_path / "out" / "model.safetensors")
    assert made.config.voxel_size == (30, 4.2, 4.2)


def test_training_on_voxels_of_several_sizes(main, tmp_path):
    file = train_config(tmp_path, [(300, 42, 42), (100, 100, 100)], {})
    code, _, err = main("train", file)
    assert code == 2
    assert "z 3 times smaller" in err
    assert "network.voxel_size" in err
    code, _, err = main("train", file, "--set", "network.voxel_size=[10,10,10]")
    assert code == 0, err
    assert "t0.zarr has voxels of 30 x 4.2 x 4.2 nm" in err
    made = checkpoint.load(tmp_path / "out" / "model.safetensors")
    assert made.config.voxel_size == (10, 10, 10)


def test_training_refuses_axes_in_another_order(main, tmp_path):
    file = train_config(tmp_path, [(300, 42, 42)], {})
    metadata = tmp_path / "t0.zarr" / "raw" / "zarr.json"
    named = json.loads(metadata.read_text()) | {"dimension_names": ["x", "y", "z"]}
    named["attributes"]["axis_names"] = ["x", "y", "z"]
    metadata.write_text(json.dumps(named))
    code, _, err = main("train", file)
    assert (code, "training reads z, y, x as stored" in err) == (2, True), err
