"""Meshes of one export, ours and igneous': voxels a second, and how well each holds the bars.

Run ``python benchmarks/meshes.py --install``: that makes an environment of its own for igneous, in
``build/igneous``; without it only ours are made. Both take the same sharded volume, as many
processes, tasks of the same size, one level of detail and shards, and cloud-volume reads both back.
They take turns in being first. Seconds of igneous include the start of its two commands, ours not
the start of the workers.

``--memory`` prints the peak memory of workers instead, at three sizes of volume.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial import cKDTree
from stitch.memory import peak_mib

from agq.blockwise.export.meshes.run import Plan, export_meshes
from agq.blockwise.export.meshes.surface import Mesh, enclosed, is_closed
from agq.blockwise.export.target import Target
from agq.blockwise.export.volume import export_precomputed, plan_export
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_levels

ENVIRONMENT = Path("build/igneous")
SIZE = (20, 16, 16)
TILE = 128
READ = """
import json, sys
import numpy as np
from cloudvolume import CloudVolume
out, segments, to = json.load(sys.stdin)
volume = CloudVolume("file://" + out, progress=False)
found = {}
for segment in segments:
    try:
        mesh = volume.mesh.get(segment, lod=0)[segment]
    except Exception:
        continue
    found[f"v{segment}"], found[f"f{segment}"] = mesh.vertices, mesh.faces
