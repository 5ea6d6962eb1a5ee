"""Crops: reading, augmentation and the order of batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from model.config import ModelConfig
from model.errors import ModelInputError
from model.training.augment import augment, misalign, orient, shade
from model.training.config import AugmentConfig, TrainConfig, VolumeConfig
from model.training.data import CropSource, TrainingVolume

STILL = AugmentConfig(
    flips=False,
    rotations=False,
    contrast=0,
    brightness=0,
    gamma=0,
    section_jitter=0,
    noise=0,
    missing_section=0,
    misalignment=0,
)


def write_volume(
    container: Path, shape: tuple[int, int, int] = (6, 40, 44), seed: int = 0
) -> VolumeConfig:
    rng = np.random.default_rng(seed)
    group = zarr.open_group(container, mode="w")
    raw = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = (np.indices(shape)[1] // 10 * 5 + np.indices(shape)[2] // 9).astype(np.uint64)
    for name, data in (("raw", raw), ("labels", labels)):
        group.create_array(name, data=data, chunks=(4, 16, 16))
    return VolumeConfig(container=container)


def config_of(tmp_path: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "output": tmp_path / "run",
        "network": ModelConfig(filters=(8, 8), isotropy=(False, False), embed_dim=8),
        "volumes": [write_volume(tmp_path / "volume.zarr")],
        "crop": (3, 17, 17),
        "pad": (1, 4, 4),
        "losses": {"samples": 20},
    }
    return TrainConfig.model_validate(values | changes)


def test_reading_reflects_beyond_the_volume(tmp_path: Path) -> None:
    volume = TrainingVolume(write_volume(tmp_path / "v.zarr"))
    whole = np.asarray(volume.raw[:])
    padded = np.pad(whole, ((2, 3), (5, 5), (5, 5)), mode="reflect")
    raw, labels = volume.read((-2, -5, 20), (9, 30, 29))
    assert raw.shape == labels.shape == (9, 30, 29)
    assert (raw == padded[:9, :30, 25:54]).all()
    inside, _ = volume.read((1, 2, 3), (2, 4, 5))
    assert (inside == whole[1:3, 2:6, 3:8]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw": "nothing"}, "no zarr array at .*nothing"),
        ({"raw": "labels"}, "uint64; training reads uint8"),
        ({"labels": "small"}, "must cover the same voxels"),
        ({"labels": "flat"}, "has 2 axes"),
        ({"labels": "float"}, "labels are integers"),
    ],
)
def test_a_volume_that_cannot_be_used_is_one_clear_line(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    volume = write_volume(tmp_path / "v.zarr")
    group = zarr.open_group(tmp_path / "v.zarr")
    group.create_array("small", data=np.zeros((2, 3, 4), np.uint8))
    group.create_array("flat", data=np.zeros((3, 4), np.uint8))
    group.create_array("float", data=np.zeros((6, 40, 44), np.float32))
    with pytest.raises(ModelInputError, match=message):
        TrainingVolume(volume.model_copy(update=change))


def test_augmentation_moves_labels_with_the_picture() -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (4, 30, 30), dtype=np.uint8)
    config = STILL.model_copy(
        update={"flips": True, "rotations": True, "misalignment": 1.0, "max_shift": 3}
    )
    changed = 0
    for seed in range(20):
        grey, moved = augment(
            raw, raw.astype(np.uint32), (4, 24, 24), config, np.random.default_rng(seed)
        )
        assert grey.dtype == np.float32
        assert moved.shape == (4, 24, 24)
        np.testing.assert_allclose(grey * 255, moved, atol=1e-3)
        changed += not np.array_equal(moved, raw[:, 3:27, 3:27])
    assert changed > 15


def test_no_augmentation_is_the_plain_crop() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (3, 40, 42), dtype=np.uint8)
    margin = STILL.max_shift
    shape = (3, 40 - 2 * margin, 42 - 2 * margin)
    grey, labels = augment(raw, raw, shape, STILL, np.random.default_rng(1))
    plain = raw[:, margin:-margin, margin:-margin]
    assert (labels == plain).all()
    np.testing.assert_allclose(grey, plain / 255.0, atol=1e-6)


def test_a_jump_moves_one_section_or_all_that_follow() -> None:
    config = AugmentConfig(misalignment=1.0, max_shift=4)
    plane = np.random.default_rng(3).integers(0, 256, (20, 20), dtype=np.uint8)
    raw = np.repeat(plane[None], 6, axis=0)
    kinds = set()
    for seed in range(40):
        out, _ = misalign(raw, raw, (6, 12, 12), config, np.random.default_rng(seed))
        moved = [bool((section != out[0]).any()) for section in out]
        if any(moved):
            first = moved.index(True)
            kinds.add("slip" if sum(moved) == 1 and first < 5 else "shift")
            assert sum(moved) == 1 or all(moved[first:])
    assert kinds == {"slip", "shift"}


def test_quarter_turns_only_where_the_shape_allows() -> None:
    raw = np.zeros((2, 5, 7), np.uint8)
    for seed in range(8):
        out, _ = orient(raw, raw, AugmentConfig(), np.random.default_rng(seed))
        assert out.shape == raw.shape


def test_greys_stay_in_range_and_a_missing_section_is_blank() -> None:
    raw = np.random.default_rng(0).random((5, 9, 9), dtype=np.float32)
    config = AugmentConfig(missing_section=1.0)
    for seed in range(5):
        out = shade(raw, config, np.random.default_rng(seed))
        assert out.dtype == np.float32
        assert out.min() >= 0
        assert out.max() <= 1
        assert sum(np.ptp(section) == 0 for section in out) == 1


def test_a_step_has_the_same_batch_whoever_asks(tmp_path: Path) -> None:
    config = config_of(tmp_path, batch_size=2)
    source = CropSource(config)
    ahead = list(source.batches(3, 9, threads=3))
    assert [batch.step for batch in ahead] == list(range(3, 9))
    again = CropSource(config).batch(7)
    assert torch.equal(ahead[4].raw, again.raw)
    assert again.raw.shape == (2, 1, 3, 17, 17)
    assert float(again.raw.min()) >= -1
    assert float(again.raw.max()) <= 1
    for one, two in zip(ahead[4].targets, again.targets, strict=True):
        assert torch.equal(one.masks, two.masks)
        assert torch.equal(one.samples, two.samples)
    assert not torch.equal(ahead[0].raw, ahead[1].raw)


def test_volumes_are_drawn_by_weight_and_small_ones_are_padded(tmp_path: Path) -> None:
    large = write_volume(tmp_path / "large.zarr", seed=1)
    small = write_volume(tmp_path / "small.zarr", (2, 10, 60), seed=2)
    config = config_of(
        tmp_path, volumes=[large, small.model_copy(update={"weight": 3.0})], pad=(0, 0, 0)
    )
    source = CropSource(config)
    reads = [0, 0]
    for k, volume in enumerate(source.volumes):
        plain = volume.read

        def counted(*box: object, k: int = k, plain: object = plain) -> object:
            reads[k] += 1
            return plain(*box)  # type: ignore[operator]

        volume.read = counted  # type: ignore[method-assign, assignment]
    for step in range(80):
        source.crop(np.random.default_rng(step))
    assert sum(reads) == 80
    assert 45 < reads[1] < 75


def test_a_failing_volume_stops_the_batches(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    source = CropSource(config)
    for file in (tmp_path / "volume.zarr" / "raw").rglob("c/*/*/*"):
        file.write_bytes(b"broken")
    with pytest.raises(Exception, match=r"."):
        next(source.batches(0, 4, threads=1))
