"""`agq train` and `agq checkpoint` as users call them."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zarr
from typer.testing import CliRunner

from agq.errors import InputError
from agq.model import checkpoint
from agq.model.network.agq import AGQ
from agq.model.training.config import SyntheticConfig, VolumeConfig
from agq.pipeline.cli.main import app
from agq.pipeline.data.synthetic import volume as synthetic
from agq.pipeline.run.train_data import make, ready
from tests.helpers.fragments import folder_bytes
from tests.helpers.training import NETWORK, config_of


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_says_how_it_went_and_starts_from_a_checkpoint(
    volume: Path,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    network = AGQ(NETWORK)
    start = tmp_path / "start.pth.tar"
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, start)
    config = config_of(volume, tmp_path / "run", optimizer={"learning_rate": 1e-12})
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    said = call("train", file, "--max-steps", 2, "--init-from", start)
    assert "2 steps in" in said
    assert "of the time waiting for data" in said
    assert f"agq train {file} --resume" in said
    assert "learning rate" not in said
    found = checkpoint.load(tmp_path / "run" / "model.safetensors").state_dict
    for key, value in network.named_parameters():
        torch.testing.assert_close(found[key], value.detach(), rtol=2e-3, atol=1e-4)
    with pytest.raises(InputError, match="nothing"):
        call("train", file, "--set", f"output={tmp_path / 'other'}", "--init-from", "nothing.pt")


def test_train_makes_synthetic_volumes_and_goes_on_without_optional_ones(
    volume: Path,
    tmp_path: Path,
) -> None:
    made = {"container": str(tmp_path / "s.zarr"), "synthetic": {"shape": [6, 48, 48], "seed": 3}}
    absent = {"container": str(tmp_path / "absent.zarr"), "optional": True}
    values = config_of(volume, tmp_path / "run").model_dump(mode="json")
    file = tmp_path / "train.yaml"
    plain = {"volumes": [made, absent], "validation": [absent], "optimizer": {}}
    file.write_text(yaml.safe_dump(values | plain))
    result = CliRunner().invoke(app, ["train", str(file), "--max-steps", "1"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count(f"{tmp_path / 'absent.zarr'} does not exist and is optional") == 2
    assert "a step has 1 of 8 crops, and the published learning rate" in result.stderr
    labels = zarr.open_array(tmp_path / "s.zarr" / "labels", mode="r")
    assert labels.shape == (6, 48, 48)
    assert np.asarray(labels[:]).any()
    assert not list(tmp_path.glob("s.zarr.*"))
    about = checkpoint.load(tmp_path / "run" / "model.safetensors").provenance
    assert about["data"] == [made["container"]]
    file.write_text(yaml.safe_dump(values | {"volumes": [absent]}))
    with pytest.raises(InputError, match="none of the optional volumes exists"):
        call("train", file)
    needed = {"volumes": [absent | {"optional": False}], "output": str(tmp_path / "other")}
    file.write_text(yaml.safe_dump(values | needed))
    with pytest.raises(InputError, match=r"absent\.zarr/raw"):
        call("train", file)


def test_two_commands_may_make_the_same_volume_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = VolumeConfig(
        container=tmp_path / "data" / "s.zarr",
        synthetic=SyntheticConfig(shape=(6, 48, 48), seed=3),
    )
    write = synthetic.write

    def slowly(container: Path, *arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(synthetic, "write", write)
        write(container, *arguments, **options)
        before = folder_bytes(container)
        make(entry)  # the other command, from beginning to end
        assert folder_bytes(container) == before, "the one's files are no business of the other"

    monkeypatch.setattr(synthetic, "write", slowly)
    make(entry)
    assert [path.name for path in entry.container.parent.iterdir()] == ["s.zarr"]
    alone = entry.model_copy(update={"container": tmp_path / "alone.zarr"})
    make(alone)
    assert folder_bytes(entry.container) == folder_bytes(alone.container)

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "write", full)
    with pytest.raises(OSError, match="No space"):
        make(entry.model_copy(update={"container": tmp_path / "new" / "s.zarr"}))
    assert not list((tmp_path / "new").iterdir())


def test_several_processes_are_told_to_make_volumes_first(
    volume: Path,
    tmp_path: Path,
) -> None:
    entry = VolumeConfig(
        container=tmp_path / "s.zarr", synthetic=SyntheticConfig(shape=(6, 48, 48), seed=3)
    )
    plan = config_of(volume, tmp_path).model_copy(update={"volumes": [entry]})
    with pytest.raises(InputError, match=r"agq synthetic .*s\.zarr --shape 6,48,48 --seed 3"):
        ready(plan, print, alone=False)
    assert not entry.container.exists()


def test_checkpoints_are_shown_and_converted(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        call("checkpoint", "show", tmp_path / "absent.pth.tar")
    about = json.loads(call("checkpoint", "show", "demo", "--json"))
    assert about["config"]["input_shape"] == [17, 97, 97]
    assert about["provenance"]
    assert about["sha256"] == checkpoint.load("demo").file_sha256
    assert "learned_queries: 20" in call("checkpoint", "show", "demo")
    out = tmp_path / "copy.safetensors"
    assert str(out) in call("checkpoint", "convert", "demo", out)
    one, two = checkpoint.load("demo"), checkpoint.load(out)
    assert one.config == two.config
    assert all(torch.equal(value, two.state_dict[key]) for key, value in one.state_dict.items())
    assert two.provenance["converted_sha256"] == one.sha256
    assert two.provenance["data"] == one.provenance["data"]
    with pytest.raises(InputError, match="exists"):
        call("checkpoint", "convert", "demo", out)


def test_checkpoints_trained_on_from_the_same_weights_are_averaged(tmp_path: Path) -> None:
    demo = checkpoint.load("demo")
    files, weights = [], []
    for n, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(n)
        weights.append(
            {
                key: v + torch.randn(v.shape, generator=generator) if v.is_floating_point() else v
                for key, v in demo.state_dict.items()
            }
        )
        files.append(tmp_path / f"{name}.safetensors")
        checkpoint.save(files[-1], weights[-1], demo.config, {"background_margin": -4, "seed": n})
    out = tmp_path / "mean.safetensors"
    assert str(out) in call("checkpoint", "average", *files, "--output", out)
    mean = checkpoint.load(out)
    assert mean.config == demo.config
    for key, value in demo.state_dict.items():
        if value.is_floating_point():
            expected = sum(w[key].double() for w in weights) / 3
            torch.testing.assert_close(
                mean.state_dict[key].double(), expected, atol=1e-6, rtol=1e-6
            )
    assert mean.provenance["background_margin"] == -4
    assert [one["seed"] for one in mean.provenance["average_of"]] == [0, 1, 2]
    assert mean.provenance["average_of"][1]["sha256"] == checkpoint.load(files[1]).sha256
    with pytest.raises(InputError, match="exists"):
        call("checkpoint", "average", *files, "--output", out)
    with pytest.raises(InputError, match="two checkpoints or more"):
        call("checkpoint", "average", files[0], "--output", tmp_path / "x")
    cut = demo.config.model_copy(update={"min_affinity": 0.5})
    checkpoint.save(files[2], weights[2], cut, {"background_margin": 0})
    with pytest.raises(InputError, match=r"min_affinity 0\.5 / 0\.93, background_margin 0 / -4"):
        call("checkpoint", "average", *files, "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()
