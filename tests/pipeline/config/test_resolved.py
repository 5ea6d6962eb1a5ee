"""Settings come from the configuration, else from the checkpoint, else they are the defaults."""

from typing import Any

import pytest

from agq.model.config import ModelConfig
from agq.model.recommended import Recommended
from agq.pipeline.config.resolved import resolve, takes, told
from agq.pipeline.config.schema import Config, parse_config

CHOSEN = Recommended.of(
    {
        "model.pieces": "supervoxels", "blocks.read_shape": [17, 193, 193],
        "stitch.across": 0.6, "stitch.within": 0.55, "stitch.min_size": 100,
    }
)  # fmt: skip
TRAINED = ModelConfig(input_shape=(17, 129, 129))


def config(**sections: Any) -> Config:
    return parse_config({"run_dir": "r", "input": {"raw": {"path": "x.zarr"}}, **sections})


def test_what_is_left_open_comes_from_the_checkpoint_or_is_the_default():
    found, origins = resolve(config(stitch={"across": 0.7}), CHOSEN, TRAINED)
    assert found.model.pieces == "supervoxels"
    assert found.blocks.read_shape == (17, 193, 193)
    assert (found.stitch.across, found.stitch.within, found.stitch.min_size) == (0.7, 0.55, 100)
    assert {name: entry["from"] for name, entry in origins.items()} == {
        "model.pieces": "checkpoint",
        "model.mask_weight": "checkpoint",
        "model.normalise": "default",
        "blocks.read_shape": "checkpoint",
        "stitch.across": "configuration",
        "stitch.within": "checkpoint",
        "stitch.contact_weight": "default",
        "stitch.min_size": "checkpoint",
    }
    assert told(origins) == [
        ("configuration", "across 0.7"),
        (
            "checkpoint",
            "pieces supervoxels, mask_weight 0.3, read_shape 17 x 193 x 193, within 0.55, "
            "min_size 100",
        ),
        ("default", "normalise none, contact_weight voxels"),
    ]


def test_without_recommendations_nothing_changes():
    written = config(blocks={"after": [0, 0, 0]})
    found, origins = resolve(written, Recommended(), TRAINED)
    assert found == written
    assert origins["blocks.read_shape"] == {"value": (17, 129, 129), "from": "checkpoint"}
    assert origins["stitch.across"] == {"value": 0.7, "from": "default"}
    assert "blocks.read_shape" not in resolve(written, Recommended())[1]


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"pieces": "masks"}},
        {"model": {"pieces": None}},
        {"model": {"min_affinity": 0.9}},
        {"stitch": {"across": 0.7, "within": 1.0}},
    ],
)
def test_a_configuration_for_other_pieces_takes_none_of_them(sections):
    written = config(**sections)
    assert not takes(written, CHOSEN)
    assert resolve(written, CHOSEN, TRAINED)[0] == written


@pytest.mark.parametrize(
    "sections", [{}, {"model": {"pieces": "supervoxels"}}, {"stitch": {"within": 0.9}}]
)
def test_a_configuration_for_the_same_pieces_takes_the_rest(sections):
    assert takes(config(**sections), CHOSEN)
    assert resolve(config(**sections), CHOSEN)[0].blocks.read_shape == (17, 193, 193)


def test_what_is_resolved_stays_so():
    found, _ = resolve(config(), CHOSEN, TRAINED)
    again = parse_config(found.model_dump())
    assert resolve(again, Recommended(), TRAINED)[0] == found
