"""Skeletons of an export: the same by windows as at once, read back by others."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from agq.blockwise.export.rows import starts_of
from agq.blockwise.export.skeletons import encode, run
from agq.blockwise.export.skeletons.join import Skeleton, join
from agq.blockwise.export.skeletons.run import Windows, cable_of, export_skeletons
from agq.blockwise.export.target import Target
from agq.blockwise.export.volume import export_precomputed, plan_export
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import Volume, open_levels
from agq.pipeline.evaluate.skeletons import expected_run_length, read_skeletons, segments_at
from tests.helpers.fragments import folder_bytes
from tests.helpers.neurites import neurites
from tests.helpers.readers import read_with

SIZE = (32, 32, 32)


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> list[Volume]:
    folder = tmp_path_factory.mktemp("neurites")
    data = neurites((60, 100, 110), 12)
    create_array(
        folder, "a", shape=data.shape, chunks=(20, 50, 50), dtype="uint64", voxel_size=SIZE,
        offset=(320, 0, -64),
    )[:] = data  # fmt: skip
    return open_levels(folder, "a", kind="labels")


@pytest.fixture(scope="module")
def target(levels, client, tmp_path_factory) -> Target:
    out = tmp_path_factory.mktemp("export") / "out"
    export_precomputed(levels, plan_export(levels), out, client)
    return Target.of(out)


def skeletons(volume: Volume, core_nm: float) -> dict[int, Skeleton]:
    windows = Windows.of(volume, core_nm)
    edges = np.concatenate([windows.trace(i)[0] for i in range(np.prod(windows.grid))])
    edges = edges[np.argsort(edges["segment"], kind="stable")]
    return {
        int(rows["segment"][0]): join(
            rows, volume.shape, windows.core, windows.size, windows.offset
        )
        for rows in np.split(edges, starts_of(edges)[1:])
    }


def parts(skeleton: Skeleton) -> int:
    count = len(skeleton.nodes)
    graph = sparse.coo_matrix((np.ones(len(skeleton.edges)), skeleton.edges.T), (count, count))
    return sparse.csgraph.connected_components(graph, directed=False)[0]


def test_windows_give_what_the_whole_volume_gives(levels, monkeypatch):
    monkeypatch.setattr(run, "MARGIN_NM", 700)
    whole = skeletons(levels[0], 1e9)
    total = sum(s.cable_nm for s in whole.values())
    assert total > 12 * 32 * 50
    for core in (1300, 900):
        cut = skeletons(levels[0], core)
        assert cut.keys() == whole.keys()
        assert sum(s.cable_nm for s in cut.values()) == pytest.approx(total, rel=0.03)
        for segment, skeleton in cut.items():
            # Each label is connected: so is its skeleton, and it is a tree.
            assert parts(skeleton) == parts(whole[segment]) == 1, segment
            assert len(skeleton.edges) == len(skeleton.nodes) - 1
            assert skeleton.cable_nm == pytest.approx(whole[segment].cable_nm, rel=0.25)


def test_total_length_beside_kimimaro(levels, tmp_path):
    labels = levels[0].read((0, 0, 0), levels[0].shape)
    np.save(tmp_path / "labels.npy", labels.astype(np.uint32))
    theirs = read_with(
        "import numpy, kimimaro\n"
        "found = kimimaro.skeletonize(numpy.load(arguments['file']), anisotropy=(32, 32, 32),\n"
        "    teasar_params={'scale': 1.5, 'const': 250}, dust_threshold=0, progress=False)\n"
        "result = sum(float(s.cable_length()) for s in found.values())",
        {"file": str(tmp_path / "labels.npy")},
    )
    ours = sum(s.cable_nm for s in skeletons(levels[0], 1e9).values())
    print(f"cable: {ours:,.0f} nm, kimimaro {theirs:,.0f} nm")
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.parametrize("sharded", [True, False])
def test_read_back_by_cloud_volume(levels, target, client, tmp_path, monkeypatch, sharded):
    if not sharded:
        monkeypatch.setattr(run, "sharding_of", lambda *_: None)
    labels = levels[0].read((0, 0, 0), levels[0].shape)
    ids, voxels = np.unique(labels[labels > 0], return_counts=True)
    least = int(np.median(voxels))
    large = ids[voxels >= least].tolist()
    report = export_skeletons(
        levels, target, client, core_nm=1500, least_voxels=least, swc_folder=tmp_path / "swc"
    )
    whole = skeletons(levels[0], 1500)
    assert (report.skeletons, report.small) == (len(large), len(ids) - len(large))
    assert 0 < report.small < len(ids)
    assert report.cable_um == pytest.approx(sum(whole[s].cable_nm for s in large) / 1000)
    info = json.loads(target.read("info"))
    assert info["skeletons"] == "skeletons"
    found = read_with(
        "from cloudvolume import CloudVolume\n"
        "cv = CloudVolume(arguments['path'], progress=False)\n"
        "result = {}\n"
        "for i in arguments['ids']:\n"
        "    s = cv.skeleton.get(i)\n"
        "    result[i] = [s.vertices.tolist(), s.edges.tolist(), s.radius.tolist()]",
        {"path": f"file://{target.text}", "ids": large},
    )
    for segment in large:
        vertices, edges, radius = found[str(segment)]
        expected = whole[segment]
        assert np.allclose(np.array(vertices)[:, ::-1], expected.nodes)
        assert np.array_equal(edges, expected.edges)
        assert np.allclose(radius, expected.radii)
    # Run length walks along them; the segmentation that they are of is right everywhere.
    walked = read_skeletons(tmp_path / "swc")
    assert len(list((tmp_path / "swc").iterdir())) == len(large)
    length = expected_run_length(walked, segments_at(levels[0], walked.nodes))
    assert length.total == pytest.approx(report.cable_um * 1000, rel=1e-4)
    assert length.correct == 1


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(levels, client, tmp_path, monkeypatch):
    outs = []
    for name in ("first", "second"):
        target = Target.of(tmp_path / name)
        export_precomputed(levels, plan_export(levels), target, client)
        outs.append(target)
    export_skeletons(levels, outs[0], client, core_nm=1500)
    for name in ("trace", "join"):
        real, left = getattr(run, name), iter(range(5))

        def stopped(*arguments, real=real, left=left):
            if next(left, None) is None:
                raise ValueError("stopped")
            return real(*arguments)

        monkeypatch.setattr(run, name, stopped)
        with pytest.raises(ValueError, match="stopped"):
            export_skeletons(levels, outs[1], client, core_nm=1500)
        monkeypatch.undo()
    export_skeletons(levels, outs[1], client, core_nm=1500)
    # Others in between leave nothing behind, and it is done again.
    assert export_skeletons(levels, outs[1], client, core_nm=1500).written == 0
    assert cable_of(outs[1]) is not None
    monkeypatch.setattr(run, "encoded", stopping)
    with pytest.raises(ValueError, match="stopped"):
        export_skeletons(levels, outs[1], client, core_nm=1500, least_voxels=2)
    monkeypatch.undo()
    # Lengths of a part are not taken for those of all.
    assert cable_of(outs[1]) is None
    export_skeletons(levels, outs[1], client, core_nm=1500, least_voxels=10**9)
    assert export_skeletons(levels, outs[1], client, core_nm=1500).written > 0
    one, other = (folder_bytes(Path(out.text) / "skeletons") for out in outs)
    assert one == other
    assert len(one) > 1


def stopping(*_):
    raise ValueError("stopped")


def test_to_a_bucket(levels, client, tmp_path, s3):
    target = Target.of("s3://em-data/out", tmp_path / "work")
    export_precomputed(levels, plan_export(levels), target, client)
    assert export_skeletons(levels, target, client).skeletons > 0
    assert any(key.endswith(".shard") for key in s3.listed() if "/skeletons/" in key)
    assert cable_of(target) is not None


def test_shards_hold_consecutive_ids():
    assert encode.sharding_of(2**40, 1000) is None
    for largest, segments in ((5, 5), (2**14, 2**14), (10**8, 10**8)):
        sharding = encode.sharding_of(largest, segments)
        assert (
            largest >> sum(sharding[f"{n}_bits"] for n in ("preshift", "minishard", "shard")) == 0
        )
        assert encode.ids_of_shard(sharding) <= 2**14
