"""Two processes of torchrun on CPUs (gloo): the same norms, gradients and files as one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agq.model import checkpoint
from agq.model.training.distributed import Ranks
from agq.model.training.loop import train
from agq.model.training.state import load_state
from tests.helpers.runs import ROOT
from tests.helpers.training import config_of, losses_of

pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", "2", str(ROOT / "tests" / "helpers" / "ddp_job.py")),
        *map(str, arguments),
    ]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: object) -> str:
    done = subprocess.run(
        command(*arguments),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_norms_of_two_processes_equal_one_norm_of_all(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, factor = (torch.randn((12, 4), generator=generator) * 3 for _ in range(2))
    # Far from 0, where a careless variance loses its digits. Not so the factor: the gradient of the
    # weight would be a small difference of large sums, and say nothing about the norm.
    x += 50
    weight, bias = (torch.randn(4, generator=generator) for _ in range(2))
    torch.save({"x": x, "factor": factor, "weight": weight, "bias": bias}, tmp_path / "whole.pt")
    torchrun("norms", tmp_path)
    layer = nn.BatchNorm1d(4, eps=1e-3)
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    x.requires_grad_()
    y = layer(x)
    (y * factor).sum().backward()
    one, two = torch.load(tmp_path / "found.pt", weights_only=True)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.cat([one[0], two[0]]), y.detach(), **close)
    torch.testing.assert_close(torch.cat([one[1], two[1]]), x.grad, **close)
    torch.testing.assert_close(one[2] + two[2], layer.weight.grad, **close)
    torch.testing.assert_close(one[3] + two[3], layer.bias.grad, **close)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(one[4][f"0.{key}"], value, **close)
        assert torch.equal(one[4][f"0.{key}"], two[4][f"0.{key}"])


def test_two_processes_train_like_one_with_twice_the_crops(
    volume: Path,
    tmp_path: Path,
) -> None:
    """With frozen norms a step depends on its crops alone: data and gradients are shared right."""
    frozen = {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "freeze_norm_after": 0.0}}
    whole = config_of(volume, tmp_path / "whole", steps=6, batch_size=2, **frozen)
    one = train(whole)
    pair = config_of(volume, tmp_path / "pair", steps=6, **frozen)
    (tmp_path / "pair.json").write_text(pair.model_dump_json())
    said = torchrun("train", tmp_path / "pair.json", "no", 6)
    assert sorted(line for line in said.splitlines() if "report" in line) == [
        "report False 6",
        "report True 6",
    ]
    np.testing.assert_allclose(
        losses_of(tmp_path / "pair"), losses_of(tmp_path / "whole"), rtol=2e-4
    )
    found = checkpoint.load(tmp_path / "pair" / "model.safetensors")
    assert found.provenance["batch_size"] == 2
    wanted = checkpoint.load(one.export).state_dict
    for key, value in wanted.items():
        torch.testing.assert_close(found.state_dict[key], value, rtol=1e-2, atol=2e-3)


def test_two_processes_resume_exactly(volume: Path, tmp_path: Path) -> None:
    for name in ("whole", "halves"):
        config = config_of(volume, tmp_path / name, steps=6, precision="bf16")
        (tmp_path / f"{name}.json").write_text(config.model_dump_json())
    torchrun("train", tmp_path / "whole.json", "no", 6)
    torchrun("train", tmp_path / "halves.json", "no", 3)
    torchrun("train", tmp_path / "halves.json", "resume", 6)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "halves")
    assert len(losses_of(tmp_path / "whole")) == 6
    files = [(tmp_path / name / "model.safetensors") for name in ("whole", "halves")]
    one, two = (checkpoint.load(file).state_dict for file in files)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_notice_stops_both_after_the_same_step(
    volume: Path,
    tmp_path: Path,
) -> None:
    config = config_of(volume, tmp_path / "run", steps=100_000)
    (tmp_path / "run.json").write_text(config.model_dump_json())
    started = subprocess.Popen(
        command("train", tmp_path / "run.json", "no", 100_000),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert started.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=60)
    finally:
        started.kill()
    reports = sorted(line.split() for line in said.splitlines() if "report" in line)
    state = load_state(tmp_path / "run" / "state.pt")
    assert [step for _, _, step in reports] == [str(state["step"])] * 2
    assert len(losses_of(tmp_path / "run")) == state["step"]


def test_a_process_alone_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.of_environment()
    assert ranks == Ranks(0, 1, 0)
    assert ranks.first
    assert ranks.agree(1.0, 2.0) == ranks.mean(1.0, 2.0) == (1.0, 2.0)
