"""`agq config explain`: every setting in words."""

import pytest

from agq.errors import InputError
from agq.model.training.config import TrainConfig
from agq.pipeline.config.explain import find, settings_of
from agq.pipeline.config.schema import Config

RUN = settings_of(Config)


@pytest.mark.parametrize(
    ("key", "kind", "default"),
    [
        ("stitch.min_size", "whole number at least 0", "0"),
        ("workers.timeout_s", "whole number above 0", None),
        ("input.raw.voxel_size", "3 × whole number above 0", "none"),
        ("output.affinities", "true or false", "false"),
        ("run_dir", "text", "required"),
        ("model.precision", "`fp32` or `bf16` or `fp16`", "fp32"),
        ("stitch.dask", "section", "see there"),
        ("evaluate", "section", "none"),
    ],
)
def test_type_limits_and_default(key, kind, default):
    (setting,) = find(RUN, key)
    assert (setting.key, setting.kind) == (key, kind)
    assert default is None or setting.default == default
    assert setting.meaning


def test_a_section_has_its_fields_and_the_last_part_of_a_name_is_enough():
    (stitch,) = find(RUN, "stitch")
    assert {"across", "within", "dask"} <= {field.name for field in stitch.fields}
    assert [setting.key for setting in find(RUN, "across")] == ["stitch.across"]
    assert "input.mask.path" in [setting.key for setting in find(RUN, "path")]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("stitch.acros", "did you mean stitch.across?"),
        ("inputs.raw", "did you mean input.raw?"),
        ("voxelsize", "voxel_size?"),
        ("qqqq", "lists the sections"),
    ],
)
def test_a_wrong_name_leads_to_the_nearest(key, hint):
    with pytest.raises(InputError, match=key) as error:
        find(RUN, key)
    assert hint in str(error.value)


@pytest.mark.parametrize("model", [Config, TrainConfig])
def test_every_setting_says_what_it_means(model):
    silent = [s.key for s in settings_of(model).walk() if s.key and not s.meaning]
    assert not silent
