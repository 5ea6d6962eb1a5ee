"""Meshes of an export: the bars, held on what an independent reader finds in it."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh
from scipy.ndimage import binary_fill_holes

from agq.blockwise.export.meshes import run as run_module
from agq.blockwise.export.meshes import surface
from agq.blockwise.export.meshes.run import Plan, export_meshes, mesh_level
from agq.blockwise.export.meshes.surface import Mesh, is_closed
from agq.blockwise.export.target import Target
from agq.blockwise.export.volume import export_precomputed, plan_export
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_levels
from tests.helpers.browser import CHROMIUM, file_server, screenshot
from tests.helpers.fragments import folder_bytes
from tests.helpers.meshes import cells, surface_distances
from tests.helpers.readers import read_with

SIZE, OFFSET = (24, 8, 10), (48, -16, 30)

BY_CLOUD_VOLUME = """
import numpy as np
from cloudvolume import CloudVolume
volume = CloudVolume(f"precomputed://file://{arguments['out']}", progress=False)
result = {}
for segment in arguments["segments"]:
    manifest = volume.mesh.get_manifest(segment)
    levels = []
    for lod in range(manifest.num_lods):
        mesh = volume.mesh.get(segment, lod=lod)[segment]
        levels.append([mesh.vertices.tolist(), mesh.faces.tolist()])
    result[segment] = {
        "levels": levels,
        "scales": manifest.lod_scales.tolist(),
        "cells": [cells.tolist() for cells in manifest.fragment_positions],
        "sizes": [sizes.tolist() for sizes in manifest.fragment_offsets],
    }
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


def read_back(out: Path, segments) -> dict[int, dict]:
    found = read_with(BY_CLOUD_VOLUME, {"out": str(out), "segments": [int(s) for s in segments]})
    for segment in found.values():
        segment["levels"] = [joined(np.array(v), np.array(f)) for v, f in segment["levels"]]
    return {int(s): segment for s, segment in found.items()}


def joined(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    """Join pieces where vertices have the same place, to the last bit."""
    known, places = np.unique(vertices, axis=0, return_inverse=True)
    return trimesh.Trimesh(known, places.reshape(-1)[faces], process=False)


def test_meshes_hold_the_bars_whatever_the_blocks(labels, source, tmp_path, client, monkeypatch):
    monkeypatch.setattr(run_module, "_SHARD_VOXELS", 2**16)
    monkeypatch.setattr(surface, "ROOT_FACES", 150)
    monkeypatch.setattr(run_module, "GROUP", 7)
    seen: dict[str, int] = {}
    plan = exported(source, tmp_path / "a", client, block=(12, 14, 13))
    assert np.prod(plan.grid) >= 100
    shards = export_meshes(
        plan, client, on_progress=lambda name, done, _: seen.update({name: done})
    )
    assert shards == 2**plan.shard_bits == seen["meshes"] > 2
    assert seen["surfaces"] == np.prod(plan.grid)
    assert seen["mesh index"] == plan.groups > 10
    assert export_meshes(plan, client) == 0
    assert not plan.surfaces.exists()

    other = exported(source, tmp_path / "b", client, block=(60, 33, 64))
    export_meshes(other, client)
    assert folder_bytes(tmp_path / "a" / "mesh") == folder_bytes(tmp_path / "b" / "mesh")
    assert json.loads((tmp_path / "a" / "info").read_text())["mesh"] == "mesh"
    # tensorstore takes the document that names meshes for its own.
    assert export_precomputed(source, plan_export(source), tmp_path / "a", client) == 0

    segments = np.unique(labels[labels > 0])
    worst, counts = 0.0, {}
    for segment, found in read_back(tmp_path / "a", segments).items():
        inside = labels == segment
        counts[segment] = len(found["levels"])
        off = surface_distances(inside, most=1 + 2 ** (counts[segment] - 1))
        for level, mesh in enumerate(found["levels"]):
            assert mesh.is_watertight
            assert mesh.is_winding_consistent
            places = (mesh.vertices - np.array(OFFSET[::-1])) / SIZE[::-1]
            assert off(Mesh(places, mesh.faces)).max() <= 2**level
            error = abs(mesh.volume / np.prod(SIZE) / inside.sum() - 1)
            assert error < 0.02 * 2**level
            worst = max(worst, error) if level == 0 else worst
        assert_an_octree(found)
    assert worst < 0.02
    # The larger a segment, the more levels it has.
    assert counts[99] == 1
    assert max(counts.values()) > 2


def assert_an_octree(found: dict) -> None:
    faces = [len(mesh.faces) for mesh in found["levels"]]
    assert all(2 * coarser < finer for finer, coarser in pairwise(faces))
    assert all(coarser > finer > 0 for finer, coarser in pairwise(found["scales"]))
    assert len(found["cells"][-1]) == 1
    for finer, coarser in pairwise(found["cells"]):
        # A cell that is not in one of the next level is not drawn.
        parents = {tuple(np.array(cell) >> 1) for cell in finer}
        assert parents <= {tuple(cell) for cell in coarser}
    for places, sizes in zip(found["cells"], found["sizes"], strict=True):
        assert len(places) == len(sizes)
        assert sum(sizes) > 0


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
    for segment, found in read_back(tmp_path / "out", segments).items():
        (mesh,) = found["levels"]
        assert is_closed(mesh.faces)
        assert mesh.volume / np.prod(SIZE) == pytest.approx((labels == segment).sum(), rel=0.02)


def test_a_bucket_holds_the_same_meshes(source, tmp_path, client, s3):
    plan = exported(source, tmp_path / "out", client)
    export_meshes(plan, client)
    bucket = Target.of("s3://em-data/deep/out", tmp_path / "work")
    export_precomputed(source, [plan.scale], bucket, client)
    there = replace(plan, out=bucket)
    assert export_meshes(there, client) == 2**plan.shard_bits
    assert export_meshes(there, client) == 0
    local = folder_bytes(tmp_path / "out" / "mesh")
    assert {key for key in s3.listed() if "/mesh/" in key} == {
        f"deep/out/mesh/{name}" for name in local
    }
    for name, data in local.items():
        assert bucket.read(f"mesh/{name}") == data
    assert json.loads(bucket.read("info"))["mesh"] == "mesh"
    # Made in another way, the old ones go.
    assert export_meshes(replace(there, keep=0.05), client) == 2**plan.shard_bits
    shard = next(name for name in local if name.endswith(".shard"))
    assert len(bucket.read(f"mesh/{shard}")) < len(local[shard])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt install chromium)")
