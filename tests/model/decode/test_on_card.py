"""The form that a card runs, on the CPU: same labels, few operators, few waits of the host."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agq.model.config import ModelConfig
from agq.model.decode import inference
from agq.model.network import queries
from agq.model.predictor import AGQPredictor, BlockPrediction
from agq.model.transfers import Transfers
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.networks import jittered_network, write_checkpoint

SHAPE = (9, 65, 65)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Take the CPU for a card, on which three parts make a block."""
    for module in (inference, queries):
        monkeypatch.setattr(module, "on_card", lambda tensor: True)
        monkeypatch.setattr(module, "CARD_VOXELS", int(np.prod(SHAPE)) // 3 + 1)
    return monkeypatch


def block() -> np.ndarray:
    rng = np.random.default_rng(3)
    cells = rng.integers(30, 220, (3, 9, 9)).repeat(3, 0).repeat(8, 1).repeat(8, 2)
    return np.clip(cells[:, :65, :65] + rng.normal(0, 12, SHAPE), 0, 255).astype(np.uint8)


def predict(checkpoint: Path, **settings: Any) -> BlockPrediction:
    return AGQPredictor(checkpoint, device="cpu", **settings).predict([block()])[0]


@pytest.mark.parametrize("settings", [{"pieces": "masks"}, {"pieces": "supervoxels"}])
def test_a_card_gives_the_same_blocks(tmp_path, card, settings):
    checkpoint = write_checkpoint(tmp_path / "small.safetensors")
    there = predict(checkpoint, **settings)
    card.undo()
    here = predict(checkpoint, **settings)
    assert here.n_labels > 3
    differs = np.abs(there.affinities.astype(int) - here.affinities)
    assert differs.max() <= 1
    assert (differs > 0).mean() < 1e-3
    assert (there.labels != here.labels).mean() < 1e-3
    if here.memberships is not None:
        assert there.memberships.shape == here.memberships.shape
        assert np.abs(there.memberships - here.memberships).max() < inference.NEGLIGIBLE * 100


@pytest.mark.parametrize("share", [0.0, 0.08, 0.15, 2.0])
@pytest.mark.parametrize("size", [SHAPE, (9, 33, 33)])
def test_voxels_of_weak_channels_go_to_the_best_of_the_others(card, share, size):
    generator = torch.Generator().manual_seed(4)
    features = torch.randn((9, 33, 33, 8), generator=generator)
    head = inference.MaskHead(
        torch.randn((7, 8), generator=generator) * 2, torch.randn((7, 1), generator=generator)
    )
    min_mass = share * float(np.prod(size))
    there, mass = map(torch.Tensor.numpy, inference.assign_on_card(head, features, size, min_mass))
    card.undo()
    here, expected = map(
        torch.Tensor.numpy, inference.assign_voxels(head, features, size, min_mass)
    )
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=0.01)
    assert here.any() == (share < 2)
    assert (there != here).mean() < 1e-3
    assert there.dtype == here.dtype
    assert there.shape == size


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_made_once_changes_no_bit(card, dtype):
    network, image = jittered_network().requires_grad_(False), torch.rand(SHAPE) * 2 - 1

    def answer() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            maps = inference.dense_maps(network, image)
        head = inference.decode(network, maps, inference.seeds_of(network, maps))
        return [maps.affinity_logits, maps.mask_features, head.weight, head.bias]

    before = answer()
    network.freeze(dtype)
    for now, then in zip(answer(), before, strict=True):
        assert torch.equal(now, then)
    features = torch.rand((1, 35, 9, 33, 33))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(network.mask_branch.flat(features), network.mask_branch(features))


WAITS = ("_local_scalar_dense", "nonzero", "bincount", "_unique2", "masked_select")
"""Operators that a card answers before its host goes on."""


def test_operators_and_waits_of_a_block(tmp_path, card):
    """The published network: what a block costs a host that feeds a card."""
    blocking = Counter[str]()

    def counted(name: str) -> Any:
        plain = getattr(torch.Tensor, name)

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            blocking[name] += not kwargs.get("non_blocking") and not any(
                isinstance(arg, torch.dtype) for arg in args
            )
            return plain(tensor, *args, **kwargs)

        return counting

    predictor = AGQPredictor(
        write_checkpoint(tmp_path / "published.safetensors", ModelConfig()), device="cpu"
    )
    predictor.lean, cuda = None, FakeCuda(card)
    predictor.transfers = Transfers(predictor.device, cuda)
    predictor.predict([block()])  # makes what blocks of a shape share
    # Inference mode shows a linear layer as one operator, though it is two.
    card.setattr(torch, "inference_mode", torch.no_grad)
    for name in ("cpu", "to"):
        card.setattr(torch.Tensor, name, counted(name))
    cuda.log.clear()
    with _Calls() as calls:
        predictor.predict([block()])
    assert cuda.waits == 2
    assert not blocking.total() + sum(calls.names[name] for name in WAITS)
    assert sum(calls.names.values()) <= 600, calls.names.most_common(20)
