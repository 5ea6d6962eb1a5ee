"""Blocks in, labels and affinities out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from agq.errors import InputError
from agq.model.predictor import AGQPredictor, BlockPrediction, normalised, resolve_device
from agq.model.settings import Precision
from tests.helpers.networks import SMALL, block, image_tensor, write_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def predictor(weights: Path) -> AGQPredictor:
    return AGQPredictor(weights, device="cpu")


def same(a: BlockPrediction, b: BlockPrediction) -> bool:
    return (
        np.array_equal(a.labels, b.labels)
        and np.array_equal(a.affinities, b.affinities)
        and (a.components, a.dropped, a.n_labels) == (b.components, b.dropped, b.n_labels)
    )


def many_regions() -> np.ndarray:
    """Return an image in which the small network finds several seed regions."""
    cells = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    return cells.repeat(3, 0).repeat(8, 1).repeat(8, 2)


def test_labels_are_connected_and_consecutive(predictor: AGQPredictor) -> None:
    (got,) = predictor.predict([block()])
    assert got.labels.dtype == np.uint16
    assert got.labels.shape == (9, 33, 41)
    assert got.n_labels > 1
    assert set(np.unique(got.labels)) - {0} == set(range(1, got.n_labels + 1))
    places, first = np.unique(got.labels, return_index=True)
    assert (np.diff(first[places > 0]) > 0).all()
    for label in places[places > 0][:50]:
        assert ndimage.label(got.labels == label)[1] == 1
    channels = predictor.masks(block()).channels
    assert ((channels == 0) == (got.labels == 0)).all()


def test_affinities(predictor: AGQPredictor) -> None:
    image = block()
    (got,) = predictor.predict([image])
    assert got.affinities.dtype == np.uint8
    assert got.affinities.shape == (3, *image.shape)
    with torch.inference_mode():
        logits = predictor.network(image_tensor(image)).affinity_logits
        want = F.interpolate(
            torch.sigmoid(logits), size=image.shape, mode="trilinear", align_corners=False
        )
    assert np.abs(got.affinities - want[0].numpy() * 255).max() <= 0.5 + 0.02


def test_results_do_not_depend_on_neighbours(predictor: AGQPredictor, weights: Path) -> None:
    """Bit for bit: alone, in any batch, in any place, after anything else."""
    blocks = [block(seed=i) for i in range(3)]
    alone = [predictor.predict([b])[0] for b in blocks]
    together = predictor.predict(blocks)
    backwards = predictor.predict(blocks[::-1])[::-1]
    fresh = AGQPredictor(weights, device="cpu", batch_size=3).predict([*blocks[1:], blocks[0]])
    fresh = [fresh[2], *fresh[:2]]
    for i in range(3):
        assert same(alone[i], together[i])
        assert same(alone[i], backwards[i])
        assert same(alone[i], fresh[i])
    assert not same(alone[0], alone[1])


def test_blocks_of_different_shapes(predictor: AGQPredictor) -> None:
    shapes = [(9, 33, 41), (5, 20, 20), (9, 33, 41), (1, 7, 50)]
    got = predictor.predict([block(shape) for shape in shapes])
    assert [p.labels.shape for p in got] == shapes
    assert same(got[0], got[2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 3), (2, 4, 4), (17, 1, 9), (3, 64, 5)])
def test_tiny_blocks(predictor: AGQPredictor, shape: tuple[int, int, int]) -> None:
    (got,) = predictor.predict([np.full(shape, 100, np.uint8)])
    assert got.labels.shape == shape
    assert got.affinities.shape == (3, *shape)


def test_the_input_is_left_alone(predictor: AGQPredictor) -> None:
    image = block().astype(np.float32) / 255
    image.setflags(write=False)
    before = image.copy()
    predictor.predict([image])
    np.testing.assert_array_equal(image, before)


def test_input_types_say_the_same(predictor: AGQPredictor) -> None:
    image = block()
    scaled = image.astype(np.float32) / np.float32(255)
    for other in (scaled, np.asfortranarray(image), image[:, ::-1][:, ::-1]):
        assert same(predictor.predict([image])[0], predictor.predict([other])[0])
    # 257 * x / 65535 is x / 255, so the same picture in 16 bits.
    np.testing.assert_allclose(
        normalised(image.astype(np.uint16) * 257, "b"), normalised(image, "b"), atol=1e-6
    )
    got = normalised(np.array([[[0, 255]]], np.uint8), "b")
    assert (got.dtype, got.tolist()) == (np.float32, [[[-1.0, 1.0]]])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((3, 8, 8), np.nan, np.float32), "block 1 of the batch has NaN or infinite"),
        (np.full((3, 8, 8), np.inf, np.float32), "block 1 of the batch has NaN or infinite"),
        (np.full((3, 8, 8), 128, np.float32), r"from 128 to 128: scale it to \[0, 1\]"),
        (np.zeros((3, 8, 8), np.int64), "dtype int64: give uint8, uint16 or float32"),
        (np.zeros((3, 8, 8), np.float64), "dtype float64"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\): give \(z, y, x\)"),
        (np.zeros((0, 8, 8), np.uint8), "not empty"),
    ],
)
def test_blocks_that_cannot_be_used(predictor: AGQPredictor, bad: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        predictor.predict([block(), bad])


def test_without_seeds_the_learned_queries_are_left(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"min_seed_voxels": 10**9})
    got = AGQPredictor(write_checkpoint(tmp_path / "m", config), device="cpu").masks(block())
    assert (got.components, got.dropped) == (0, 0)
    assert len(got.mass) == 1 + config.learned_queries
    assert got.mass.sum() == pytest.approx(block().size, rel=1e-4)


def test_dropped_queries_are_counted(weights: Path, predictor: AGQPredictor) -> None:
    image = many_regions()
    free = predictor.masks(image)
    assert free.components >= 3
    assert free.dropped == 0
    limited = AGQPredictor(weights, device="cpu", max_seeds=2).masks(image)
    assert (limited.components, limited.dropped) == (free.components, free.components - 2)
    assert len(limited.mass) == 1 + 2 + SMALL.learned_queries
    (prediction,) = AGQPredictor(weights, device="cpu", max_seeds=2).predict([image])
    assert (prediction.components, prediction.dropped) == (limited.components, limited.dropped)


def test_settings_override_the_checkpoint(weights: Path) -> None:
    predictor = AGQPredictor(weights, device="cpu", seed_order="largest", max_seeds=7)
    assert (predictor.config.seed_order, predictor.config.max_seeds) == ("largest", 7)
    assert predictor.config.filters == SMALL.filters


def test_all_background(tmp_path: Path) -> None:
    """No channel has the mass asked for: zeros, not an error."""
    config = SMALL.model_copy(update={"min_mass": 1e9})
    (got,) = AGQPredictor(write_checkpoint(tmp_path / "m", config), device="cpu").predict([block()])
    assert not got.labels.any()
    assert got.n_labels == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision(weights: Path, predictor: AGQPredictor, precision: Precision) -> None:
    image = block()
    lower = AGQPredictor(weights, device="cpu", precision=precision)
    (got,), (want,) = lower.predict([image]), predictor.predict([image])
    assert got.labels.dtype == want.labels.dtype
    distance = np.abs(got.affinities.astype(int) - want.affinities)
    assert distance.mean() < 4
    assert same(got, lower.predict([image])[0])


def test_overflow_is_named(weights: Path) -> None:
    predictor = AGQPredictor(weights, device="cpu", precision="fp16")
    projection = predictor.network.mask_branch.projection.bias
    assert projection is not None
    projection.fill_(float("inf"))
    with pytest.raises(InputError, match="overflow at precision fp16"):
        predictor.predict([block((1, 8, 8))])


def test_settings_that_cannot_work(weights: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"device": "tpu"}, "device 'tpu': give auto"),
        ({"device": "cuda:99"}, "device 'cuda:99' does not exist"),
        ({"precision": "fp8"}, "precision: .*'fp32', 'bf16' or 'fp16'"),
        ({"batch_size": 0}, "batch_size: .*greater than 0"),
        ({"threads": 0}, "threads: .*greater than 0"),
        ({"max_seeds": -1}, "max_seeds: .*greater than 0"),
        ({"seed_order": "random"}, "seed_order"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            AGQPredictor(weights, **{"device": "cpu", **settings})


def test_threads_and_shape(weights: Path) -> None:
    before = torch.get_num_threads()
    try:
        predictor = AGQPredictor(weights, device="cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert predictor.input_shape == SMALL.input_shape
    assert predictor.batch_size == 1
    assert len(predictor.sha256) == 64


def test_auto_takes_what_is_there() -> None:
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert resolve_device("auto") == torch.device("cpu")
    else:
        assert resolve_device("auto").type in {"cuda", "mps"}


def test_no_gradients_are_kept(predictor: AGQPredictor) -> None:
    assert not any(p.requires_grad for p in predictor.network.parameters())
    assert not any(m.training for m in predictor.network.modules())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_agrees(weights: Path, predictor: AGQPredictor, precision: Precision) -> None:
    image = block((9, 64, 72))
    gpu = AGQPredictor(weights, device="cuda", precision=precision)
    first, (second,) = gpu.predict([block(seed=9), image])[1], gpu.predict([image])
    assert same(first, second)
    (want,) = predictor.predict([image])
    distance = np.abs(first.affinities.astype(int) - want.affinities)
    assert distance.max() <= 1 if precision == "fp32" else distance.mean() < 4
