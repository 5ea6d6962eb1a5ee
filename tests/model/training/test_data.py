"""Crops: reading, augmentation and the order of batches."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from agq.errors import InputError
from agq.model.config import ModelConfig
from agq.model.training.config import AugmentConfig, TrainConfig, VolumeConfig
from agq.model.training.data.augment import (
    augment,
    delete_sections,
    margin,
    misalign,
    orient,
    shade,
    spare_sections,
    spoil,
)
from agq.model.training.data.crops import CropSource, TrainingVolume
from agq.model.training.data.targets import affinities_of, make_targets
from agq.model.training.data.warp import warp, warp_margin
from tests.helpers.fuzz import require_one_line

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
    warp=0,
    blur=0,
    motion_blur=0,
    missing_part=0,
    cut_blur=0,
    cut_noise=0,
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
    with pytest.raises(InputError, match=message):
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


def test_labels_outside_the_mask_are_not_valid(tmp_path: Path) -> None:
    volume = write_volume(tmp_path / "v.zarr")
    mask = np.zeros((6, 40, 44), np.uint8)
    mask[:, 8:30, 10:40] = 1
    group = zarr.open_group(tmp_path / "v.zarr")
    group.create_array("mask", data=mask, chunks=(4, 16, 16))
    group.create_array("small", data=mask[:2], chunks=(2, 16, 16))
    masked = volume.model_copy(update={"mask": "mask"})
    opened = TrainingVolume(masked)
    plain = TrainingVolume(volume).read((0, 0, 0), (6, 40, 44))[1]
    _, labels = opened.read((0, 0, 0), (6, 40, 44))
    assert ((labels < 0) == (mask == 0)).all()
    pairs = np.unique(np.stack([labels[mask > 0], plain[mask > 0].astype(np.int64)]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert ((pairs[0] == 0) == (pairs[1] == 0)).all()
    source = CropSource(config_of(tmp_path, volumes=[masked]))
    known = [source.batch(step).targets[0].valid for step in range(12)]
    assert any(k is not None and 0 < k.float().mean() < 1 for k in known)
    assert any(k is None for k in known)
    with pytest.raises(InputError, match="must cover the same voxels"):
        TrainingVolume(volume.model_copy(update={"mask": "small"}))


def test_a_pair_is_known_if_both_of_its_voxels_are() -> None:
    labels = np.ones((2, 4, 6), np.int64)
    valid = np.ones(labels.shape, bool)
    valid[:, :, 3] = False
    targets = make_targets(
        np.where(valid, labels, 0), valid=valid, min_voxels=1, rng=np.random.default_rng(0)
    )
    assert targets.valid is not None
    assert targets.affinities_valid is not None
    # P1 halves y and x: coarse column 1 is made of the fine columns 2 and 3.
    assert targets.valid[0].tolist() == [[True, False, True]] * 2
    # On x, fine column 4 is paired with column 3, so coarse column 2 is not known either.
    assert targets.affinities_valid[2, 0].tolist() == [[True, False, False]] * 2
    assert targets.affinities_valid[1, 0].tolist() == [[True, False, True]] * 2
    wrong = affinities_of(np.where(valid, labels, 0))[2][:, :, 4]
    assert (wrong == 0).all()  # what would be learned without the mask
    assert float(targets.masks[:, ~targets.valid].abs().sum()) == 0


def test_warping_moves_labels_with_the_picture() -> None:
    config = STILL.model_copy(update={"warp": 1.0, "rescale": 0.2, "elastic": 3.0})
    shape = (2, 40, 50)
    border = warp_margin(shape, config)
    y, x = np.indices((40 + 2 * border, 50 + 2 * border))
    plane = (120 + 60 * np.sin(y / 9) * np.cos(x / 11)).astype(np.uint8)
    big = np.repeat(plane[None], 2, 0)
    seen = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        raw, labels = warp(big, big.astype(np.uint64) + 2**60, shape, config, rng)
        assert raw.dtype == np.uint8
        assert labels.dtype == np.uint64
        moved = (labels - np.uint64(2**60)).astype(int)
        assert np.abs(raw.astype(int) - moved).max() <= 12
        assert (raw[0] == raw[1]).all()
        seen.add(raw.tobytes())
        again = warp(big, big, shape, config, np.random.default_rng(seed))[0]
        assert (raw == again).all()
    assert len(seen) == 6
    still, _ = warp(big, big, shape, config.model_copy(update={"warp": 0.0}), rng)
    assert still.shape[0] == 2


def test_warping_stays_within_its_margin() -> None:
    """Nothing is invented: a picture of its own coordinates never runs into its border."""
    config = STILL.model_copy(update={"warp": 1.0, "rescale": 0.3, "elastic": 5.0, "max_shift": 4})
    shape = (1, 32, 32)
    border = margin(shape, config)
    inner = np.full((1, 32 + 2 * border, 32 + 2 * border), 255, np.uint8)
    inner[:, 1:-1, 1:-1] = 100
    for seed in range(30):
        out, _ = augment(inner, inner, shape, config, np.random.default_rng(seed))
        assert (out * 255 < 101).all()


def test_published_strengths_are_one_word() -> None:
    config = AugmentConfig.model_validate({"preset": "published", "elastic": 0})
    assert (config.elastic, config.rescale, config.cut_noise_size) == (0, 0.25, 0.3)
    assert TrainConfig.model_validate(
        {"output": "x", "volumes": [{"container": "y"}], "augment": "published"}
    ).augment == AugmentConfig.model_validate("published")
    with pytest.raises(ValueError, match="no preset 'publishd': there are published"):
        AugmentConfig.model_validate("publishd")
    shape = (5, 24, 24)
    config = AugmentConfig.model_validate("published")
    border = margin(shape, config)
    rng = np.random.default_rng(0)
    size = (5 + spare_sections(config), 24 + 2 * border, 24 + 2 * border)
    raw = rng.integers(0, 256, size, dtype=np.uint8)
    for seed in range(20):
        grey, labels = augment(
            raw, raw.astype(np.uint32), shape, config, np.random.default_rng(seed)
        )
        assert grey.shape == labels.shape == shape
        assert 0 <= grey.min() <= grey.max() <= 1


def test_deleted_sections_are_gone_from_raw_and_labels() -> None:
    config = STILL.model_copy(update={"deleted_sections": 1.0})
    raw = np.repeat(np.arange(8, dtype=np.uint8), 16).reshape(8, 4, 4)
    seen = set()
    for seed in range(20):
        left, labels = delete_sections(raw, raw + 100, config, np.random.default_rng(seed))
        assert (labels == left + 100).all()
        sections = left[:, 0, 0].tolist()
        assert len(sections) == 6
        assert sections == sorted(sections)
        assert (sections[0], sections[-1]) == (0, 7)
        seen.add(tuple(sections))
    assert len(seen) > 5
    never = config.model_copy(update={"deleted_sections": 1e-9})
    left, _ = delete_sections(raw, raw, never, np.random.default_rng(0))
    assert left[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert delete_sections(raw, raw, STILL, np.random.default_rng(0))[0] is raw


def test_a_slip_may_turn_sections_with_their_labels() -> None:
    config = STILL.model_copy(update={"misalignment": 1.0, "max_shift": 6, "rotation": 1.0})
    plane = np.random.default_rng(1).integers(0, 256, (52, 52), dtype=np.uint8)
    raw = np.repeat(plane[None], 6, 0)
    turned = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        out, labels = misalign(raw, raw.astype(np.uint64) + 2**60, (6, 40, 40), config, rng)
        assert (labels == out.astype(np.uint64) + 2**60).all()
        still = (out == raw[:, 6:46, 6:46]).all(axis=(1, 2))
        assert still[0]
        turned += not still.all()
        # The middle stays: a turn, not a shift.
        assert (out[:, 19:21, 19:21] == plane[25:27, 25:27]).all()
    assert turned >= 8


def test_wide_parts_are_the_mean_of_their_section() -> None:
    raw = np.random.default_rng(0).random((40, 30, 40), dtype=np.float32)
    out = spoil(raw, STILL.model_copy(update={"wide_parts": 1.0}), np.random.default_rng(0))
    changed = (out != raw).mean(axis=(1, 2))
    assert 8 < np.count_nonzero(changed) < 32
    np.testing.assert_allclose(changed[changed > 0], 0.42, atol=0.02)
    for section, share in enumerate(changed):
        if share:
            filled = out[section][out[section] != raw[section]]
            assert filled == pytest.approx(raw[section].mean(), rel=1e-5)


@pytest.mark.parametrize("fault", ["blur", "motion_blur", "missing_part", "cut_blur", "cut_noise"])
def test_each_fault_changes_a_part_of_the_greys(fault: str) -> None:
    raw = np.random.default_rng(0).random((6, 30, 40), dtype=np.float32)
    config = STILL.model_copy(update={fault: 1.0})
    for seed in range(8):
        out = spoil(raw, config, np.random.default_rng(seed))
        assert out.dtype == np.float32
        assert out.shape == raw.shape
        assert 0 <= out.min() <= out.max() <= 1
        changed = out != raw
        assert changed.any()
        assert changed.mean() < 0.5
        if not fault.startswith("cut"):
            assert np.count_nonzero(changed.any(axis=(1, 2))) == 1
        assert (spoil(raw, config, np.random.default_rng(seed)) == out).all()
    assert (spoil(raw, STILL, np.random.default_rng(0)) == raw).all()


def test_processes_take_different_items_of_one_step(tmp_path: Path) -> None:
    both = CropSource(config_of(tmp_path, batch_size=2)).batch(5)
    single = config_of(tmp_path, batch_size=1)
    for rank in (0, 1):
        alone = CropSource(single, rank).batch(5)
        assert torch.equal(alone.raw[0], both.raw[rank])


def test_axes_turn_only_in_cubes() -> None:
    config = STILL.model_copy(update={"turn_axes": True})
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    turned = [orient(cube, cube, config, np.random.default_rng(seed)) for seed in range(12)]
    assert all((raw == labels).all() for raw, labels in turned)
    assert len({raw.tobytes() for raw, _ in turned}) > 3
    flat = cube[:2]
    assert (orient(flat, flat, config, np.random.default_rng(1))[0] == flat).all()


@pytest.mark.parametrize("name", ["raw/zarr.json", "raw/c/0/0/0"])
@pytest.mark.parametrize("kind", ["fifo", "damaged"])
def test_a_training_volume_made_to_do_harm(tmp_path, name, kind):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    for array, dtype in (("raw", np.uint8), ("labels", np.uint64)):
        data = np.ones((4, 8, 8), dtype)
        group.create_array(array, shape=data.shape, chunks=(4, 8, 8), dtype=dtype)[...] = data
    file = tmp_path / "a.zarr" / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.write_bytes(b"[" * 100_000)

    def look() -> None:
        volume = TrainingVolume(VolumeConfig(container=tmp_path / "a.zarr"))
        volume.read((0, 0, 0), (4, 8, 8))

    assert "a.zarr" in require_one_line(look)
