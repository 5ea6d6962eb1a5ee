"""Time and memory of one block: this code beside a plain layer-by-layer version.

Run ``python benchmarks/forward.py``. Each measurement is a process of its own: it loads the
weights, segments one block to warm up, then the block that counts; the two versions alternate,
and the medians are compared. Peak memory is the resident set of the whole process, with the
interpreter and libraries; it is also given without what was resident before the first block.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agq.model import checkpoint
from agq.model.config import ModelConfig
from agq.model.network.agq import AGQ

VERSIONS = ("ours", "plain")


def resident() -> tuple[float, float]:
    """Return (now, peak) resident memory in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Vm")}
    return int(values["VmRSS"]) / 1024, int(values["VmHWM"]) / 1024


def random_checkpoint(path: Path) -> None:
    """Write the published architecture with random weights."""
    torch.manual_seed(0)
    config = ModelConfig()
    checkpoint.save(path, AGQ(config), config, {"weights": "random, seed 0"})


def random_block(shape: tuple[int, ...]) -> np.ndarray:
    """Return a cell-like uint8 image."""
    rng = np.random.default_rng(0)
    cells = rng.integers(30, 220, tuple(-(-n // 16) for n in shape))
    image = cells.repeat(16, 0).repeat(16, 1).repeat(16, 2)
    image = image[tuple(slice(n) for n in shape)] + rng.normal(0, 12, shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def run_ours(weights: Path) -> Callable[[np.ndarray], tuple[dict, dict]]:
    """Return a function that segments one block by stages."""
    from agq.model.decode.inference import (
        DenseMaps,
        assign_voxels,
        connected_labels,
        decode,
        quantised,
        resized_affinities,
        seeds_of,
    )
    from agq.model.predictor import AGQPredictor, normalised

    predictor = AGQPredictor(weights, device="cpu")
    network, lean = predictor.network, predictor.lean
    assert lean is not None

    def run(image: np.ndarray) -> tuple[dict, dict]:
        seconds: dict[str, float] = {}

        def stage(name: str, function: Callable, *args: Any) -> Any:
            start = time.perf_counter()
            out = function(*args)
            seconds[name] = time.perf_counter() - start
            return out

        size = image.shape
        x = torch.from_numpy(normalised(image, "block"))
        levels = stage("backbone", lean.pyramid, x)
        fused = stage("fusion", lean.fuse, levels)
        masks, instances = stage("mask and instance branches", lean.features, fused)
        maps = DenseMaps(stage("affinity branch", lean.affinities, fused), masks, instances)
        seeds = stage("seeds", seeds_of, network, maps)
        head = stage("decoder", decode, network, maps, seeds)

        def to_labels() -> np.ndarray:
            found, _ = assign_voxels(head, masks, size, predictor.config.min_mass)
            channels = found.numpy()
            connected_labels(channels)
            return channels

        channels = stage("masks to labels", to_labels)
        logits = maps.affinity_logits
        affinities = stage(
            "affinities", lambda: quantised(resized_affinities(logits, size)).numpy()
        )
        return {"channels": channels, "affinities": affinities}, seconds

    return run


def run_plain(weights: Path) -> Callable[[np.ndarray], tuple[dict, dict]]:
    """Return the baseline's function."""
    from plain_agq import PlainAGQ

    loaded = checkpoint.load(weights)
    network = PlainAGQ(loaded.config).eval().requires_grad_(False)
    network.load_state_dict(loaded.state_dict)
    return network.run


def measure(version: str, weights: Path, image: np.ndarray, save: Path | None) -> dict[str, Any]:
    """Segment the block twice in this process and describe the second time."""
    run = {"ours": run_ours, "plain": run_plain}[version](weights)
    before = resident()[0]
    with torch.inference_mode():
        run(image)
        start, cpu = time.perf_counter(), time.process_time()
        results, seconds = run(image)
        total, cpu = time.perf_counter() - start, time.process_time() - cpu
    if save:
        np.savez(save, **results)
    peak = resident()[1]
    return {"stages": seconds, "total": total, "cpu": cpu, "peak": peak, "added": peak - before}


def child(version: str, args: argparse.Namespace, weights: Path, save: Path) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", version, "--checkpoint", str(weights)]
    command += ["--threads", str(args.threads), "--shape", *map(str, args.shape)]
    command += ["--save", str(save)]
    if args.image:
        command += ["--image", str(args.image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def report(results: dict[str, list[dict[str, Any]]], saves: dict[str, Path]) -> None:
    """Print the table, and how far the two versions agree."""
    median = {
        version: {
            key: statistics.median(r[key] for r in runs)
            for key in ("total", "cpu", "peak", "added")
        }
        for version, runs in results.items()
    }
    print(f"{'ms per block, median':32}{'ours':>10}{'plain':>10}{'ratio':>8}")

    def row(name: str, ours: float, plain: float) -> None:
        print(f"{name:32}{ours:10.0f}{plain:10.0f}{ours / plain:8.2f}")

    for name in results["ours"][0]["stages"]:
        row(
            name,
            *(1000 * statistics.median(r["stages"][name] for r in results[v]) for v in VERSIONS),
        )
    ours, plain = median["ours"], median["plain"]
    row("total, wall", 1000 * ours["total"], 1000 * plain["total"])
    row("total, CPU time of all threads", 1000 * ours["cpu"], 1000 * plain["cpu"])
    print(f"{'MiB':32}{'ours':>10}{'plain':>10}{'ratio':>8}")
    row("peak resident", ours["peak"], plain["peak"])
    row("peak over loaded weights", ours["added"], plain["added"])
    with np.load(saves["ours"]) as a, np.load(saves["plain"]) as b:
        same = float((a["channels"] == b["channels"]).mean())
        step = int(np.abs(a["affinities"].astype(int) - b["affinities"]).max())
    print(
        f"winning channels equal on {same:.4%} of voxels; affinities differ by at most {step}/255"
    )


def main() -> None:
    """Measure and report, or be one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="processes per version")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", type=int, nargs=3, default=(17, 257, 257))
    parser.add_argument("--checkpoint", type=Path, help="default: random weights")
    parser.add_argument("--image", type=Path, help="npz with image_u8; default: random cells")
    parser.add_argument("--child", choices=VERSIONS, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        image = np.load(args.image)["image_u8"] if args.image else random_block(tuple(args.shape))
        print(json.dumps(measure(args.child, args.checkpoint, image, args.save)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = args.checkpoint
        if weights is None:
            weights = Path(folder) / "random.safetensors"
            random_checkpoint(weights)
        saves = {version: Path(folder) / f"{version}.npz" for version in VERSIONS}
        results: dict[str, list[dict[str, Any]]] = {version: [] for version in VERSIONS}
        for _ in range(args.runs):
            for version in VERSIONS:
                results[version].append(child(version, args, weights, saves[version]))
        print(f"{args.threads} threads, torch {torch.__version__}, {args.runs} processes each")
        report(results, saves)


if __name__ == "__main__":
    main()
