"""Affinities averaged over mirror images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agq.errors import InputError
from agq.model.config import Flips
from agq.model.decode.flips import flipped_affinities, mirror_axes
from agq.model.predictor import AGQPredictor
from tests.helpers.networks import SMALL, block, write_checkpoint

EVERY: list[Flips] = ["inplane", "all"]


def differences(image: Tensor) -> Tensor:
    """Logits that belong to a voxel and its previous one alone; the first planes have their own."""
    out = torch.full((3, *image.shape), -9.0)
    for axis in range(3):
        n = image.shape[axis]
        step = (image.narrow(axis, 1, n - 1) - image.narrow(axis, 0, n - 1)).abs()
        out[axis].narrow(axis, 1, n - 1).copy_(2 - 4 * step)
    return out


def random_image(seed: int = 0) -> Tensor:
    return torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(seed))


def slow(run: Callable[[Tensor], Tensor], image: Tensor, flips: Flips) -> np.ndarray:
    """The definition, voxel by voxel."""
    shape, images = image.shape, [(), *mirror_axes(flips)]
    out = np.zeros((3, *shape))
    found = [torch.sigmoid(run(image.flip(axes))).numpy() for axes in images]
    for c in range(3):
        for v in np.ndindex(*shape):
            previous = list(v)
            previous[c] -= 1
            values = []
            for axes, a in zip(images, found, strict=True):
                # Where the two voxels lie in this image; the later one holds the affinity.
                ends = [
                    [n - 1 - p if axis in axes else p for axis, (p, n) in enumerate(pairs)]
                    for pairs in (
                        list(zip(v, shape, strict=True)),
                        list(zip(previous, shape, strict=True)),
                    )
                ]
                later = max(ends, key=lambda end: end[c])
                if later[c] < shape[c]:
                    values.append(a[(c, *later)])
            out[(c, *v)] = np.mean(values)
    return out


def test_how_many_images() -> None:
    assert [len(list(mirror_axes(f))) for f in ("none", "inplane", "all")] == [0, 3, 7]
    assert all(0 not in axes for axes in mirror_axes("inplane"))


@pytest.mark.parametrize("flips", EVERY)
def test_a_symmetric_network_gains_and_loses_nothing(flips: Flips) -> None:
    """Its affinities come back at the voxels they belong to, also beside the first planes."""
    image = random_image()
    mean = flipped_affinities(differences(image), differences, image, flips)
    torch.testing.assert_close(mean, torch.sigmoid(differences(image)))


@pytest.mark.parametrize("flips", EVERY)
def test_mean_against_the_definition(flips: Flips) -> None:
    def run(image: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, image.numel()).reshape(image.shape)
        return torch.stack([image * ramp, image - ramp, image * 2])

    image = random_image(1)
    mean = flipped_affinities(run(image), run, image, flips)
    np.testing.assert_allclose(mean.numpy(), slow(run, image, flips), atol=1e-6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "small.safetensors")


def test_predictor_mirrored_block_has_mirrored_affinities(weights: Path) -> None:
    """With all flips a mirrored block has the same affinities, mirrored, but for rounding."""
    predictor = AGQPredictor(weights, device="cpu", flips="all")
    image = block()
    one, other = predictor.predict([image, np.ascontiguousarray(image[:, ::-1])])
    y = other.affinities[:, :, ::-1].astype(int)
    own = one.affinities.astype(int)
    for channel in (0, 2):
        assert np.abs(own[channel] - y[channel]).max() <= 1
    assert np.abs(own[1, :, 1:] - y[1, :, :-1]).max() <= 1
    plain = AGQPredictor(weights, device="cpu").predict([image, image[:, ::-1].copy()])
    unlike = plain[0].affinities[0].astype(int) - plain[1].affinities[0, :, ::-1].astype(int)
    assert np.abs(unlike).max() > 1


def test_predictor_masks_stay_and_results_repeat(weights: Path) -> None:
    plain = AGQPredictor(weights, device="cpu").predict([block()])[0]
    predictor = AGQPredictor(weights, device="cpu", flips="inplane")
    one, again = predictor.predict([block(), block()])
    assert np.array_equal(one.affinities, again.affinities)
    assert np.array_equal(one.labels, plain.labels)  # the small network cuts nothing
    assert not np.array_equal(one.affinities, plain.affinities)


def test_predictor_plain_path_agrees(weights: Path) -> None:
    """The two ways to run the network on a CPU give the same mean."""
    predictor = AGQPredictor(weights, device="cpu", flips="inplane")
    lean = predictor.predict([block()])[0].affinities.astype(int)
    predictor.lean = None
    assert np.abs(predictor.predict([block()])[0].affinities - lean).max() <= 1


def test_checkpoint_may_ask_for_flips(tmp_path: Path) -> None:
    path = write_checkpoint(
        tmp_path / "flips.safetensors", SMALL.model_copy(update={"flips": "all"})
    )
    assert AGQPredictor(path, device="cpu").config.flips == "all"
    assert AGQPredictor(path, device="cpu", flips="none").config.flips == "none"
    with pytest.raises(InputError, match=r"flips: .*'none', 'inplane' or 'all'"):
        AGQPredictor(path, device="cpu", flips="both")  # type: ignore[arg-type]
