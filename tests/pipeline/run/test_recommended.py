"""Runs take what their checkpoint recommends, say so, and keep it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from agq.errors import InputError
from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.recommended import Recommended
from agq.pipeline.config.recorded import read_target
from agq.pipeline.config.schema import load_config
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.prepare import prepare, prepare_stitch
from agq.pipeline.run.session import open_session
from tests.helpers.networks import jittered_network
from tests.helpers.runs import blobs, write_volume

CHOSEN = {
    "model.pieces": "supervoxels",
    "blocks.read_shape": [9, 33, 33],
    "stitch.across": 0.6,
    "stitch.within": 0.55,
}
TRAINED = ModelConfig(
    filters=(8, 8, 8), isotropy=(False, False, True), embed_dim=8, norm_groups=4,
    attention_heads=2, branch_layers=1, learned_queries=6, input_shape=(5, 33, 33),
    voxel_size=(30, 6, 6),
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    checkpoint.save(file, jittered_network(TRAINED), TRAINED, recommended=Recommended.of(CHOSEN))
    return file


@pytest.fixture
def written(weights: Path, tmp_path: Path) -> Path:
    """A configuration as short as it may be, and a copy of the weights beside it."""
    write_volume(tmp_path / "in.zarr", "raw", blobs((9, 40, 40)))
    file = tmp_path / "small.safetensors"
    file.write_bytes(weights.read_bytes())
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "input": {"raw": {"path": str(tmp_path / "in.zarr"), "dataset": "raw"}},
        "model": {"checkpoint": str(file), "device": "cpu"},
    }
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def begin(config: Path, *settings: str) -> dict[str, Any]:
    """Open the run as a command does; return its record."""
    prepared = prepare(load_config(config, list(settings)))
    with open_session(prepared, on_progress=None):
        return prepared.run.record()


def origins(record: dict[str, Any]) -> dict[str, str]:
    return {name: entry["from"] for name, entry in record["settings"].items()}


def as_an_earlier_release(run: Path) -> None:
    """Take out of a record what earlier releases did not write."""
    file = run / "run.json"
    record = json.loads(file.read_text())
    del record["settings"], record["recommended"]
    file.write_text(json.dumps(record))


def test_a_run_takes_them_records_them_and_goes_on_in_the_same_words(written):
    record = begin(written, "stitch.across=0.65")
    assert record["identity"]["model"]["pieces"] == "supervoxels"
    assert record["identity"]["grid"]["write_shape"] == [8, 32, 32]
    assert record["config"]["stitch"]["within"] == 0.55
    assert record["recommended"]["stitch"] == {"across": 0.6, "within": 0.55}
    expected = {
        "model.pieces": "checkpoint", "model.mask_weight": "checkpoint",
        "model.normalise": "default", "blocks.read_shape": "checkpoint",
        "stitch.across": "configuration", "stitch.within": "checkpoint",
        "stitch.contact_weight": "default", "stitch.min_size": "default",
    }  # fmt: skip
    assert origins(record) == expected
    run = Path(record["config"]["run_dir"])
    # From the folder, too, they are not what the user has written.
    again = prepare_stitch(read_target(run, ["stitch.min_size=5"]))
    assert again.raw is None
    with open_session(again, on_progress=None):
        record = again.run.record()
    assert origins(record) == expected | {"stitch.min_size": "configuration"}
    assert record["config"]["stitch"]["within"] == 0.55


def test_what_a_checkpoint_recommends_may_change_and_a_run_keeps_what_it_was_begun_with(written):
    first = begin(written)
    file = written.parent / "small.safetensors"
    checkpoint.recommend(file, Recommended.of({**CHOSEN, "blocks.read_shape": [5, 33, 33]}))
    assert begin(written)["identity"] == first["identity"]
    new = begin(written, f"run_dir={written.parent / 'new'}")["identity"]
    assert new["grid"]["write_shape"] == [4, 32, 32]
    assert new["model"] == first["identity"]["model"]


@pytest.mark.parametrize("recommends", [True, False])
def test_runs_of_earlier_releases_go_on_with_what_they_had(written, recommends):
    file = written.parent / "small.safetensors"
    checkpoint.recommend(file, Recommended())
    plain = begin(written)
    assert "pieces" not in plain["identity"]["model"]
    as_an_earlier_release(written.parent / "run")
    if recommends:
        checkpoint.recommend(file, Recommended.of(CHOSEN))
    assert begin(written)["identity"] == plain["identity"]
    config = read_target(written.parent / "run")
    assert prepare_stitch(config).identity == plain["identity"]


def test_a_configuration_for_masks_has_the_blocks_it_always_had(written):
    file = written.parent / "small.safetensors"
    masks = ("stitch.across=0.7", "stitch.within=1.0")
    with_them = prepare(load_config(written, list(masks)))
    assert any("takes none of them" in note for note in with_them.notes)
    checkpoint.recommend(file, Recommended())
    assert prepare(load_config(written, list(masks))).identity == with_them.identity


def test_a_record_with_odd_recommendations_is_one_line(written):
    run = RunFolder(Path(begin(written)["config"]["run_dir"]))
    for odd in ({"stitch": {"across": "no"}}, {"model": {"checkpoint": "x"}}):
        run.update(recommended=odd)
        with pytest.raises(InputError, match=r"run\.json: recommended: (stitch|model)"):
            prepare(load_config(written))
    run.update(recommended={}, settings={"stitch.across": {"value": 1, "from": "me"}})
    with pytest.raises(InputError, match=r"is damaged: settings\.stitch\.across"):
        prepare(load_config(written))


def test_plan_says_where_settings_come_from_and_the_command_writes_them(written, main):
    file = written.parent / "small.safetensors"
    code, said, err = main("checkpoint", "recommend", file, "--set", "stitch.min_size=50",
                           "--set", "tissue=blobs")  # fmt: skip
    assert code == 0, err
    assert "stitch.min_size: 50" in said
    assert "stitch.across: 0.6" in said
    code, said, err = main("plan", written, "--no-time", "--set", "stitch.across=0.65")
    assert code == 0, err
    plain = " ".join(said.split())
    assert "from configuration across 0.65" in plain
    assert "pieces supervoxels, mask_weight 0.3, read_shape 9 x 33 x 33, within 0.55" in plain
    code, said, _ = main("checkpoint", "show", file)
    assert "tissue: blobs" in said
    code, _, err = main("checkpoint", "recommend", file, "--set", "stitch.acros=0.5")
    assert code == 2
    assert "did you mean 'stitch.across'?" in err
    begin(written, "stitch.across=0.45")
    main("checkpoint", "recommend", file, "--run", written.parent / "run")
    found = checkpoint.load(file).recommended
    assert found.settings["stitch.across"] == 0.45
    assert found.tissue == "blobs"
