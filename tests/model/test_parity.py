"""The network gives what the published implementation gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.decode.inference import (
    DenseMaps,
    assign_voxels,
    decode,
    quantised,
    resized_affinities,
)
from agq.model.network.agq import AGQ
from agq.model.network.blocks import coordinates
from agq.model.network.queries import Seeds, seeds_from_components, select_components
from agq.model.predictor import AGQPredictor
from tests.helpers.networks import checksums, golden, image_tensor, network_of

AFFINITY_LOGITS = 2e-4
MASK_LOGITS = 5e-4
EQUAL_VOXELS = 0.9999


def cases() -> list:
    return [
        pytest.param("small_65", "small_state_dict.pt", id="small_65"),
        pytest.param(
            "full_257", "full_state_dict.pt", id="full_257",
            marks=[pytest.mark.slow, pytest.mark.timeout(900)],
        ),
    ]  # fmt: skip


def sample_steps(size: tuple[int, ...], sampled: tuple[int, ...]) -> list[slice]:
    """Golden samples are strided by powers of two."""
    strides = [
        next(s for s in (1, 2, 4, 8, 16) if -(-n // s) == m)
        for n, m in zip(size, sampled, strict=True)
    ]
    return [slice(None, None, s) for s in strides]


def test_state_dict_is_the_published_one(data_dir: Path) -> None:
    lines = (data_dir / "state_dict_keys.txt").read_text().splitlines()
    published = [tuple(line.split("\t")[:2]) for line in lines]
    network = AGQ(ModelConfig())
    ours = [(k, str(tuple(v.shape))) for k, v in network.state_dict().items()]
    assert ours == published
    assert sum(p.numel() for p in network.parameters()) == 4_743_919


def test_lite_case_agrees(data_dir: Path) -> None:
    want = golden(data_dir / "small_65_lite.npz")
    got = AGQPredictor(data_dir / "small_state_dict.pt", device="cpu").masks(want["image_u8"])
    # The stored logits are float16: half a unit in the last place on top of the tolerance.
    stored = want["pred_affinity"].astype(np.float32)
    assert (np.abs(got.affinity_logits - stored) <= AFFINITY_LOGITS + np.abs(stored) / 2048).all()
    assert (got.channels == want["mask_int"]).mean() >= EQUAL_VOXELS
    np.testing.assert_allclose(got.mass, want["areas"], rtol=1e-4, atol=0.1)


@pytest.mark.parametrize(("case", "weights"), cases())
def test_predictor_agrees(shared_dir: Path, case: str, weights: str) -> None:
    folder = shared_dir / "golden"
    want = golden(folder / f"{case}.npz")
    got = AGQPredictor(folder / weights, device="cpu").masks(want["image_u8"])
    assert np.abs(got.affinity_logits - want["pred_affinity"]).max() <= AFFINITY_LOGITS
    assert (got.channels == want["mask_int"]).mean() >= EQUAL_VOXELS
    np.testing.assert_array_equal(got.mass >= 40, want["kept_channels"])
    np.testing.assert_allclose(got.mass, want["areas"], rtol=1e-4, atol=0.1)
    found = int((np.bincount(want["init_masks"].ravel())[1:] > 100).sum())
    assert (got.components, got.dropped) == (found, found - len(want["kept_ids"]))


@pytest.mark.parametrize(("case", "weights"), cases())
def test_affinities_agree_after_resizing(shared_dir: Path, case: str, weights: str) -> None:
    want = golden(shared_dir / "golden" / f"{case}.npz")
    size = want["image_u8"].shape
    got = quantised(resized_affinities(torch.from_numpy(want["pred_affinity"]), size)).numpy()
    published = F.interpolate(
        torch.sigmoid(torch.from_numpy(want["pred_affinity"]))[None],
        size=size, mode="trilinear", align_corners=False,
    )[0].numpy()  # fmt: skip
    assert np.abs(got - published * 255).max() <= 0.5 + 1e-3
    steps = sample_steps(size, want["affinity_resized_sub"].shape[1:])
    sample = published[(slice(None), *steps)]
    np.testing.assert_allclose(sample, want["affinity_resized_sub"], atol=1e-5)


@pytest.mark.parametrize(("case", "weights"), cases())
def test_every_part_agrees(shared_dir: Path, case: str, weights: str) -> None:
    want = golden(shared_dir / "golden" / f"{case}.npz")
    network = network_of(shared_dir / "golden" / weights)
    stride = [slice(None), *(slice(None, None, int(s)) for s in want["sub_stride"])]

    def agrees(name: str, maps: np.ndarray, tolerance: float) -> None:
        sub = want[f"{name}_sub"]
        steps = sample_steps(maps.shape[1:], sub.shape[1:])
        assert np.abs(maps[(slice(None), *steps)] - sub).max() <= tolerance, name
        scale = want[f"{name}_csum"][:, 1:2] + 1
        assert (np.abs(checksums(maps) - want[f"{name}_csum"])[:, [0, 1, 3]] <= 1e-4 * scale).all()

    with torch.inference_mode():
        x = image_tensor(want["image_u8"])
        levels = network.pyramid(x)
        for i, level in enumerate(levels):
            assert tuple(level.shape) == tuple(want[f"P{i}_shape"])
            agrees(f"P{i}", level[0].numpy(), 1e-4)
        fused = network.fusion_block(levels)
        agrees("fused", fused[0].numpy(), 1e-4)
        features = torch.cat([coordinates(fused.shape[2:], fused), fused], dim=1)
        agrees("inst_features", network.inst_decoder.rpn.inst_convs(features)[0].numpy(), 1e-4)
        del levels, fused, features
        out = network(x)
    first, middle, last = (prediction[0].numpy() for prediction in out.predictions)
    assert np.abs(out.affinity_logits[0].numpy() - want["pred_affinity"]).max() <= AFFINITY_LOGITS
    for prediction, name in ((first, "bg0"), (middle, "bg1"), (last, "bg_last")):
        assert np.abs(prediction[0] - want[name]).max() <= MASK_LOGITS, name
    assert np.abs(last[tuple(stride)][1:] - want["pred_masks_sub"][1:]).max() <= MASK_LOGITS
    scale = want["pred_masks_csum"][1:, 1:2] + 1
    sums = checksums(last[1:])[:, [0, 1, 3]]
    assert (np.abs(sums - want["pred_masks_csum"][1:][:, [0, 1, 3]]) <= 1e-4 * scale).all()


def test_first_hundred_components_are_used(shared_dir: Path) -> None:
    """104 components are large enough; queries, kernels and logits of the 100 used agree."""
    want = golden(shared_dir / "golden" / "truncate_small_65.npz")
    image = golden(shared_dir / "golden" / "small_65.npz")["image_u8"]
    network = network_of(shared_dir / "golden" / "small_state_dict.pt")
    ids, found = select_components(want["init_masks"], 100, 100)
    np.testing.assert_array_equal(ids, want["kept_ids_all"][: want["n_used"]])
    assert found == len(want["kept_ids_all"]) == 104
    seeds: Seeds = seeds_from_components(want["init_masks"], ids, found)
    assert (seeds.kept, seeds.components, seeds.dropped) == (100, 104, 4)
    with torch.inference_mode():
        fused = network.fusion_block(network.pyramid(image_tensor(image)))
        features = torch.cat([coordinates(fused.shape[2:], fused), fused], dim=1)
        masks = F.normalize(network.mask_branch(features), dim=1)[0]
        instances = network.inst_decoder.rpn.inst_convs(features)[0]
        queries = network.inst_decoder.rpn.queries(instances, seeds)
        predictions = network.inst_decoder(queries, instances, masks)
        assert np.abs(queries.numpy() - want["queries0"]).max() <= 1e-4
        for k, prediction in enumerate(predictions):
            sub = prediction.numpy()[1:, ::2, ::4, ::4]
            assert np.abs(sub - want["masks_sub"][k][1:]).max() <= MASK_LOGITS
            sums = checksums(prediction.numpy()[1:])[:, [0, 1, 3]]
            scale = want["masks_csum"][k][1:, 1:2] + 1
            assert (np.abs(sums - want["masks_csum"][k][1:][:, [0, 1, 3]]) <= 1e-4 * scale).all()
        maps = DenseMaps(
            torch.zeros(3, *masks.shape[1:]),
            masks.permute(1, 2, 3, 0).contiguous(),
            instances.permute(1, 2, 3, 0).contiguous(),
        )
        head = decode(network, maps, seeds)
        logits = head.logits(maps.mask_features.flatten(0, 2)).view(-1, *masks.shape[1:])
        assert (logits[1:] - predictions[-1][1:]).abs().max() <= 1e-4
        assert not logits[0].any()


@pytest.mark.parametrize("shape", [(17, 65, 65), (9, 34, 47), (5, 20, 33), (1, 7, 9), (18, 32, 24)])
def test_lean_path_agrees_with_plain_layers(data_dir: Path, shape: tuple[int, int, int]) -> None:
    """Inference (folded, tiled, resized features) against the network's plain forward."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, shape).astype(np.uint8)
    predictor = AGQPredictor(data_dir / "small_state_dict.pt", device="cpu")
    network = predictor.network
    with torch.inference_mode():
        out = network(image_tensor(image), only_last=True)
        logits = out.predictions[-1][0].clone()
        logits[0] = 0
        logits = F.interpolate(logits[None], size=shape, mode="trilinear", align_corners=False)[0]
        share = torch.softmax(logits.double(), dim=0)
        mass = share.sum((1, 2, 3))
        share[mass < 40] = 0
        want = share.argmax(0).numpy()
    got = predictor.masks(image)
    assert np.abs(got.affinity_logits - out.affinity_logits[0].numpy()).max() <= AFFINITY_LOGITS
    assert (got.components, got.dropped) == (out.components[0], out.dropped[0])
    np.testing.assert_allclose(got.mass, mass.numpy(), rtol=1e-4, atol=1e-2)
    assert (got.channels == want).mean() >= EQUAL_VOXELS


def test_no_channel_is_left_when_all_are_small(data_dir: Path) -> None:
    """A block in which no channel has the least mass is all background."""
    network = network_of(data_dir / "small_state_dict.pt")
    with torch.inference_mode():
        features = F.normalize(torch.randn(3, 8, 8, 64), dim=-1)
        maps = DenseMaps(torch.zeros(3, 3, 8, 8), features, torch.randn(3, 8, 8, 64))
        none = Seeds(
            torch.zeros(3, 8, 8, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0, 0
        )
        head = decode(network, maps, none)
        channels, mass = assign_voxels(head, features, (3, 16, 16), 1e9)
    assert not channels.any()
    assert mass.sum() == pytest.approx(3 * 16 * 16, rel=1e-5)


def test_published_file_layout_loads(tmp_path: Path, data_dir: Path) -> None:
    state = torch.load(data_dir / "small_state_dict.pt", weights_only=True)
    state = state.get("state_dict", state)
    path = tmp_path / "checkpoint_200000.pth.tar"
    torch.save({"iteration": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    loaded = checkpoint.load(path)
    assert loaded.config == ModelConfig(filters=(8, 16, 24, 32, 40))
    assert all(torch.equal(loaded.state_dict[k], v) for k, v in state.items())
