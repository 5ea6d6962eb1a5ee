"""Bricks of the network against straightforward torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from agq.model.config import ModelConfig, SeedOrder
from agq.model.cpu.convolutions import GroupStatistics, Resizing, Taps, elu, inside
from agq.model.cpu.lean import LeanNetwork
from agq.model.decode.inference import Upsampler, connected_labels, dense_maps, first_equal
from agq.model.network.agq import AGQ
from agq.model.network.blocks import ConvUnit, ReplicateConv3d, coordinates, resize
from agq.model.network.queries import find_seeds, region_means, select_components
from tests.helpers.networks import SMALL, jittered_network


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (1, 5, 5)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_replicate_convolution(kernel: tuple, stride: tuple) -> None:
    torch.manual_seed(0)
    conv = ReplicateConv3d(3, 4, kernel, stride)
    plain = nn.Conv3d(
        3, 4, kernel, stride, tuple(k // 2 for k in kernel), bias=False, padding_mode="replicate"
    )
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 5, 8, 7, requires_grad=True)
    assert torch.allclose(conv(x), plain(x), atol=1e-5)
    (ours,) = torch.autograd.grad(conv(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 9, 7), (4, 40, 33)])
def test_convolution_by_sections(kernel: tuple, stride: tuple, size: tuple) -> None:
    torch.manual_seed(0)
    conv = ReplicateConv3d(16, 8, kernel, stride)
    x = torch.randn(1, 16, *size)
    padded = [
        section.permute(1, 2, 0).contiguous()
        for section in F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")[0].transpose(0, 1)
    ]
    with torch.inference_mode():
        taps = Taps.of(conv.weight, stride)
        got = torch.stack([taps.section(padded, z) for z in range(taps.depth(size[0]))])
        want = conv(x)[0].permute(1, 2, 3, 0)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-4


def test_elu_by_strips() -> None:
    x = torch.linspace(-90, 90, 40 * 50 * 8).reshape(40, 50, 8)
    x[0, 0, :3] = torch.tensor([0.0, -1e-7, 1e-7])
    want = F.elu(x.double())
    assert (elu(x.clone(), torch.empty_like(x)) - want).abs().max() < 1e-6
    affine = torch.rand(8), torch.randn(8)
    want = F.elu(x * affine[0] + affine[1] + 0.5)
    section = x.clone()
    assert (elu(section, section, affine, torch.full_like(x, 0.5)) - want).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_group_statistics(offset: float) -> None:
    """Gathered over strips of sections they normalise as the norm of the whole does."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16).requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    norm.bias.uniform_(-1, 1)
    x = torch.randn(1, 16, 3, 140, 133) * torch.rand(16, 1, 1, 1) + offset
    statistics = GroupStatistics(norm)
    for section in x[0].permute(1, 2, 3, 0).contiguous():
        statistics.add(section)
    scale, shift = statistics.affine()
    got = x.double() * scale.double().view(-1, 1, 1, 1) + shift.double().view(-1, 1, 1, 1)
    assert (got - norm.double()(x.double())).abs().max() < 5e-4


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((5, 9, 9), (5, 5, 5)), ((5, 5, 5), (5, 9, 9)), ((3, 5, 4), (5, 10, 7)),
        ((5, 8, 6), (5, 4, 3)), ((1, 1, 1), (1, 2, 2)), ((2, 3, 2), (1, 1, 1)),
    ],
)  # fmt: skip
def test_resizing_by_sections(source: tuple, size: tuple) -> None:
    x = torch.randn(1, 6, *source)
    resizing = Resizing(source, size)
    y, x_step = resizing.every()
    sections = [s.permute(1, 2, 0)[::y, ::x_step].contiguous() for s in x[0].transpose(0, 1)]
    got = torch.stack(list(resizing(sections))).permute(3, 0, 1, 2)[None]
    assert torch.allclose(got, resize(x, size, align_corners=True), atol=1e-5)


@pytest.mark.parametrize("size", [(17, 65, 66), (9, 20, 20), (5, 9, 9), (3, 30, 17)])
def test_upsampling_by_sections(size: tuple) -> None:
    x = torch.randn(1, 4, 5, 9, 9)
    upsampler = Upsampler(x[0].permute(1, 2, 3, 0).contiguous(), size)
    got = torch.stack([upsampler.section(z) for z in range(size[0])]).permute(3, 0, 1, 2)
    want = F.interpolate(x, size=size, mode="trilinear", align_corners=False)[0]
    assert torch.allclose(got, want, atol=1e-5)


def test_coordinates_are_z_x_y() -> None:
    grid = coordinates((3, 4, 5), torch.zeros(()))[0]
    assert grid.shape == (3, 3, 4, 5)
    assert grid[0, :, 0, 0].tolist() == [-1, 0, 1]
    assert torch.equal(grid[1, 0, 0], torch.linspace(-1, 1, 5))
    assert torch.equal(grid[2, 0, :, 0], torch.linspace(-1, 1, 4))


