import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agq.blockwise.predict.predictor import (
    factory_code,
    load_predictor,
    option_files,
    place_device,
    resolve_factory,
)
from agq.errors import InputError
from tests.helpers import fakes


def test_a_factory_is_called_with_its_options():
    predictor = load_predictor("tests.helpers.fakes:threshold", {"threshold": 9, "batch_size": 2})
    assert (predictor.threshold, predictor.batch_size) == (9, 2)
    (prediction,) = predictor.predict([np.full((2, 3, 4), 10, np.uint8)])
    assert prediction.labels.tolist() == np.ones((2, 3, 4)).tolist()
    assert resolve_factory("tests.helpers.fakes:threshold") is fakes.threshold


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tests.helpers.fakes", "expected 'module:callable'"),
        ("tests.helpers.fakes:a.b", "expected 'module:callable'"),
        ("tests.helpers.fakes:absent", "tests.helpers.fakes has no callable 'absent'"),
        ("tests.helpers.fakes:RAISE", "has no callable 'RAISE'"),
        ("no_such_module:f", "cannot import no_such_module: ModuleNotFoundError"),
        (
            "tests.helpers.fakes:not_a_predictor",
            r"made a object, which lacks predict\(\) or batch_size",
        ),
    ],
)
def test_bad_factories_are_named(factory, message):
    with pytest.raises(InputError, match=message):
        load_predictor(factory, {})


def test_a_module_that_ends_the_program_is_named(tmp_path, monkeypatch):
    (tmp_path / "script_without_guard.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot import script_without_guard: SystemExit: 0"):
        resolve_factory("script_without_guard:f")


def test_a_useless_batch_size_is_refused():
    with pytest.raises(InputError, match="batch_size 0"):
        load_predictor("tests.helpers.fakes:threshold", {"batch_size": 0})


def test_errors_of_the_factory_itself_pass():
    with pytest.raises(RuntimeError, match="no weights here"):
        load_predictor("tests.helpers.fakes:broken", {})


@pytest.mark.parametrize(
    ("device", "gpus", "index", "expected"),
    [
        ("cuda", 4, 6, "cuda:2"),
        ("cuda", 1, 3, "cuda:0"),
        ("auto", 2, 1, "cuda:1"),
        ("auto", 0, 1, "auto"),
        ("cuda", 0, 0, "cuda"),
        ("cuda:3", 4, 0, "cuda:3"),
        ("cpu", 4, 1, "cpu"),
    ],
)
def test_workers_share_the_gpus(monkeypatch, device, gpus, index, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    options = {"device": device, "other": 1}
    assert place_device(options, index) == {"device": expected, "other": 1}
    assert options["device"] == device
    assert place_device({}, index) == {}


def test_files_that_options_name_are_those_of_the_run(tmp_path):
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"one")
    options = {
        "weights": str(weights),
        "threshold": 9,
        "state": str(tmp_path),
        "broken_on": "x" * 999,
    }
    files = option_files(options)
    assert files.keys() == {"weights"}
    factory = "tests.helpers.fakes:reading"
    load_predictor(factory, options, files=files)
    weights.write_bytes(b"two")
    with pytest.raises(
        InputError, match=r"^weights .*w\.bin is not the file .* 3fc4ccfe7458\.\.\., not"
    ):
        load_predictor(factory, options, files=files)
    weights.unlink()
    with pytest.raises(InputError, match=r"^weights .* cannot be read"):
        load_predictor(factory, options, files=files)


def test_a_file_replaced_while_it_is_loaded_is_found(tmp_path, monkeypatch):
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"one")
    options = {"weights": str(weights)}

    def replacing(weights: str) -> fakes.ThresholdPredictor:
        Path(weights).write_bytes(b"two")
        return fakes.threshold()

    monkeypatch.setattr(fakes, "reading", replacing)
    with pytest.raises(InputError, match="is not the file that the run was started with"):
        load_predictor("tests.helpers.fakes:reading", options, files=option_files(options))


def test_the_code_of_a_factory_has_a_checksum(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    sums = []
    for text in ("def make(): ...\n", "def make(): ...\n", "def make(): return 1\n"):
        (tmp_path / "own_network.py").write_text(text)
        sums.append(factory_code("own_network:make"))
        sys.modules.pop("own_network")
    assert sums[0] == sums[1] != sums[2]
    assert factory_code("builtins:dict") is None
