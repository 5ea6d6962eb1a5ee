"""What a sample says of sections: percentiles, and which stand out."""

from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.volumes.open import open_volume
from agq.blockwise.volumes.sections import read_sections
from agq.errors import InputError
from tests.helpers.runs import blobs, write_volume

SHAPE = (40, 150, 170)


def opened(folder: Path, data: np.ndarray, chunks: tuple[int, int, int] | None = None):
    from agq.blockwise.volumes.create import create_array

    array = create_array(
        folder, "raw", shape=data.shape, dtype=data.dtype, voxel_size=(30, 6, 6),
        chunks=chunks or (8, 40, 40),
    )  # fmt: skip
    array[:] = data
    return open_volume(folder, "raw")


def volume(seed: int = 0) -> np.ndarray:
    """Noise around grey, with sections of slightly other brightness."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 6, (SHAPE[0], 1, 1))
    return np.clip(rng.normal(130, 30, SHAPE) + shift, 1, 254).astype(np.uint8)


def test_percentiles_are_those_of_the_voxels_that_are_not_blank(tmp_path):
    data = volume()
    data[:, :, :60] = 0
    data[3, :, 60:90] = 255
    seen = read_sections(opened(tmp_path, data))
    assert seen.z.tolist() == list(range(40))
    for z in (0, 3, 39):
        kept = data[z][(data[z] > 0) & (data[z] < 255)]
        low, high = np.percentile(kept, [1, 99])
        assert abs(seen.low[z] - low) < 6
        assert abs(seen.high[z] - high) < 6
        assert abs(seen.mean[z] - kept.mean()) < 3
    assert (seen.least, seen.most, seen.span) == (0, 255, 255)
    assert not seen.outstanding().keys() - {3}


def test_sections_that_stand_out(tmp_path):
    data = volume()
    rng = np.random.default_rng(1)
    data[4] = 0
    data[9] = 255
    data[14, :90] = 0
    data[18] = rng.normal(100, 5, SHAPE[1:])
    data[22] = 131
    data[26:28] = np.clip(data[26:28].astype(int) - 70, 1, 254)
    data[33] = np.clip(data[33].astype(int) + 70, 1, 254)
    found = read_sections(opened(tmp_path, data)).outstanding()
    assert found == {
        4: "blank", 9: "blank", 14: "blank", 18: "low contrast", 22: "low contrast",
        26: "dark", 27: "dark", 33: "bright",
    }  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        volume(),
        np.zeros(SHAPE, np.uint8),
        np.full((1, 20, 20), 7, np.uint16),
        np.full((3, 20, 20), np.nan, np.float32),
        blobs((5, 30, 30)),
        np.linspace(20, 230, 40)[:, None, None].astype(np.uint8) + volume() // 10,
    ],
    ids=["grey", "zero", "one", "nan", "thin", "gradient"],
)
def test_nothing_stands_out_where_nothing_is_wrong(tmp_path, data):
    seen = read_sections(opened(tmp_path, data, chunks=(1, 50, 60)))
    assert not seen.outstanding()
    assert (seen.ends()[:, 1] > seen.ends()[:, 0]).all()


def test_a_sample_is_bounded_and_spread(tmp_path, monkeypatch):
    source = opened(tmp_path, volume(), chunks=(2, 32, 32))
    read, boxes = type(source).read, []

    def counted(self, start, stop):
        boxes.append((start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(type(source), "read", counted)
    seen = read_sections(source, most_reads=16)
    assert len(boxes) <= 16
    assert 2 <= seen.z.size < 40
    assert seen.z.min() < 10
    assert seen.z.max() >= 30
    boxes.clear()
    part = read_sections(source, within=((7, 10, 10), (12, 60, 70)))
    assert part.z.tolist() == [7, 8, 9, 10, 11]
    assert all(a[0] >= 7 and b[0] <= 12 and b[1] <= 60 and b[2] <= 70 for a, b in boxes)


def test_what_cannot_be_read_is_named(tmp_path):
    source = opened(tmp_path, volume())
    chunk = next(file for file in (tmp_path / "raw" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"raw: \[\d+:\d+, .* cannot be read"):
        read_sections(source)
    write_volume(tmp_path / "other.zarr", "raw", volume())
