"""A network and a volume so small that a training takes seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from agq.model.config import ModelConfig
from agq.model.training.config import TrainConfig

NETWORK = ModelConfig(
    filters=(8, 8, 8),
    isotropy=(False, False, True),
    embed_dim=8,
    norm_groups=4,
    attention_heads=2,
    branch_layers=1,
    learned_queries=6,
    min_seed_voxels=5,
    min_mass=4,
    input_shape=(5, 33, 33),
)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares of different greys with dark borders: learnable in a few steps."""
    container = tmp_path_factory.mktemp("data") / "v.zarr"
    _, y, x = np.indices((8, 64, 64))
    labels = (y // 16 * 4 + x // 16 + 1).astype(np.uint32)
    labels[(y % 16 < 2) | (x % 16 < 2)] = 0
    noise = np.random.default_rng(0).integers(0, 30, labels.shape)
    raw = np.where(labels > 0, 150 + labels * 4, 40) + noise
    group = zarr.open_group(container, mode="w")
    group.create_array("raw", data=raw.astype(np.uint8), chunks=(4, 32, 32))
    group.create_array("labels", data=labels, chunks=(4, 32, 32))
    return container


def config_of(volume: Path, output: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "output": output,
        "network": NETWORK,
        "volumes": [{"container": volume}],
        "pad": (0, 0, 0),
        "augment": {"max_shift": 2},
        "losses": {"samples": 64},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 4, "ema_decay": 0.9},
        "steps": 20,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "min_instance_voxels": 10,
    }
    return TrainConfig.model_validate(values | changes)


def losses_of(output: Path) -> list[float]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]
