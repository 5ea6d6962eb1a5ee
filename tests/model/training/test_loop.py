"""The loop: gradients, exact resume, stopping, exports."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agq.errors import InputError
from agq.model import checkpoint
from agq.model.network.agq import AGQ
from agq.model.training.config import OptimizerConfig
from agq.model.training.half import HalfRunner
from agq.model.training.loop import forecast, train
from agq.model.training.state import Ema, load_state
from agq.model.training.trainer import Trainer, learning_rate, progress
from tests.helpers.training import NETWORK, config_of, losses_of


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_equal_ten_and_ten_more(volume: Path, tmp_path: Path, precision: str) -> None:
    whole = train(config_of(volume, tmp_path / "whole", precision=precision))
    halves = config_of(volume, tmp_path / "halves", precision=precision)
    assert not train(halves, max_steps=10).finished
    resumed = train(halves, resume=True)
    assert whole.finished
    assert resumed.finished
    assert resumed.step == 20
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "halves")
    one, two = (checkpoint.load(report.export) for report in (whole, resumed))
    assert all(torch.equal(one.state_dict[key], two.state_dict[key]) for key in one.state_dict)


def test_the_loss_falls(volume: Path, tmp_path: Path) -> None:
    train(config_of(volume, tmp_path, steps=60))
    losses = losses_of(tmp_path)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize(
    ("changes", "step_s", "device", "said", "advised"),
    [
        ({"steps": 200_000}, 84.0, "cpu", "200,000 steps take about 194.4 days", True),
        ({"steps": 200_000}, 84.0, "cuda", "84 s on this cuda", False),
        ({"steps": 20_000}, 1.0, "cpu", "20,000 steps take about 5.6 hours", False),
        (
            {"steps": 20_000, "time_budget_minutes": 70}, 1.0, "cpu",
            "ends it in 70.0 minutes, after about 4,200 of 20,000 steps", False,
        ),
        (
            {"steps": 20_000, "time_budget_minutes": 70}, 84.0, "cpu",
            "after about 50 of 20,000 steps", True,
        ),
        ({"steps": 20, "time_budget_minutes": 70}, 1.0, "cpu", "20 steps take about 20 s", False),
    ],
)  # fmt: skip
def test_what_a_training_will_take_is_said_with_what_fits_a_cpu(
    volume: Path, tmp_path: Path, changes: dict[str, object], step_s: float, device: str,
    said: str, advised: bool,
) -> None:  # fmt: skip
    line = forecast(config_of(volume, tmp_path, **changes), step_s, 0, 0.0, device)
    assert said in line
    assert ("configs/train-demo.yaml" in line) is advised


def test_it_is_said_once_after_the_first_steps(volume: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(config_of(volume, tmp_path), max_steps=7, say=said.append)
    assert len(said) == 1
    assert "15 steps take about" in said[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_reach_every_parameter(volume: Path, tmp_path: Path, precision: str) -> None:
    trainer = Trainer(config_of(volume, tmp_path, precision=precision))
    seeds = 0.0
    touched = {name: 0.0 for name, _ in trainer.network.named_parameters()}
    for step in range(3):
        seeds += trainer.train_step(trainer.source.batch(step))["seeds"]
        for name, parameter in trainer.network.named_parameters():
            assert parameter.grad is not None, name
            touched[name] += float(parameter.grad.abs().sum())
    assert seeds > 0
    assert [name for name, total in touched.items() if total == 0] == []


def test_half_precision_stays_close_to_full() -> None:
    torch.manual_seed(0)
    network = AGQ(NETWORK)
    x = torch.randn(1, 1, 5, 33, 33)
    exact = network(x)
    rough = HalfRunner(network)(x)
    assert rough.affinity_logits.dtype == torch.bfloat16
    difference = (rough.affinity_logits.float() - exact.affinity_logits).abs().mean()
    assert float(difference.detach()) < 0.03
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_norms_freeze_late_in_the_schedule(volume: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        config_of(volume, tmp_path, optimizer={"freeze_norm_after": 0.5, "warmup_steps": 0})
    )
    norm = trainer.network.inst_decoder.rpn.norm_logits
    trainer.train_step(trainer.source.batch(0))
    counted = int(norm.num_batches_tracked)  # type: ignore[arg-type]
    trainer.step = 15
    trainer.train_step(trainer.source.batch(15))
    assert int(norm.num_batches_tracked) == counted > 0  # type: ignore[arg-type]


def test_validation_keeps_the_best_export(volume: Path, tmp_path: Path) -> None:
    config = config_of(
        volume, tmp_path, validation=[{"container": volume}], validation_crops=2, steps=4
    )
    report = train(config)
    assert report.best is not None
    assert report.best_error is not None
    assert 0 <= report.best_error <= 1
    loaded = checkpoint.load(report.best)
    assert loaded.config == NETWORK
    assert loaded.provenance["iterations"] == 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_error"] == report.best_error
    assert rows[-1]["val_truth"] > 1


def test_a_run_can_start_from_a_checkpoint(volume: Path, tmp_path: Path) -> None:
    first = train(config_of(volume, tmp_path / "one", steps=2))
    second = Trainer(config_of(volume, tmp_path / "two", init_from=first.export))
    saved = checkpoint.load(first.export).state_dict
    assert all(torch.equal(saved[k].to(v.dtype), v) for k, v in second.network.state_dict().items())
    assert second.step == 0


def test_a_start_from_an_export_takes_its_background_margin_back(
    volume: Path, tmp_path: Path
) -> None:
    first = train(config_of(volume, tmp_path / "one", steps=2, background_margin=-4.0))
    second = Trainer(config_of(volume, tmp_path / "two", init_from=first.export))
    trained = load_state(tmp_path / "one" / "state.pt")["ema"]
    for key, value in second.network.state_dict().items():
        torch.testing.assert_close(value, trained[key].to(value.dtype), rtol=2e-3, atol=1e-4)


def test_a_background_margin_lowers_the_last_query_logits_alone(
    volume: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 5, 33, 33)
    logits = []
    for margin in (0.0, 1.5):
        trainer = Trainer(config_of(volume, tmp_path, background_margin=margin))
        path = trainer.export(tmp_path / f"{margin}.safetensors")
        network = AGQ(NETWORK).eval()
        network.load_state_dict({k: v.float() for k, v in checkpoint.load(path).state_dict.items()})
        with torch.no_grad():
            logits.append([items[0] for items in network(x).predictions])
    for k, (plain, lowered) in enumerate(zip(*logits, strict=True)):
        expected = 1.5 if k == NETWORK.iterations else 0.0
        torch.testing.assert_close(plain[0], lowered[0])
        torch.testing.assert_close(plain[1:] - expected, lowered[1:])


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_leaves_a_state_to_go_on_from(
    volume: Path, tmp_path: Path, notice: signal.Signals
) -> None:
    config = config_of(volume, tmp_path / "run", steps=100_000)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    code = (
        "import sys; from pathlib import Path;"
        "from agq.model.training.config import TrainConfig;"
        "from agq.model.training.loop import train;"
        "train(TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "config.json")],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        for _ in range(1200):
            if metrics.exists() and metrics.read_text().count("\n") >= 2:
                break
            assert process.poll() is None
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        process.send_signal(notice)
        assert process.wait(60) == 0
    finally:
        process.kill()
    state = load_state(tmp_path / "run" / "state.pt")
    assert state["step"] == len(losses_of(tmp_path / "run"))
    again = train(config, resume=True, max_steps=state["step"] + 1)
    assert again.step == state["step"] + 1


def test_isotropic_data_train_too(volume: Path, tmp_path: Path) -> None:
    cube = NETWORK.model_copy(
        update={"isotropy": (True, True, True), "input_shape": (17, 17, 17), "min_seed_voxels": 1}
    )
    config = config_of(volume, tmp_path, network=cube, steps=2, augment={"turn_axes": True})
    report = train(config)
    assert report.step == 2
    assert np.isfinite(losses_of(tmp_path)).all()
    assert checkpoint.load(report.export).config == cube


def test_tensorboard_gets_scalars_and_pictures(volume: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_of(
        volume, tmp_path, steps=2, tensorboard=True, validation=[{"container": volume}]
    )
    report = train(config)
    assert report.first
    assert 0 <= report.waiting <= 1
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("training/loss")] == [1, 2]
    assert [e.value for e in read.Scalars("training/loss")] == pytest.approx(losses_of(tmp_path))
    assert len(read.Scalars("validation/val_error")) == 1
    (picture,) = read.Images("validation/0: raw, truth, prediction, affinities")
    assert (picture.height, picture.width) == (33, 4 * 33)


def test_a_run_is_never_overwritten_or_mixed(volume: Path, tmp_path: Path) -> None:
    config = config_of(volume, tmp_path, steps=1)
    with pytest.raises(InputError, match="nothing to resume"):
        train(config, resume=True)
    train(config)
    with pytest.raises(InputError, match="resume that run"):
        train(config)
    other = config.model_copy(update={"network": NETWORK.model_copy(update={"embed_dim": 16})})
    with pytest.raises(InputError, match="another network configuration"):
        train(other, resume=True)
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot read the training state"):
        train(config, resume=True)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate(0, 0.0, config) == pytest.approx(0.1)
    assert learning_rate(50, progress(50, 100, 0, None), config) == pytest.approx(0.5)
    assert learning_rate(99, 1.0, config) == pytest.approx(0.0)
    assert progress(10, 100, minutes=30, budget=60) == 0.5
    assert progress(60, 100, minutes=30, budget=60) == 0.6
    assert progress(500, 100, minutes=0, budget=None) == 1.0


def test_average_follows_the_weights_by_its_definition() -> None:
    layer = torch.nn.BatchNorm1d(2)
    ema = Ema(layer, 0.75)
    expected = layer.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            layer.weight += 1.0
        layer(torch.zeros(3, 2))
        ema.update(layer, step)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(ema.state["weight"], expected)
    assert int(ema.state["num_batches_tracked"]) == 6
