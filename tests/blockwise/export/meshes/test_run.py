"""Meshes of an export: the bars, held on what an independent reader finds in it."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from agq.blockwise.export.meshes import run as run_module
from agq.blockwise.export.meshes import surface
from agq.blockwise.export.meshes.run import Plan, export_meshes, mesh_level
from agq.blockwise.export.meshes.surface import Mesh, is_closed
from agq.blockwise.export.target import Target
from agq.blockwise.export.volume import export_precomputed, plan_export
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_levels
from tests.helpers.fragments import folder_bytes
from tests.helpers.meshes import cells, surface_distance
from tests.helpers.readers import read_with

SIZE, OFFSET = (24, 8, 10), (48, -16, 30)

BY_CLOUD_VOLUME = """
import numpy as np
from cloudvolume import CloudVolume
volume = CloudVolume(f"precomputed://file://{arguments['out']}", progress=False)
result = {}
for segment in arguments["segments"]:
    mesh = volume.mesh.get(segment, lod=arguments.get("lod", 0))[segment]
    result[segment] = [mesh.vertices.tolist(), mesh.faces.tolist()]
"""


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    labels = cells((60, 70, 64), 40, 3).astype(np.uint64)
    labels[labels == 7] = 2**40 + 7
    labels[20:23, 30:33, 30:33] = 99
    labels[labels == 5] = 0
    return labels


@pytest.fixture(scope="module")
def source(labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    create_array(
        folder, "a", shape=labels.shape, chunks=(30, 35, 32), dtype="uint64",
        voxel_size=SIZE, offset=OFFSET,
    )[:] = labels  # fmt: skip
    return open_levels(folder, "a", kind="labels")


def exported(source, out: Path, client, **options) -> Plan:
    scales = plan_export(source)
    export_precomputed(source, scales, out, client)
    return Plan(source[0], scales[0], Target.of(out), **options)


def read_back(out: Path, segments, **arguments) -> dict[int, trimesh.Trimesh]:
    found = read_with(
        BY_CLOUD_VOLUME, {"out": str(out), "segments": [int(s) for s in segments], **arguments}
    )
    return {
        int(s): trimesh.Trimesh(np.array(v), np.array(f), process=False)
        for s, (v, f) in found.items()
    }


def test_meshes_hold_the_bars_whatever_the_blocks(labels, source, tmp_path, client, monkeypatch):
    monkeypatch.setattr(run_module, "_SHARD_VOXELS", 2**16)
    seen: dict[str, int] = {}
    plan = exported(source, tmp_path / "a", client, block=(12, 14, 13))
    assert np.prod(plan.grid) >= 100
    shards = export_meshes(
        plan, client, on_progress=lambda name, done, _: seen.update({name: done})
    )
    assert shards == 2**plan.shard_bits == seen["meshes"] > 2
    assert seen["surfaces"] == np.prod(plan.grid)
    assert export_meshes(plan, client) == 0
    assert not plan.surfaces.exists()

    other = exported(source, tmp_path / "b", client, block=(60, 33, 64))
    export_meshes(other, client)
    assert folder_bytes(tmp_path / "a" / "mesh") == folder_bytes(tmp_path / "b" / "mesh")
    assert json.loads((tmp_path / "a" / "info").read_text())["mesh"] == "mesh"
    # tensorstore takes the document that names meshes for its own.
    assert export_precomputed(source, plan_export(source), tmp_path / "a", client) == 0

    segments = np.unique(labels[labels > 0])
    worst = 0.0
    for segment, mesh in read_back(tmp_path / "a", segments).items():
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        places = (mesh.vertices - np.array(OFFSET[::-1])) / SIZE[::-1]
        inside = labels == segment
        volume = mesh.volume / np.prod(SIZE)
        worst = max(worst, abs(volume / inside.sum() - 1))
        assert surface_distance(Mesh(places, mesh.faces), inside).max() <= 1
    assert worst < 0.02


def test_stopped_and_continued_and_made_anew_in_another_way(source, tmp_path, client, monkeypatch):
    monkeypatch.setattr(run_module, "_SHARD_VOXELS", 2**16)
    whole = exported(source, tmp_path / "whole", client, block=(30, 35, 32))
    export_meshes(whole, client)

    for step in ("surfaces", "meshes"):

        def stop(name: str, done: int, total: int, step: str = step) -> None:
            if name == step and 0 < done < total:
                raise KeyboardInterrupt

        plan = exported(source, tmp_path / step, client, block=(30, 35, 32))
        with pytest.raises(KeyboardInterrupt):
            export_meshes(plan, client, on_progress=stop)
        assert "mesh" not in json.loads((tmp_path / step / "info").read_text())
        assert 0 < export_meshes(plan, client) <= 2**plan.shard_bits
        assert folder_bytes(tmp_path / "whole" / "mesh") == folder_bytes(tmp_path / step / "mesh")

    coarser = Plan(plan.volume, plan.scale, plan.out, block=plan.block, keep=0.05)
    assert export_meshes(coarser, client) == 2**plan.shard_bits
    sizes = [
        sum(len(data) for data in folder_bytes(out / "mesh").values())
        for out in (tmp_path / "whole", tmp_path / "meshes")
    ]
    assert sizes[1] < sizes[0]


def test_a_segment_that_does_not_fit_is_simplified_in_parts(
    labels, source, tmp_path, client, monkeypatch
):
    monkeypatch.setattr(surface, "MOST_FACES", 2000)
    plan = exported(source, tmp_path / "out", client, block=(30, 35, 32))
    export_meshes(plan, client)
    segments = np.unique(labels[labels > 0])
    for segment, mesh in read_back(tmp_path / "out", segments).items():
        assert is_closed(mesh.faces)
        assert mesh.volume / np.prod(SIZE) == pytest.approx((labels == segment).sum(), rel=0.02)


def test_the_level_is_the_finest_that_is_not_finer_than_needed(source):
    (scale,) = plan_export(source)
    levels = [[(30, 6, 6), (30, 12, 12), (30, 24, 24)], [(8, 8, 8)], [(40, 32, 32)]]
    for sizes, expected in zip(levels, (2, 0, 0), strict=True):
        scales = [scale.__class__(**{**vars(scale), "resolution": size}) for size in sizes]
        assert mesh_level(scales) == expected