np.savez(to, **found)
"""


def cells(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Cells with warped borders, about 32 voxels wide."""
    rng = np.random.default_rng(seed)
    points = rng.random((int(np.prod(shape)) // 2**15, 3)) * shape
    tree = cKDTree(points)
    warp = [gaussian_filter(rng.standard_normal(shape), 5) * 150 for _ in range(3)]
    labels = np.empty(shape, np.uint64)
    for z in range(shape[0]):
        grid = np.stack(np.meshgrid([z], *map(np.arange, shape[1:]), indexing="ij"), -1)[0]
        moved = grid + np.stack([w[z] for w in warp], -1)
        labels[z] = 1 + tree.query(moved.reshape(-1, 3))[1].reshape(shape[1:])
    return labels


def ours(plan: Plan, workers: int) -> float:
    """Seconds to make our meshes, without starting the workers."""
    with dask_client(DaskSettings(workers=workers)) as client:
        client.wait_for_workers(workers)
        start = time.perf_counter()
        export_meshes(plan, client)
        return time.perf_counter() - start


def igneous(out: Path, block: int, workers: int) -> float:
    """Seconds of igneous' commands."""
    program = str(ENVIRONMENT / "bin" / "igneous")
    common = [program, "-p", str(workers), "mesh"]
    task = ",".join([str(block)] * 3)
    start = time.perf_counter()
    for command in (
        ["forge", str(out), "--sharded", "--shape", task, "--dir", "mesh"],
        ["merge-sharded", str(out), "--nlod", "1", "--vqb", "16", "--dir", "mesh"],
    ):
        subprocess.run([*common, *command], check=True, capture_output=True)
    return time.perf_counter() - start


def bars(name: str, out: Path, labels: np.ndarray, folder: Path) -> None:
    """Print what the reader finds of segments that do not touch the border of the volume."""
    border = np.unique(
        np.concatenate([np.take(labels, i, d).ravel() for d in range(3) for i in (0, -1)])
    )
    segments = np.setdiff1d(np.unique(labels), border).tolist()
    file = folder / "read.npz"
    subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-W", "ignore", "-c", READ],
        input=json.dumps([str(out), segments, str(file)]), text=True, check=True,
    )  # fmt: skip
    found = np.load(file)
    closed, worst_volume, worst_off, faces = 0, 0.0, 0.0, 0
    read = [s for s in segments if f"v{s}" in found]
    for segment in read:
        mesh = Mesh(found[f"v{segment}"] / SIZE[::-1], found[f"f{segment}"].astype(np.int64))
        inside = labels == segment
        places = np.argwhere(inside)
        low, high = places.min(axis=0), places.max(axis=0) + 1
        fine = np.pad(inside[tuple(map(slice, low, high))], 2)
        for axis in range(3):
            fine = fine.repeat(2, axis)
        off = np.maximum(distance_transform_edt(fine), distance_transform_edt(~fine)) - 1
        at = np.floor((mesh.vertices[:, ::-1] - low + 2) * 2).astype(int)
        at = at.clip(0, np.array(fine.shape) - 1)
        closed += is_closed(mesh.faces)
        faces += len(mesh.faces)
        worst_volume = max(worst_volume, abs(enclosed(mesh) / len(places) - 1))
        worst_off = max(worst_off, float(off[tuple(at.T)].max()) / 2)
    print(
        f"{name}: {len(read)} of {len(segments)} segments inside, closed {closed / len(read):.0%},"
        f" worst volume {worst_volume:.2%}, farthest vertex {worst_off:.2g} voxels,"
        f" {faces:,} faces"
    )


def memory(workers: int) -> None:
    """Print the peak memory of workers for volumes of tiles of `TILE` voxels along each axis."""
    # Workers look only in folders that are named: the function that they call is in this one.
    named = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *([named] if named else [])])
    tile = cells((TILE,) * 3, 0)
    for tiles in (1, 2, 3):
        shape = (tiles * TILE,) * 3
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            array = create_array(
                folder / "in", "a", shape=shape, chunks=(64, 64, 64), dtype="uint64",
                voxel_size=SIZE,
            )  # fmt: skip
            for number, index in enumerate(np.ndindex((tiles,) * 3)):
                place = tuple(slice(i * TILE, (i + 1) * TILE) for i in index)
                array[place] = tile + number * int(tile.max())
            levels = open_levels(folder / "in", "a", kind="labels")
            (scale,) = plan_export(levels)
            with dask_client(DaskSettings(workers=workers)) as client:
                export_precomputed(levels, [scale], folder / "out", client)
            plan = Plan(levels[0], scale, Target.of(folder / "out"), block=(64, 64, 64))
            with dask_client(DaskSettings(workers=workers)) as client:
                start = time.perf_counter()
                export_meshes(plan, client)
                seconds = time.perf_counter() - start
                peaks = client.run(peak_mib).values()
        print(
            f"{np.prod(shape) / 1e6:,.0f} Mvoxel in {np.prod(plan.grid)} blocks: largest worker"
            f" {max(peaks):,.0f} MiB, {seconds:,.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256, help="voxels along each axis")
    parser.add_argument("--block", type=int, default=128, help="voxels of a task along each axis")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--install", action="store_true", help="make igneous' environment")
    parser.add_argument("--memory", action="store_true", help="peak memory at three sizes")
    options = parser.parse_args()
    if options.memory:
        memory(options.workers)
        return
    if options.install and not ENVIRONMENT.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pip = [ENVIRONMENT / "bin" / "pip", "install", "-q"]
        subprocess.run([*pip, "igneous-pipeline==4.37.0"], check=True)
    compared = (ENVIRONMENT / "bin" / "igneous").exists()
    if not compared:
        print(f"no igneous in {ENVIRONMENT}: --install makes it; nothing is compared")
    shape = (options.size,) * 3
    labels = cells(shape, 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        create_array(
            folder / "in", "a", shape=shape, chunks=(64, 64, 64), dtype="uint64", voxel_size=SIZE
        )[:] = labels  # fmt: skip
        levels = open_levels(folder / "in", "a", kind="labels")
        (scale,) = plan_export(levels)
        with dask_client(DaskSettings(workers=options.workers)) as client:
            export_precomputed(levels, [scale], folder / "plain", client)
        seconds: dict[str, list[float]] = {"ours": [], "igneous": []}
        for turn in range(options.times):
            tools = ("ours", "igneous") if compared else ("ours",)
            for tool in tools if turn % 2 == 0 else tools[::-1]:
                out = folder / tool
                shutil.rmtree(out, ignore_errors=True)
                shutil.copytree(folder / "plain", out)
                if tool == "ours":
                    block = (options.block,) * 3
                    plan = Plan(levels[0], scale, Target.of(out), block=block)
                    seconds[tool].append(ours(plan, options.workers))
                else:
                    seconds[tool].append(igneous(out, options.block, options.workers))
        for tool, times in seconds.items():
            if times:
                rate = np.prod(shape) / np.median(times)
                print(
                    f"{tool}: median {rate / 1e6:.2f} million voxels/s"
                    f" ({', '.join(f'{t:.1f}' for t in times)} s)"
                )
        if compared:
            ratios = np.divide(seconds["igneous"], seconds["ours"])
            pairs = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"ours is {np.median(ratios):.2f} times as fast (median of {pairs})")
            for tool in seconds:
                bars(tool, folder / tool, labels, folder)


if __name__ == "__main__":
    main()
