"""Configurations are checked when they are made."""

import pytest

from agq.errors import InputError
from agq.model.config import ModelConfig


def test_defaults_are_the_published_network() -> None:
    config = ModelConfig()
    assert config.filters == (32, 64, 96, 128, 160)
    assert config.input_shape == (17, 257, 257)
    assert [config.kernel(i) for i in range(5)] == [(1, 3, 3)] * 3 + [(3, 3, 3)] * 2
    assert [config.stride(i) for i in range(5)] == [
        (1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2),
    ]  # fmt: skip


def test_json_round_trip() -> None:
    config = ModelConfig(filters=(16, 24, 32, 40, 48), embed_dim=32, seed_order="largest")
    assert ModelConfig.from_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"filters": (30, 64, 96, 128, 160)}, "filters 30 is not a multiple of norm_groups 8"),
        ({"filters": (32, 64)}, "isotropy has 5 levels but filters has 2"),
        ({"filters": (0, 64, 96, 128, 160)}, r"filters\.0: .*greater than or equal to 1"),
        ({"embed_dim": 60}, "embed_dim 60 is not a multiple of norm_groups"),
        ({"embed_dim": 24, "attention_heads": 5}, "not a multiple of attention_heads 5"),
        ({"input_shape": (17, 0, 257)}, "input_shape: .*positive"),
        ({"voxel_size": (-1.0, 6, 6)}, "voxel_size: .*positive"),
        ({"seed_order": "random"}, "seed_order: .*'label' or 'largest'"),
        ({"learned_queries": 0}, "learned_queries: .*greater than or equal to 1"),
        ({"min_mass": -1}, "min_mass"),
        ({"filtres": (32,)}, "filtres: Extra inputs are not permitted"),
    ],
)
def test_what_cannot_work_is_named(values: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig.from_values(values, "configuration")


def test_text_that_is_not_json() -> None:
    with pytest.raises(InputError, match=r"settings\.json is not JSON"):
        ModelConfig.from_json("{filters", "settings.json")


def test_configuration_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ModelConfig().embed_dim = 32  # type: ignore[misc]
