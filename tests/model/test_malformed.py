"""Checkpoints that are damaged, or made to do harm."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.training.state import load_state
from tests.helpers.fuzz import attack, odd_bytes, odd_document, require_one_line
from tests.helpers.networks import SMALL, jittered_network


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[bytes, bytes, bytes]:
    """The same small network as safetensors, and as both formats of torch."""
    folder = tmp_path_factory.mktemp("checkpoints")
    network = jittered_network()
    checkpoint.save(folder / "a", network, SMALL, {"steps": 1})
    torch.save({"state_dict": network.state_dict()}, folder / "b")
    torch.save(network.state_dict(), folder / "c", _use_new_zipfile_serialization=False)
    return tuple((folder / name).read_bytes() for name in "abc")  # type: ignore[return-value]


def with_header(data: bytes, change: Any) -> bytes:
    """Return a safetensors file with another header."""
    (length,) = struct.unpack_from("<Q", data)
    header = change(json.loads(data[8 : 8 + length]))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def with_description(data: bytes, change: Any) -> bytes:
    """Return a checkpoint of ours with another configuration or provenance."""

    def changed(header: dict[str, Any]) -> dict[str, Any]:
        described = header["__metadata__"]
        described["agq"] = json.dumps(change(json.loads(described["agq"])))
        return header

    return with_header(data, changed)


@pytest.mark.fuzz
def test_damaged_checkpoints(tmp_path, files):
    path = tmp_path / "model"

    def case(rng: random.Random) -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            return with_header(files[0], lambda header: odd_document(rng, header))
        if kind == 1:
            return with_description(files[0], lambda header: odd_document(rng, header))
        whole = rng.choice(files)
        if kind == 2:
            return odd_bytes(rng, whole, 4000)
        return odd_bytes(rng, whole[::-1], 4000)[::-1]  # a zip says at its end what it holds

    def look(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint.load(path)

    assert attack(look, case, 60)


@pytest.mark.fuzz
def test_damaged_training_states(tmp_path, files):
    path = tmp_path / "state"

    def look(data: bytes) -> None:
        path.write_bytes(data)
        load_state(path)

    assert attack(look, lambda rng: odd_bytes(rng, files[1], 4000), 20)


@pytest.mark.parametrize(
    "change",
    [
        *({"iterations": n} for n in (10**6, 2**70, -1, "x", None)),
        {"branch_layers": 10**6},
        {"mlp_ratio": 10**9},
        {"embed_dim": 2**40},
        {"embed_dim": 2**40, "norm_groups": 2**40, "attention_heads": 2**40},
        {"learned_queries": 10**9},
        {"filters": [8] * 10**5, "isotropy": [True] * 10**5},
        {"filters": [10**9, 10**9]},
        {"input_shape": [10**6] * 3},
        {"input_shape": [2**70, 1, 1]},
        {"voxel_size": [float("nan"), 1, 1]},
        {"min_mass": float("inf")},
        {"unknown": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_configurations_that_no_network_has(tmp_path, files, change):
    path = tmp_path / "model"
    path.write_bytes(
        with_description(files[0], lambda said: said | {"config": said["config"] | change})
    )
    line = require_one_line(lambda: checkpoint.load(path))
    assert str(path) in line
    assert next(iter(change)) in line or "64 bits" in line


@pytest.mark.parametrize("said", [[], 3, {"provenance": [1]}, {"format_version": None}])
def test_descriptions_that_are_none(tmp_path, files, said):
    path = tmp_path / "model"
    path.write_bytes(with_description(files[0], lambda _: said))
    assert str(path) in require_one_line(lambda: checkpoint.load(path))


def test_a_description_of_200000_levels(tmp_path, files):
    def deep(header: dict[str, Any]) -> dict[str, Any]:
        header["__metadata__"]["agq"] = "[" * 200_000 + "]" * 200_000
        return header

    path = tmp_path / "model"
    path.write_bytes(with_header(files[0], deep))
    assert "levels" in require_one_line(lambda: checkpoint.load(path))


def test_tensors_that_claim_more_than_the_file_has(tmp_path):
    path = tmp_path / "model"
    one = torch.zeros(())
    state = {key: one.expand(v.shape) for key, v in jittered_network().state_dict().items()}
    state["down_layers.0.1.0.weight"] = torch.zeros(1).expand(2**20, 2**20)
    torch.save(state, path)
    assert "claim" in require_one_line(lambda: checkpoint.load(path))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, device="meta"),
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3).to(torch.float8_e4m3fn),
    ],
    ids=["complex", "bool", "meta", "sparse", "float8"],
)
def test_tensors_that_are_no_weights(tmp_path, value):
    path = tmp_path / "model"
    torch.save({"a": value}, path)
    assert str(path) in require_one_line(lambda: checkpoint.load(path))


def test_a_checkpoint_that_unpacks_to_much_more(tmp_path, files):
    path, packed = tmp_path / "model", tmp_path / "packed"
    path.write_bytes(files[1])
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for info in one.infolist():
            other.writestr(info.filename, one.read(info))
        other.writestr("archive/data/9", bytes(2**24))
    assert "unpacks to" in require_one_line(lambda: checkpoint.load(packed))


def test_code_in_a_checkpoint_is_refused(tmp_path):
    class Code:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    data = io.BytesIO()
    torch.save({"state_dict": Code()}, data, pickle_module=pickle)
    for path in (tmp_path / "model", tmp_path / "state"):
        path.write_bytes(data.getvalue())
    require_one_line(lambda: checkpoint.load(tmp_path / "model"))
    require_one_line(lambda: load_state(tmp_path / "state"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "huge"])
def test_what_is_no_checkpoint_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**42)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    for read in (checkpoint.load, load_state):
        assert str(path) in require_one_line(lambda read=read: read(path))  # type: ignore[misc]


def test_every_limit_lets_useful_networks_pass():
    ModelConfig(filters=(64, 128, 256, 512), isotropy=(False, False, True, True), iterations=9)
