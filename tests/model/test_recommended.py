"""What a checkpoint recommends: written into its file, checked when it is read."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from agq.errors import InputError
from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.recommended import Recommended
from tests.helpers.networks import SMALL, jittered_network, write_checkpoint

CHOSEN = {
    "model.pieces": "supervoxels", "blocks.read_shape": (17, 193, 193),
    "stitch.across": 0.6, "stitch.within": 0.55, "stitch.min_size": 100,
}  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
def test_a_file_keeps_its_weights_and_what_it_is(tmp_path: Path, half: bool) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, jittered_network(), SMALL, {"seed": 0}, half=half)
    before, bare = checkpoint.load(path), path.read_bytes()
    assert before.recommended == Recommended()
    chosen = Recommended.of(CHOSEN, tissue="cortex, ssEM")
    checkpoint.recommend(path, chosen)
    after = checkpoint.load(path)
    assert after.recommended == chosen
    assert after.recommended.settings == CHOSEN
    assert after.sha256 == before.sha256 == before.file_sha256 != after.file_sha256
    assert (after.config, after.provenance) == (before.config, before.provenance)
    assert all(torch.equal(after.state_dict[k], v) for k, v in before.state_dict.items())
    checkpoint.recommend(path, Recommended())
    assert path.read_bytes() == bare
    written = tmp_path / "b.safetensors"
    checkpoint.save(written, jittered_network(), SMALL, {"seed": 0}, recommended=chosen, half=half)
    checkpoint.recommend(path, chosen)
    assert path.read_bytes() == written.read_bytes()


def test_published_files_get_the_published_rule(tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar"
    torch.save(jittered_network().state_dict(), path)
    assert checkpoint.load(path).recommended.settings == {
        "model.pieces": "masks", "blocks.read_shape": (17, 257, 257),
        "stitch.across": 0.7, "stitch.within": 1.0, "stitch.min_size": 0,
    }  # fmt: skip
    with pytest.raises(InputError, match="agq checkpoint convert makes one"):
        checkpoint.recommend(path, Recommended())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stitch": {"acros": 0.5}}, "stitch.acros"),
        ({"stitch": {"across": 1.5}}, "stitch.across: .*less than or equal to 1"),
        ({"stitch": {"across": "NaN"}}, "stitch.across: .*finite"),
        ({"blocks": {"read_shape": [17, 193]}}, "blocks.read_shape"),
        ({"blocks": {"read_shape": [2**20, 2**20, 2**20]}}, "read_shape has more than"),
        ({"model": {"pieces": "supervoxels"}}, "stitch.within below 1 goes with them"),
        ({"model": {"checkpoint": "/etc/passwd"}}, "model.checkpoint"),
        ({"tissue": "cortex\nagq: all is well"}, "tissue: .*line ends"),
        ({"notes": "x" * 301}, "notes"),
        ({"stitch": {"min_size": 2**70}}, "64 bits"),
        (["stitch"], "valid dictionary"),
    ],
)
def test_odd_values_are_refused_in_one_line(tmp_path: Path, values: Any, message: str) -> None:
    path = tmp_path / "model.safetensors"
    header = {"format_version": 1, "config": SMALL.model_dump(mode="json"), "recommended": values}
    state = {k: v.contiguous() for k, v in jittered_network().state_dict().items()}
    safetensors.torch.save_file(state, path, {"agq": json.dumps(header)})
    with pytest.raises(InputError, match=f"recommended settings in .*{message}") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_network_keeps_what_it_was_begun_with_unless_its_training_says_otherwise() -> None:
    config = ModelConfig(input_shape=(17, 97, 97))
    start = Recommended.of(CHOSEN, tissue="cortex", notes="chosen on it")
    assert Recommended().trained_on(Recommended(), config).settings == {
        "blocks.read_shape": (17, 97, 97)
    }
    assert start.trained_on(Recommended(), config) == Recommended.of(CHOSEN)
    own = Recommended.of({"stitch.across": 0.5}, tissue="retina")
    expected = Recommended.of({**CHOSEN, "stitch.across": 0.5}, tissue="retina")
    assert start.trained_on(own, config) == expected
    masks = Recommended.of({"model.pieces": "masks"})
    assert start.trained_on(masks, config).settings == {
        "model.pieces": "masks", "blocks.read_shape": (17, 97, 97)
    }  # fmt: skip


@pytest.mark.parametrize("name", checkpoint.BUNDLED)
def test_bundled_weights_recommend_what_they_were_measured_with(name: str) -> None:
    found = checkpoint.load(name).recommended
    pooled = {"stitch.contact_weight"} if name == "em" else set()
    assert set(found.settings) == {*CHOSEN, "model.mask_weight"} | pooled
    assert found.settings["model.pieces"] == "supervoxels"
    assert found.tissue


def test_runs_with_the_demo_weights_go_on() -> None:
    found = checkpoint.load("demo")
    # Of the file before it recommended anything: runs have recorded it.
    assert found.sha256 == "c4bcc263c9722b94ea624df0eebcc9def513009285df294aba99eb5e568e47ab"
    assert found.file_sha256 != found.sha256


def test_a_file_that_is_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.recommend(tmp_path / "absent", Recommended())
    path = write_checkpoint(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="corrupt"):
        checkpoint.recommend(path, Recommended())
