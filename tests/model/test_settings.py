"""The settings of a predictor, and the identity of runs that earlier releases began."""

from types import SimpleNamespace
from typing import Any

import pytest

from agq.model.config import ModelConfig
from agq.model.settings import NetworkSettings, PredictorSettings

RECORDED = {
    "checkpoint_sha256": "c4bc",
    "device": "auto",
    "precision": "fp32",
    "seed_order": "label",
    "max_seeds": 100,
    "min_affinity": 0.93,
    "threads": 1,
}
"""What run.json of earlier releases holds, but for the factory."""


def identity(trained: dict[str, Any], **settings: Any) -> dict[str, Any]:
    checkpoint: Any = SimpleNamespace(sha256="c4bc", config=ModelConfig(**trained))
    return PredictorSettings(threads=1, **settings).identity(checkpoint)


def test_the_identity_is_what_earlier_releases_recorded():
    assert identity({"min_affinity": 0.93}) == RECORDED
    assert (
        identity({"min_affinity": 0.93}, flips="none", pieces="masks", mask_weight=0.5) == RECORDED
    )
    supervoxels = RECORDED | {"pieces": "supervoxels", "mask_weight": 0.3}
    assert identity({"min_affinity": 0.93}, pieces="supervoxels") == supervoxels
    assert identity({"min_affinity": 0.93, "pieces": "supervoxels"}) == supervoxels
    assert identity({"min_affinity": 0.93}, flips="all") == RECORDED | {"flips": "all"}


@pytest.mark.parametrize("name", sorted(PredictorSettings.model_fields))
def test_every_setting_that_can_change_a_byte_is_in_the_identity(name):
    other = {
        "device": "cpu", "precision": "bf16", "seed_order": "largest", "max_seeds": 7,
        "min_affinity": 0.5, "flips": "all", "pieces": "supervoxels", "threads": 2,
    }  # fmt: skip
    changes: dict[str, Any] = {name: other.get(name)}
    if name == "mask_weight":
        changes = {"pieces": "supervoxels", "mask_weight": 0.7}
    if name in ("checkpoint", "batch_size"):  # one is there by its checksum, one changes nothing
        assert name not in identity({})
        return
    values = {"threads": 1, **changes}
    checkpoint: Any = SimpleNamespace(sha256="c4bc", config=ModelConfig())
    assert PredictorSettings(**values).identity(checkpoint)[name] == changes[name]


def test_a_setting_overrides_the_network_only_if_it_is_given():
    trained = ModelConfig(max_seeds=7, flips="all")
    assert PredictorSettings().network(trained) == trained
    assert PredictorSettings(max_seeds=9).network(trained).max_seeds == 9
    assert PredictorSettings(flips="none").network(trained).flips == "none"


def test_settings_that_override_mean_what_they_override():
    shared = NetworkSettings.model_fields.keys() & ModelConfig.model_fields.keys()
    assert shared == {
        "seed_order", "max_seeds", "min_affinity", "flips", "pieces", "mask_weight"
    }  # fmt: skip
