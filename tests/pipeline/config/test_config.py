"""The configuration: good files pass, bad ones get one line that names the field and the fix."""

from pathlib import Path

import pytest
import yaml

from agq.errors import InputError
from agq.pipeline.config.schema import Config, load_config, masked, parse_config
from tests.helpers import ROOT

CONFIGS = ROOT / "configs"
MINIMAL = {"run_dir": "runs/x", "input": {"raw": {"path": "x.zarr", "dataset": "raw"}}}


def with_value(path: str, value: object) -> dict:
    data = yaml.safe_load(yaml.safe_dump(MINIMAL))
    node = data
    *parents, last = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return data


def test_defaults_are_the_published_setting():
    config = parse_config(MINIMAL)
    assert config.blocks.before == (0, 0, 0)
    assert config.blocks.after == (1, 1, 1)
    assert (config.stitch.across, config.stitch.within) == (0.7, 1.0)
    assert config.model.precision == "fp32"


@pytest.mark.parametrize("name", ["demo.yaml", "local.yaml", "ac4.yaml", "slurm.yaml"])
def test_shipped_configs_are_valid(name):
    assert load_config(CONFIGS / name).run_dir


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            "model.chekpoint",
            "x",
            "unknown key 'model.chekpoint' (did you mean 'model.checkpoint'?)",
        ),
        ("wrokers", {}, "unknown key 'wrokers' (did you mean 'workers'?)"),
        ("input.raw.datset", "r", "did you mean 'input.raw.dataset'?"),
        ("input.mask.paht", "r", "did you mean 'input.mask.path'?"),
        ("stitch.dask.adress", "r", "did you mean 'stitch.dask.address'?"),
        ("zzzz", 1, "valid keys: blocks, evaluate, input"),
        ("stitch.across", 1.5, "stitch.across: Input should be less than or equal to 1 (got 1.5)"),
        ("workers.count", 0, "workers.count"),
        ("blocks.read_shape", [17, 257], "blocks.read_shape"),
        ("model.precision", "fp8", "model.precision"),
        ("input.roi", {"offset": [0, 0, 0], "shape": [0, 1, 1]}, "input.roi.shape"),
        ("ledger.databse", "x", "did you mean 'ledger.database'?"),
    ],
)
def test_errors_name_the_field(path, value, expected):
    with pytest.raises(InputError) as error:
        parse_config(with_value(path, value))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_context_must_leave_something_to_write():
    data = with_value(
        "blocks", {"read_shape": [4, 64, 64], "before": [2, 0, 0], "after": [2, 0, 0]}
    )
    with pytest.raises(InputError, match="read_shape 4 on z leaves nothing to write"):
        parse_config(data)


def test_every_problem_is_listed_at_once():
    data = with_value("model.chekpoint", "x")
    del data["run_dir"]
    with pytest.raises(InputError, match=r"run_dir is missing.*chekpoint|chekpoint.*run_dir is"):
        parse_config(data)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file with variables of which one is set."""
    monkeypatch.setenv("RAW_FOLDER", "/${ROOT}")
    for name in ("ROOT", "LEVEL", "NOT_SET"):
        monkeypatch.delenv(name, raising=False)
    data = with_value("input.raw.path", "${RAW_FOLDER}/v.zarr")
    data["input"]["raw"]["level"] = "${LEVEL:-2}"
    data["run_dir"] = "${NOT_SET}/run"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "c.yaml"


def test_environment_variables_in_values(file):
    config = load_config(file, ["run_dir=${RAW_FOLDER}-${LEVEL:-x}"])
    assert config.input.raw.path == "/${ROOT}/v.zarr"
    assert config.input.raw.level == 2
    assert config.run_dir == "/${ROOT}-x"
    # A record of it is taken as it is, and so is a configuration that a program hands over.
    assert parse_config(masked(config)) == config
    assert parse_config(with_value("input.raw.path", "${NOT_SET}")).input.raw.path == "${NOT_SET}"


def test_missing_environment_variable_names_field_and_variable(file):
    with pytest.raises(InputError, match="run_dir: the environment variable NOT_SET"):
        load_config(file)
    with pytest.raises(InputError, match=r"input\.raw\.path: the environment variable NOT_SET"):
        load_config(file, ["run_dir=x", "input.raw.path=${NOT_SET}"])


def test_secrets_are_not_in_records_or_errors():
    uri = "mongodb://user:hunter2@host/"
    config = parse_config(with_value("ledger.uri", uri))
    assert config.ledger is not None
    assert config.ledger.uri is not None
    assert config.ledger.uri.get_secret_value() == uri
    assert "hunter2" not in str(masked(config)) + repr(config)
    with pytest.raises(InputError) as error:
        parse_config(with_value("ledger", {"uri": uri, "timeout_s": uri}))
    assert "hunter2" not in str(error.value)


def test_certificates_are_found_from_another_folder(tmp_path, monkeypatch):
    files = {f"{name}_file": f"{name}.pem" for name in ("ca", "cert", "key")}
    monkeypatch.chdir(tmp_path)
    config = parse_config(with_value("stitch.dask", {"address": "tls://host:1", **files}))
    recorded = masked(config)
    assert recorded["stitch"]["dask"]["ca_file"] == str(tmp_path / "ca.pem")
    monkeypatch.chdir("/")
    assert masked(parse_config(recorded)) == recorded


def test_a_recorded_configuration_reads_back():
    config = parse_config(with_value("input.roi", {"offset": [0, 0, 0], "shape": [8, 8, 8]}))
    recorded = masked(config)
    assert recorded["input"]["raw"]["path"] == str(Path("x.zarr").absolute())
    assert masked(parse_config(recorded)) == recorded


def test_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(file, ["workers.count=3", "stitch.across=0.5", "run_dir=elsewhere"])
    assert (config.workers.count, config.stitch.across, config.run_dir) == (3, 0.5, "elsewhere")
    with pytest.raises(InputError, match="expected section"):
        load_config(file, ["workers"])
    with pytest.raises(InputError, match="run_dir is a value"):
        load_config(file, ["run_dir.x=1"])
    for value in ("[x", "2024-13-45"):
        with pytest.raises(
            InputError, match=r"^--set input\.raw\.path: the value is not valid YAML"
        ):
            load_config(file, [f"input.raw.path={value}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
    ],
)
def test_unreadable_files(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=expected):
        load_config(file)


def test_a_key_that_stands_twice_is_named(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("run_dir: a\nworkers:\n  count: 1\n  prefetch: 2\n  count: 4\n")
    with pytest.raises(
        InputError, match=r"twice\.yaml: .*count .* a second time .*line 5"
    ) as caught:
        load_config(path)
    assert "prefetch" not in str(caught.value)
    path.write_text("run_dir: a\nrun_dir: b\n")
    with pytest.raises(InputError, match=r"run_dir .* line 2"):
        load_config(path)
    with pytest.raises(InputError, match=r"--set workers: .*count .* a second time"):
        load_config(CONFIGS / "local.yaml", ["workers={count: 1, count: 2}"])


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_schema_describes_every_field():
    schema = Config.model_json_schema()
    undescribed = [
        f"{name}.{field}"
        for name, section in {**schema["$defs"], "Config": schema}.items()
        for field, entry in section["properties"].items()
        if "description" not in entry
    ]
    assert not undescribed
