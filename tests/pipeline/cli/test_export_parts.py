"""`agq export precomputed` with skeletons and properties, and what takes them."""

import pyarrow.parquet as pq
import pytest

from tests.helpers.neurites import neurites
from tests.helpers.runs import write_volume


@pytest.mark.slow
def test_skeletons_and_properties_of_labels(main, tmp_path):
    write_volume(tmp_path / "in.zarr", "labels", neurites((30, 60, 60), 4), voxel_size=(32, 32, 32))
    labels, out, swc = f"{tmp_path}/in.zarr::labels", tmp_path / "out", tmp_path / "swc"
    command = ("export", "precomputed", labels, out, "--skeletons", "--properties", "--workers", 1)
    for wrong, message in (
        (("--skeleton-level", 1), "--skeleton-level 1: the levels are 0 to 0"),
        (("--image",), "--properties, --all: grey values have no segments"),
        (("--swc", "s3://bucket/swc"), "--swc: s3:/bucket/swc is an address"),
    ):
        code, _, err = main(*command, *wrong)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert message in err
    assert not out.exists()
    code, said, err = main(*command, "--swc", swc, "--least-voxels", 100)
    assert code == 0, err
    table = pq.read_table(out / "segment_properties" / "segments.parquet")
    cable = sum(table["cable_um"].to_pylist())
    assert f"skeletons of 32_32_32: 4 of {cable:,.1f} um in all; 0 segments are too small" in said
    assert "segment_properties: 4 segments in segments.parquet, 4 of at least 100 voxels" in said
    # What an earlier command has traced is in the properties of a later one.
    code, _, err = main(*command[:4], "--properties", "--workers", 1)
    assert code == 0, err
    again = pq.read_table(out / "segment_properties" / "segments.parquet")
    assert again["cable_um"] == table["cable_um"]
    code, said, err = main("evaluate", labels, labels, "--skeletons", swc)
    assert code == 0, err
    assert "(4 skeletons, " in said
    assert "100.0% correct" in said
