"""Segment properties: against the whole volume counted at once."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import ndimage

from agq.blockwise.export import properties, rows
from agq.blockwise.export.properties import export_properties
from agq.blockwise.export.target import Target
from agq.blockwise.export.volume import export_precomputed, plan_export
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_levels
from tests.helpers.fragments import GRID, make_run, write_run
from tests.helpers.readers import read_with


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several boxes, batches and ranges of segments even here."""
    monkeypatch.setattr(properties, "_MOST_VOXELS", 700)
    monkeypatch.setattr(rows, "ROWS", 20)
    monkeypatch.setattr(properties, "batches_of", lambda boxes: rows.batches_of(boxes, 4))


@pytest.fixture
def stitched(client, tmp_path) -> Path:
    run = make_run(GRID, seed=5)
    write_run(run, tmp_path / "run")
    run_stitch(run.spec(tmp_path / "run"), client)
    return tmp_path / "run"


def exported(levels, out, client) -> Target:
    export_precomputed(levels, plan_export(levels), out, client)
    return Target.of(out)


def expected(labels: np.ndarray, size=(30, 6, 6)) -> dict[int, list]:
    """Return voxels, volume, surface and box of each segment."""
    area = [size[1] * size[2], size[0] * size[2], size[0] * size[1]]
    found = {}
    for segment in np.unique(labels[labels > 0]).tolist():
        mask = labels == segment
        steps = [np.count_nonzero(np.diff(mask.astype(int), axis=axis)) for axis in range(3)]
        box = ndimage.find_objects(mask.astype(int))[0]
        found[segment] = [
            int(mask.sum()),
            mask.sum() * np.prod(size) / 1e9,
            sum(n * a for n, a in zip(steps, area, strict=True)) / 1e6,
            *(s.start for s in box),
            *(s.stop for s in box),
        ]
    return found


def test_the_table_counts_what_the_whole_volume_holds(stitched, tmp_path, client):
    levels = open_levels(stitched / "data.zarr", "segmentation", kind="labels")
    target = exported(levels, tmp_path / "out", client)
    known = stitched / "lut" / "segments.parquet"
    labels = levels[0].read((0, 0, 0), levels[0].shape)
    ids = np.unique(labels[labels > 0])
    lengths = np.zeros(len(ids[::2]), [("segment", "u8"), ("cable_um", "f8")])
    lengths["segment"], lengths["cable_um"] = ids[::2], range(len(lengths))
    rows.write_part(tmp_path, 0, lengths)
    report = export_properties(
        levels[0], target, client, segments=known, cable=(tmp_path, 1), least_voxels=30
    )
    table = pq.read_table(tmp_path / "out" / "segment_properties" / "segments.parquet")
    counted = expected(labels)
    assert table["segment"].to_pylist() == list(counted) == ids.tolist()
    names = ["voxels", "volume_um3", "surface_um2"]
    names += [f"{end}_{axis}" for end in ("begin", "end") for axis in "zyx"]
    for row in table.to_pylist():
        assert [row[name] for name in names] == pytest.approx(counted[row["segment"]])
    stored = pq.read_table(known)
    assert table["fragments"] == stored["fragments"]
    assert table["voxels"] == stored["voxels"]
    assert table["cable_um"].to_pylist()[:4] == [0, None, 1, None]
    # neuroglancer gets the larger ones, the largest first, and knows where.
    info = json.loads((tmp_path / "out" / "info").read_text())
    assert info["segment_properties"] == "segment_properties"
    shown = json.loads((tmp_path / "out" / "segment_properties" / "info").read_text())
    by_id = {p["id"]: p for p in shown["inline"]["properties"]}
    large = sorted((n[0] for n in counted.values() if n[0] >= 30), reverse=True)
    assert by_id["voxels"]["values"] == large
    assert (report.segments, report.shown) == (len(ids), len(large))
    assert len(large) < len(ids)
    assert by_id["volume_um3"]["data_type"] == "float32"
    assert {len(p["values"]) for p in by_id.values()} == {len(large)}
    assert [counted[int(s)][0] for s in shown["inline"]["ids"]] == large


def test_stopped_anywhere_it_goes_on(tmp_path, client, monkeypatch):
    data = np.random.default_rng(0).integers(0, 2**40, (9, 20, 11)).astype(np.int64) % 97
    create_array(
        tmp_path / "in", "a", shape=data.shape, chunks=(4, 8, 8), dtype="int64",
        voxel_size=(30, 6, 6),
    )[:] = data  # fmt: skip
    levels = open_levels(tmp_path / "in", "a", kind="labels")
    target, measure = exported(levels, tmp_path / "out", client), properties.measure

    def made():
        return {p: p.stat().st_mtime_ns for p in target.work.glob("properties-*/*.npy")}

    def stopped(*arguments):
        if made():
            raise ValueError("stopped")
        return measure(*arguments)

    def counted(*arguments):
        again.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(properties, "measure", stopped)
    with pytest.raises(ValueError, match="stopped"):
        export_properties(levels[0], target, client)
    assert not (tmp_path / "out" / "segment_properties").exists()
    kept, again = made(), []
    assert kept
    monkeypatch.setattr(properties, "measure", counted)
    export_properties(levels[0], target, client)
    assert again
    assert kept.items() < made().items(), "what was there was not made again"
    table = pq.read_table(tmp_path / "out" / "segment_properties" / "segments.parquet")
    assert table["voxels"].to_pylist() == [n[0] for n in expected(data).values()]
    assert table["fragments"].null_count == table.num_rows
    # The volume stays complete, with properties in its info.
    assert export_precomputed(levels, plan_export(levels), tmp_path / "out", client) == 0
    assert "segment_properties" in json.loads((tmp_path / "out" / "info").read_text())
    read = read_with(
        "from cloudvolume import CloudVolume\n"
        "from cloudfiles import CloudFiles\n"
        "cv = CloudVolume(arguments['path'], progress=False)\n"
        "found = CloudFiles(arguments['path']).get_json(cv.info['segment_properties'] + '/info')\n"
        "result = [int((cv[:] == 5).sum()), found['@type']]",
        {"path": f"file://{tmp_path}/out"},
    )
    assert read == [int((data == 5).sum()), "neuroglancer_segment_properties"]


def test_to_a_bucket(tmp_path, client, s3):
    create_array(
        tmp_path / "in", "a", shape=(4, 8, 8), chunks=(4, 8, 8), dtype="uint8",
        voxel_size=(30, 6, 6),
    )[1:] = 7  # fmt: skip
    levels = open_levels(tmp_path / "in", "a", kind="labels")
    target = Target.of("s3://em-data/out", tmp_path / "work")
    export_precomputed(levels, plan_export(levels), target, client)
    assert export_properties(levels[0], target, client, least_voxels=1).shown == 1
    table = pq.read_table(pa.BufferReader(target.read("segment_properties/segments.parquet")))
    assert table["voxels"].to_pylist() == [192]
    assert json.loads(target.read("info"))["segment_properties"] == "segment_properties"