def test_neuroglancer_draws_each_level_whole(tmp_path, client, monkeypatch):
    """Three balls in a real browser, which asks for the finest, a middle and the coarsest level."""
    neuroglancer = pytest.importorskip("neuroglancer", reason="the extra `view` is not installed")
    monkeypatch.setattr(surface, "ROOT_FACES", 60)
    z, y, x = np.mgrid[:40, :40, :140]
    data = np.zeros(z.shape, np.uint64)
    for ball in (1, 2, 3):
        data[(z - 20) ** 2 + (y - 20) ** 2 + (x - 45 * ball + 20) ** 2 <= 18**2] = ball
    size = {"voxel_size": (10, 10, 10)}
    create_array(tmp_path, "in", shape=data.shape, chunks=data.shape, dtype="uint64", **size)[:] = (
        data
    )
    plan = exported(open_levels(tmp_path, "in", kind="labels"), tmp_path / "out", client)
    export_meshes(plan, client)
    with file_server(tmp_path) as address:
        viewer = neuroglancer.Viewer()
        with viewer.txn() as state:
            state.dimensions = neuroglancer.CoordinateSpace(
                names=["x", "y", "z"], units="nm", scales=[10, 10, 10]
            )
            state.position, state.projection_scale = [70, 20, 20], 130
            state.layout, state.show_slices, state.show_axis_lines = "3d", False, False
            for ball, pixels, colour in (
                (1, 1, "#ff0000"),
                (2, 80, "#00ff00"),
                (3, 1e4, "#0000ff"),
            ):
                state.layers[str(ball)] = neuroglancer.SegmentationLayer(
                    source=f"precomputed://{address}/out",
                    segments=[ball],
                    mesh_render_scale=pixels,
                    segment_colors={ball: colour},
                )
        picture = screenshot(viewer, tmp_path)
    rough = []
    for ball in range(3):
        shade, others = picture[..., ball], np.delete(picture, ball, axis=2).max(axis=2)
        seen = (shade > 40) & (shade > 2 * others)
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        box = seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # A disc, without the holes of pieces that are not drawn.
        assert min(box.shape) > 100
        assert box.mean() == pytest.approx(np.pi / 4, abs=0.06)
        assert (binary_fill_holes(seen) == seen).mean() > 0.999
        rough.append(np.abs(np.diff(shade, axis=1))[seen[:, 1:] & seen[:, :-1]].mean())
    assert rough[0] > rough[1] > rough[2]


def test_shards_are_neither_one_nor_too_many(source):
    (scale,) = plan_export(source)
    for shape, shards in (((8, 8, 8), 1), ((128, 128, 128), 8), ((1024, 1024, 1024), 64)):
        volume = SimpleNamespace(shape=shape)
        assert 2 ** Plan(volume, scale, Target.of("out")).shard_bits == shards


def test_the_level_is_the_finest_that_is_not_finer_than_needed(source):
    (scale,) = plan_export(source)
    levels = [[(30, 6, 6), (30, 12, 12), (30, 24, 24)], [(8, 8, 8)], [(40, 32, 32)]]
    for sizes, expected in zip(levels, (2, 0, 0), strict=True):
        scales = [scale.__class__(**{**vars(scale), "resolution": size}) for size in sizes]
        assert mesh_level(scales) == expected
