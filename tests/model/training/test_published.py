"""One step of the published training: each loss and the gradient of each parameter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.network.agq import AGQ
from agq.model.training.config import LossWeights
from agq.model.training.data.targets import Targets, affinities_of, make_targets
from agq.model.training.losses.losses import item_losses
from agq.model.training.trainer import decayed

DATA = Path(__file__).parents[2] / "data"
SMALL = ModelConfig(filters=(8, 16, 24, 32, 40))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "training_97.npz", allow_pickle=False) as stored:
        return dict(stored)


def targets_of(golden: dict[str, np.ndarray]) -> Targets:
    """Our targets of the crop, with the voxels that the published code drew."""
    made = make_targets(golden["labels_in"].astype(np.uint32), rng=np.random.default_rng(0))
    drawn = torch.from_numpy(golden["discrimination_sample"][0])
    owners = made.masks.flatten(1)[:, drawn].argmax(0)
    return Targets(made.affinities, made.masks, drawn, owners)


def test_targets_are_the_published_ones(golden: dict[str, np.ndarray]) -> None:
    targets = targets_of(golden)
    assert len(targets.masks) == int(golden["n_instances"])
    shape = tuple(golden["affinity_shape"])
    bits = np.unpackbits(golden["affinity_bits"])[: np.prod(shape)].reshape(shape)
    assert (affinities_of(golden["labels"]) == bits).all()
    # Every voxel that the published code drew is one that ours may draw.
    assert bool((targets.masks.sum(0).flatten()[targets.samples] >= 1).all())


def test_losses_and_gradients_of_a_published_step(golden: dict[str, np.ndarray]) -> None:
    loaded = checkpoint.load(DATA / "small_state_dict.pt", SMALL)
    network = AGQ(loaded.config)
    network.load_state_dict(loaded.state_dict)
    network.train()
    raw = torch.from_numpy((golden["raw"].astype(np.float32) / 255 - 0.5) / 0.5)
    out = network(raw[None, None])
    weights = LossWeights.model_validate("published")
    total, terms = item_losses(
        out.affinity_logits[0],
        [prediction[0] for prediction in out.predictions],
        out.mask_features[0],
        targets_of(golden),
        weights,
    )
    total.backward()
    published = dict(
        zip(golden["loss_names"].tolist(), golden["loss_values"].tolist(), strict=True)
    )
    ours = {
        "dice": weights.dice * terms["dice"],
        "mask": weights.cross_entropy * terms["cross_entropy"],
        "pixel": weights.discrimination * terms["discrimination"],
        "affinity": weights.affinity * terms["affinity"],
    }
    for name, value in ours.items():
        expected = sum(v for key, v in published.items() if key.startswith(f"loss_{name}"))
        assert value == pytest.approx(expected, rel=1e-3), name
    assert weights.dice * terms["dice_last"] == pytest.approx(published["loss_dice"], rel=1e-3)
    assert float(total.detach()) == pytest.approx(float(golden["total"]), rel=1e-3)
    norms = dict(
        zip(golden["gradient_names"].tolist(), golden["gradient_norms"].tolist(), strict=True)
    )
    largest = max(norms.values())
    found = {k: float(p.grad.norm()) for k, p in network.named_parameters() if p.grad is not None}
    assert set(norms) <= set(found)
    for name, norm in norms.items():
        # Gradients that cancel to nothing are rounding noise, in the published code too.
        assert found[name] == pytest.approx(norm, rel=0.01, abs=1e-6 * largest), name


def test_norms_and_biases_do_not_decay() -> None:
    network = AGQ(SMALL)
    weights, vectors = decayed(network, 0.1)
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    kept = {id(p) for p in vectors["params"]}
    norms = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    expected = {
        id(p)
        for module in network.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, norms)
    }
    assert kept == expected
    assert len(kept) + len(weights["params"]) == len(list(network.parameters()))


def test_norms_of_kernels_and_logits_move_slowly() -> None:
    moments = {
        name: module.momentum
        for name, module in AGQ(SMALL).named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    slow = {name for name, momentum in moments.items() if momentum == 0.01}
    assert slow == {n for n in moments if n.endswith(("norm_logits", "norm_kernel"))}
    assert len(slow) == 6
