"""What the tests of the model share: small checkpoints and golden files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.network.agq import AGQ

SMALL = ModelConfig(
    filters=(8, 16, 24, 32, 40), embed_dim=32, learned_queries=12, min_seed_voxels=5, min_mass=2.0
)


def jittered_network(config: ModelConfig = SMALL, seed: int = 0) -> AGQ:
    """Return a random network in which every norm and bias matters."""
    torch.manual_seed(seed)
    network = AGQ(config)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.is_floating_point() and value.ndim == 1:
                value.add_(torch.randn_like(value), alpha=0.2)
    return network.eval()


def write_checkpoint(path: Path, config: ModelConfig = SMALL, seed: int = 0) -> Path:
    """Write a random network and return its path."""
    checkpoint.save(path, jittered_network(config, seed), config, {"seed": seed})
    return path


def block(shape: tuple[int, int, int] = (9, 33, 41), seed: int = 0) -> np.ndarray:
    """Return a blocky uint8 image: flat cells with noise, so that masks have some extent."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(30, 220, tuple(-(-n // 8) for n in shape))
    image = cells.repeat(8, 0).repeat(8, 1).repeat(8, 2)[: shape[0], : shape[1], : shape[2]]
    return np.clip(image + rng.normal(0, 8, shape), 0, 255).astype(np.uint8)


def network_of(path: Path) -> AGQ:
    """Load any checkpoint into a network in evaluation mode."""
    loaded = checkpoint.load(path)
    network = AGQ(loaded.config).eval()
    network.load_state_dict(loaded.state_dict)
    return network


def image_tensor(image: np.ndarray) -> torch.Tensor:
    """Return a uint8 block as the network's input (1, 1, z, y, x)."""
    return (torch.from_numpy(image)[None, None].float() / 255 - 0.5) / 0.5


def checksums(maps: np.ndarray) -> np.ndarray:
    """Per channel: sum, sum of magnitudes, of squares, and weighted by linspace(-1, 1)."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    weighted = flat @ np.linspace(-1, 1, flat.shape[1])
    return np.stack([flat.sum(1), np.abs(flat).sum(1), (flat**2).sum(1), weighted], axis=1)


def golden(path: Path) -> dict[str, Any]:
    """Read a golden npz file."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
