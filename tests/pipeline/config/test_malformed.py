"""Configurations that are damaged, or made to do harm."""

import os
import random
from pathlib import Path

import pytest

from agq.model.training.config import TrainConfig
from agq.pipeline.config.schema import load_config
from agq.pipeline.config.yaml_settings import load_yaml
from tests.helpers import ROOT
from tests.helpers.fuzz import attack, odd_text, require_one_line

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "\n".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, MERGED, "a: &a [*a]", "&a {b: *a}", "[" * 200_000, "{a: " * 200_000),
        *("- " * 100_000, "a: " * 1000, "? " * 100_000, "a: " + "1:" * 10_000 + "1"),
        *("a: 0x" + "f" * 100_000, "a: " + "1" * 100_000, "a: !!int ''", "a: !!bool maybe"),
        *("a: !!timestamp x", "a: 9999999-99-99", "a: !!float ''", "? {a: 1}\n: 2", "? [1]\n: 2"),
        *("a: !!python/object/apply:os.system [id]", "a: \0", "a: \x1b[31m", "\ufeff", "a: .inf"),
        *(
            "%YAML 9.9\n---\na: 1",
            "a: 1\n---\nb: 2",
            "a: *nothing",
            "a: 1" + "0" * 400,
            "!!set {a}",
        ),
        *("run_dir: x\ninput: {raw: {path: a, voxel_size: [1e400, .nan, -.inf]}}",),
        f"run_dir: x\ninput: {{raw: {{path: a, voxel_size: [{2**70}, 1, 1]}}}}",
        "run_dir: x\nmodel: {options: {a: " + "1" * 4000 + "}}",
    ],
    ids=range(32),
)
def test_configurations_made_to_do_harm(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    assert str(path) in require_one_line(lambda: load_config(path))
    assert str(path) in require_one_line(lambda: load_yaml(TrainConfig, path))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["local", "fib25", "train-demo"])
def test_damaged_configurations(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.yaml"
    text = (ROOT / "configs" / f"{name}.yaml").read_bytes()
    lines = [line for line in text.split(b"\n") if not line.lstrip().startswith(b"#")]
    model = TrainConfig if name.startswith("train") else None

    def look(data: bytes) -> None:
        path.write_bytes(data)
        load_config(path) if model is None else load_yaml(model, path)

    def case(rng: random.Random) -> bytes:
        return odd_text(rng, b"\n".join(lines))

    assert attack(look, case, 60)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "huge", "binary"])
def test_what_is_no_configuration_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 2**42)
    elif kind == "binary":
        path.write_bytes(b"a: \xff\xfe")
    else:
        path.symlink_to("/dev/zero")
    assert str(path) in require_one_line(lambda: load_yaml(TrainConfig, path))
