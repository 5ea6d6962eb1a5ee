"""Checkpoints: what loads, and what is said of those that do not."""

import collections
from pathlib import Path

import pytest
import safetensors.torch
import torch

from agq.errors import InputError
from agq.model import checkpoint
from agq.model.config import ModelConfig
from tests.helpers.networks import SMALL, jittered_network, write_checkpoint


def test_round_trip(tmp_path: Path) -> None:
    network = jittered_network()
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, network, SMALL, {"steps": 3, "data": ["a", "b"]})
    loaded = checkpoint.load(path)
    assert loaded.config == SMALL
    assert loaded.provenance == {"steps": 3, "data": ["a", "b"]}
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in network.state_dict().items())
    assert len(loaded.sha256) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        checkpoint.save(tmp_path / name, jittered_network(), SMALL, {"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert checkpoint.load(tmp_path / "a").sha256 == checkpoint.load(tmp_path / "b").sha256


def test_half_precision_file(tmp_path: Path) -> None:
    network = jittered_network()
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    checkpoint.save(full, network, SMALL)
    checkpoint.save(half, network.state_dict(), SMALL, half=True)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded = checkpoint.load(half).state_dict
    for key, value in network.state_dict().items():
        assert loaded[key].dtype == value.dtype
        assert torch.allclose(loaded[key], value, rtol=1e-3, atol=1e-6), key


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_layouts(tmp_path: Path, wrap: bool, prefix: str) -> None:
    network = jittered_network()
    state = collections.OrderedDict((prefix + k, v) for k, v in network.state_dict().items())
    path = tmp_path / "model.pth.tar"
    torch.save({"state_dict": state, "epoch": 3} if wrap else state, path)
    loaded = checkpoint.load(path)
    inferred = ModelConfig(filters=SMALL.filters, embed_dim=32, learned_queries=12)
    assert loaded.config == inferred
    assert checkpoint.load(path, SMALL).config == SMALL
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in network.state_dict().items())


def test_older_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    state = jittered_network().state_dict()
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    assert checkpoint.load(path).config.filters == SMALL.filters


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(
            filters=(8, 16, 24), isotropy=(False, True, True), embed_dim=16, iterations=1,
            branch_layers=2, mlp_ratio=2, learned_queries=7,
        ),
        ModelConfig(filters=(16, 24, 32, 40, 48), embed_dim=32),
    ],
)  # fmt: skip
def test_config_is_inferred_from_shapes(config: ModelConfig) -> None:
    assert checkpoint.infer_config(jittered_network(config).state_dict()) == config


def test_one_error_names_every_key(tmp_path: Path) -> None:
    state = dict(jittered_network().state_dict())
    del state["conv_in.0.weight"], state["affinity_branch.projection.bias"]
    state["mask_branch.projection.bias"] = torch.zeros(7)
    state["extra.weight"] = torch.zeros(1)
    state["more.weight"] = torch.zeros(1)
    path = tmp_path / "model.pt"
    torch.save(state, path)
    with pytest.raises(InputError) as error:
        checkpoint.load(path)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "missing: conv_in.0.weight, affinity_branch.projection.bias",
        "unexpected: extra.weight, more.weight",
        "wrong shape: mask_branch.projection.bias (7,) instead of (32,)",
        str(path),
    ):
        assert part in message
    with pytest.raises(InputError, match="missing: conv_in"):
        checkpoint.save(tmp_path / "out.safetensors", state, SMALL)
    assert not (tmp_path / "out.safetensors").exists()


def test_config_of_another_architecture(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="wrong shape: conv_in"):
        checkpoint.load(path, ModelConfig())


class Surprise:
    """Unpickling this runs code."""

    def __reduce__(self) -> tuple:
        return (Path("surprise").mkdir, ())


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": jittered_network().state_dict(), "x": Surprise()}, "model.pth.tar")
    with pytest.raises(InputError, match="holds Python objects"):
        checkpoint.load("model.pth.tar")
    assert not Path("surprise").exists()


@pytest.mark.parametrize("kind", ["safetensors", "pt", "old"])
@pytest.mark.parametrize("damage", ["cut", "cut early", "start", "empty", "text"])
def test_corrupt_files(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / "model"
    if kind == "safetensors":
        write_checkpoint(path)
    else:
        torch.save(
            {"state_dict": jittered_network().state_dict()}, path,
            _use_new_zipfile_serialization=kind == "pt",
        )  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[: len(data) * 2 // 3], "cut early": data[:40], "empty": b"",
            "start": b"\x00\x01\x02\x03" + data[4:], "text": b"this is not a checkpoint",
        }[damage]
    )  # fmt: skip
    with pytest.raises(InputError, match=f"checkpoint {path} ") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_damaged_header(tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in jittered_network().state_dict().items()}
    path = tmp_path / "model.safetensors"
    for header, message in (
        ("{", "is corrupt"),
        ('{"format_version": 99}', "update agq-pipeline"),
        ('{"format_version": 1, "config": {"filters": "many"}}', "configuration in .*: filters: "),
    ):
        safetensors.torch.save_file(state, path, {"agq": header})
        with pytest.raises(InputError, match=message):
            checkpoint.load(path)


def test_safetensors_without_our_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(jittered_network().state_dict(), path)
    assert checkpoint.load(path).config.filters == SMALL.filters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1)}, "not an AGQ checkpoint"),
        ({"epoch": 3}, "entries that are not tensors: epoch"),
        ([1, 2], "holds no state dict"),
        ({}, "holds no state dict"),
    ],
)
def test_other_content(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path / "model.pt")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    state = dict(jittered_network().state_dict())
    state["conv_in.1.bias"] = torch.full_like(state["conv_in.1.bias"], float("nan"))
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"NaN or infinite values in conv_in\.1\.bias"):
        checkpoint.load(tmp_path / "model.pt")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.load(tmp_path)


def test_bundled_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.BUNDLED["demo"] == "demo.safetensors"
    monkeypatch.setattr(checkpoint, "BUNDLED", {"absent": "absent.safetensors"})
    with pytest.raises(InputError, match="absent does not exist"):
        checkpoint.resolve("absent")
    path = write_checkpoint(tmp_path / "mine.safetensors")
    assert checkpoint.resolve(str(path)) == path


@pytest.mark.parametrize("name", checkpoint.BUNDLED)
def test_bundled_weights_are_small_and_say_where_they_come_from(name: str) -> None:
    path = checkpoint.resolve(name)
    assert path.stat().st_size <= 10 * 2**20
    loaded = checkpoint.load(name)
    assert {"data", "iterations", "hardware", "hours"} <= set(loaded.provenance)
    assert f"`{path.name}`" in (path.parent / "README.md").read_text(encoding="utf-8")