def test_padding_rim_is_the_edge() -> None:
    unit = ConvUnit(2, 2, (1, 3, 3), norm="none", activation="none")
    with torch.no_grad():
        weight = unit.state_dict()["0.weight"].zero_()
        weight[:, :, 0, 0, 0] = torch.eye(2)  # looks up and to the left
    x = torch.arange(24.0).reshape(1, 2, 1, 3, 4)
    got = unit(x)
    assert torch.equal(got[0, :, 0, 0, 0], x[0, :, 0, 0, 0])
    assert torch.equal(got[0, :, 0, 1:, 1:], x[0, :, 0, :-1, :-1])
    assert inside(torch.zeros(5, 6, 2)).shape == (3, 4, 2)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(filters=(16, 24, 32, 40, 48), embed_dim=32),
        ModelConfig(filters=(8, 16, 8), isotropy=(False, True, False), embed_dim=16),
        ModelConfig(filters=(8, 16), isotropy=(True, True), embed_dim=8, branch_layers=1),
    ],
)
@pytest.mark.parametrize("size", [(7, 21, 34), (4, 16, 12), (1, 5, 5)])
def test_lean_convolutions_equal_the_layers(config: ModelConfig, size: tuple) -> None:
    network = jittered_network(config).requires_grad_(False)
    image = torch.rand(size) * 2 - 1
    with torch.inference_mode():
        want, got = dense_maps(network, image), LeanNetwork(network).dense_maps(image)
    for name in ("affinity_logits", "mask_features", "instance_features"):
        a, b = getattr(want, name), getattr(got, name)
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(a.abs().max())), name


def test_first_equal_is_argmax() -> None:
    rows = torch.randint(0, 4, (7, 500)).float()
    want = torch.from_numpy(rows.numpy().argmax(0))  # numpy promises the first of equals
    assert torch.equal(first_equal(rows, rows.amax(0)), want)


def test_region_means_and_their_gradient() -> None:
    features = torch.randn(6, 3, 8, 9, requires_grad=True)
    affinities = torch.zeros(3, 3, 8, 9)
    affinities[:, :, 1:3, 1:5] = 0.9
    affinities[:, 1, 5:8, 6:9] = 0.8
    seeds = find_seeds(affinities, ModelConfig(min_seed_voxels=8, max_seeds=5))
    assert (seeds.kept, seeds.components, seeds.dropped) == (2, 2, 0)
    means = region_means(features, seeds)
    want = torch.stack(
        [features[:, 0:3, 1:3, 1:5].mean((1, 2, 3)), features[:, 1, 5:8, 6:9].mean((1, 2))]
    )
    assert torch.allclose(means, want, atol=1e-6)
    means.sum().backward()
    assert features.grad is not None
    assert features.grad.sum() == pytest.approx(12.0, abs=1e-4)


@pytest.mark.parametrize(("order", "row"), [("label", 0), ("largest", 6)])
def test_seeds_above_the_limit(order: SeedOrder, row: int) -> None:
    affinities = torch.zeros(3, 1, 9, 9)
    affinities[:, :, 0, :4] = 0.9
    affinities[:, :, 6, :8] = 0.9
    config = ModelConfig(min_seed_voxels=3, max_seeds=1, seed_order=order)
    seeds = find_seeds(affinities, config)
    assert (seeds.kept, seeds.components, seeds.dropped) == (1, 2, 1)
    assert seeds.labels.nonzero()[:, 1].unique().tolist() == [row]


def test_choice_of_components() -> None:
    labels = np.repeat(np.array([0, 1, 2, 3, 4]), [50, 5, 30, 9, 30]).reshape(1, 1, -1)
    ids, found = select_components(labels, 5, 2)
    assert (ids.tolist(), found) == ([2, 3], 3)
    ids, found = select_components(labels, 5, 2, "largest")
    assert (ids.tolist(), found) == ([2, 4], 3)
    ids, found = select_components(labels, 100, 2)
    assert (ids.tolist(), found) == ([], 0)


def test_seeds_do_not_depend_on_the_batch() -> None:
    """The foreground's mean is that of the item, not of the batch."""
    torch.manual_seed(1)
    network = jittered_network()
    dim, bright = torch.rand(1, 1, 5, 24, 24) * 0.2 - 1, torch.rand(1, 1, 5, 24, 24) + 0.0
    with torch.inference_mode():
        alone = network(dim)
        together = network(torch.cat([dim, bright]))
    assert alone.n_seeds[0] == together.n_seeds[0]
    assert torch.allclose(alone.predictions[-1][0], together.predictions[-1][0], atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_connected_labels(seed: int) -> None:
    """Pieces are 6-connected, of one channel, and numbered by their first voxel."""
    rng = np.random.default_rng(seed)
    channels = rng.integers(0, 3, (5, 9, 11)).astype(np.int16)
    labels, n = connected_labels(channels)
    assert labels.dtype == np.uint16
    first = [np.flatnonzero(labels.ravel() == i)[0] for i in range(1, n + 1)]
    assert first == sorted(first)
    assert set(np.unique(labels)) == set(range(n + 1)) or (channels > 0).all()
    assert ((labels == 0) == (channels == 0)).all()
    count = sum(ndimage.label(channels == c)[1] for c in (1, 2))
    assert n == count
    for i in range(1, n + 1):
        assert ndimage.label(labels == i)[1] == 1
        assert len(np.unique(channels[labels == i])) == 1


def test_many_pieces_never_wrap() -> None:
    channels = np.zeros((9, 256, 256), np.int16)
    channels[::2, ::2, ::2] = 1
    labels, n = connected_labels(channels)
    assert (n, labels.dtype) == (5 * 128 * 128, np.uint32)
    assert labels.max() == n


def test_training_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    network = AGQ(SMALL).train()
    out = network(torch.rand(2, 1, 5, 20, 24) * 2 - 1)
    assert len(out.predictions) == 1 + SMALL.iterations
    for prediction in out.predictions:
        for item, seeds in zip(prediction, out.n_seeds, strict=True):
            assert item.shape == (1 + seeds + SMALL.learned_queries, 5, 10, 12)
    loss = sum(m.square().mean() for p in out.predictions for m in p)
    (loss + out.affinity_logits.square().mean() + out.mask_features[:, 0].mean()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
