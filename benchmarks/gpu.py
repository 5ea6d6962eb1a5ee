"""What one GPU does with blocks: right or not, how fast, and what its time goes into.

Run ``python benchmarks/gpu.py`` on a machine with a card (five minutes; ``--device cpu`` tries the
script without one). Printed are:

1. fp32 on the card against the published results in ``tests/data`` (or ``--golden FOLDER``);
2. bf16 against fp32 on an image: equal voxels, variation of information between the labels;
3. milliseconds a block by stage, in fp32 and bf16, beside the published arithmetic done plainly;
4. blocks a second of one worker of `agq predict` on a volume, and the largest memory of the card;
5. milliseconds a block, and the share of time that the card computes, while one process segments
   blocks in the three stages of a worker;
6. operators and waits of the host a block, and all of it beside what is wanted of a card.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from forward import random_block, random_checkpoint
from plain_agq import PlainAGQ, settle
from torch.utils._python_dispatch import TorchDispatchMode

from agq.blockwise.volumes.create import create_array
from agq.model import checkpoint
from agq.model.decode.inference import (
    assign_voxels,
    connected_labels,
    decode,
    dense_maps,
    quantised,
    resized_affinities,
    seeds_of,
)
from agq.model.predictor import AGQPredictor, normalised, resolve_device
from agq.model.transfers import Download
from agq.pipeline.evaluate.contingency import Contingency
from agq.pipeline.evaluate.scores import Scores

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
BATCH = 4
AC3_MVOXELS = 100 * 1024 * 1024 / 1e6
STAGES = ("upload", "convolutions", "seeds", "decoder", "masks to labels", "affinities", "pieces")


def golden(folder: Path, device: str) -> None:
    """Compare fp32 with the published results."""
    print("fp32 against the published implementation")
    for case, weights in (
        ("small_65_lite", "small_state_dict.pt"),
        ("full_257", "full_state_dict.pt"),
    ):
        if not (folder / f"{case}.npz").exists():
            print(f"  {case}: not in {folder}")
            continue
        with np.load(folder / f"{case}.npz", allow_pickle=False) as file:
            want = dict(file)
        got = AGQPredictor(folder / weights, device=device).masks(want["image_u8"])
        equal = float((got.channels == want["mask_int"]).mean())
        far = float(np.abs(got.affinity_logits - want["pred_affinity"]).max())
        kind = want["pred_affinity"].dtype
        print(f"  {case}: {equal:.4%} of voxels equal, affinity logits ({kind}) within {far:.1e}")


def staged(predictor: AGQPredictor, image: np.ndarray) -> dict[str, float]:
    """Segment one block, waiting after each stage; return the milliseconds of each."""
    spent: dict[str, float] = {}

    def stage(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = function()
        settle(predictor.device)
        spent[name] = 1000 * (time.perf_counter() - start)
        return out

    network, size = predictor.network, image.shape
    with predictor._computing():
        x = stage("upload", lambda: torch.from_numpy(normalised(image, "")).to(predictor.device))
        with predictor._autocast():
            maps = stage("convolutions", lambda: dense_maps(network, x))
        seeds = stage("seeds", lambda: seeds_of(network, maps))
        head = stage("decoder", lambda: decode(network, maps, seeds))
        channels = stage(
            "masks to labels",
            lambda: (
                assign_voxels(head, maps.mask_features, size, predictor.config.min_mass)[0]
                .cpu()
                .numpy()
            ),
        )
        logits = maps.affinity_logits
        stage("affinities", lambda: quantised(resized_affinities(logits, size)).cpu())
        stage("pieces", lambda: connected_labels(channels))
    return spent


def median_of(runs: list[dict[str, float]], name: str) -> float:
    """Return the median of a stage."""
    return statistics.median(run[name] for run in runs)


def compare_stages(weights: Path, image: np.ndarray, device: str, rounds: int) -> None:
    """Print milliseconds a block by stage, for both precisions, and of the plain version."""
    loaded = checkpoint.load(weights)
    runs = {}
    for precision in ("fp32", "bf16"):
        predictor = AGQPredictor(weights, device=device, precision=precision)
        staged(predictor, image)
        runs[precision] = [staged(predictor, image) for _ in range(rounds)]
    plain = PlainAGQ(loaded.config).eval().requires_grad_(False)
    plain.load_state_dict(loaded.state_dict)
    plain.to(resolve_device(device))
    with torch.inference_mode():
        plain.run(image)
        totals = [1000 * sum(plain.run(image)[1].values()) for _ in range(rounds)]
    print(f"\n{'ms a block, median of ' + str(rounds):28}{'fp32':>10}{'bf16':>10}")
    for name in STAGES:
        print(
            f"{name:28}{median_of(runs['fp32'], name):10.2f}{median_of(runs['bf16'], name):10.2f}"
        )
    sums = {p: statistics.median(sum(run.values()) for run in runs[p]) for p in runs}
    print(f"{'all':28}{sums['fp32']:10.2f}{sums['bf16']:10.2f}")
    reference = statistics.median(totals)
    print(
        f"the published arithmetic, plainly: {reference:.2f}; ratio {sums['fp32'] / reference:.3f}"
        f" (fp32), {sums['bf16'] / reference:.3f} (bf16)"
    )


def compare_precisions(weights: Path, image: np.ndarray, device: str) -> None:
    """Print how far bf16 and fp32 agree."""
    exact, half = (
        AGQPredictor(weights, device=device, precision=precision).predict([image])[0]
        for precision in ("fp32", "bf16")
    )
    distance = np.abs(exact.affinities.astype(int) - half.affinities)
    scores = Scores.of(
        Contingency.of(exact.labels.astype(np.uint64), half.labels.astype(np.uint64), 0)
    )
    assert scores is not None
    print(
        f"\nbf16 against fp32: VOI {scores.voi_split:.4f} + {scores.voi_merge:.4f}, affinities"
        f" within {distance.max()}/255 (mean {distance.mean():.2f})"
    )


class Calls(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return func(*args, **(kwargs or {}))


def count_calls(weights: Path, image: np.ndarray, device: str) -> tuple[int, int]:
    """Return the operators of a block, and how often its host waits for the card."""
    predictor = AGQPredictor(weights, device=device, precision="bf16")
    predictor.predict([image])
    arrays, waited = Download.arrays, 0

    def counting(download: Download) -> list[np.ndarray]:
        nonlocal waited
        waited += 1
        return arrays(download)

    with patch.object(Download, "arrays", counting), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if predictor.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        with Calls() as calls:
            predictor.predict([image])
        if predictor.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return calls.operators, waited + sum("synchroniz" in str(one.message) for one in caught)


def pipelined(predictor: AGQPredictor, image: np.ndarray, blocks: int) -> float:
    """Segment blocks as a worker does, but for files; return the seconds of one."""
    with ThreadPoolExecutor(4) as threads:
        start = time.perf_counter()
        prepared = [threads.submit(predictor.prepare, image) for _ in range(BATCH)]
        finished: list[Future[Any]] = []
        for first in range(0, blocks, BATCH):
            batch = [item.result() for item in prepared][: blocks - first]
            prepared = [threads.submit(predictor.prepare, image) for _ in range(BATCH)]
            finished += [threads.submit(predictor.finish, one) for one in predictor.begin(batch)]
        for one in finished:
            one.result()
        return (time.perf_counter() - start) / blocks


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans (start, end)."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def busy(weights: Path, image: np.ndarray, device: str, blocks: int) -> float:
    """Print the time of a block among others, and how much of it the card computes; return ms."""
    predictor = AGQPredictor(weights, device=device, precision="bf16")
    pipelined(predictor, image, BATCH)
    each = 1000 * pipelined(predictor, image, blocks)
    print(f"{each:.1f} ms a block among others, in batches of {BATCH}")
    if predictor.device.type != "cuda":
        print("the card is busy: not measured without one")
        return each
    # The profiler slows the host down, not the kernels: only their time is taken from it.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pipelined(predictor, image, 2 * BATCH)
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
    ]
    share = covered(kernels) / 1000 / (2 * BATCH) / each
    print(f"the card is busy {share:.0%} of the time")
    return each


def worker(weights: Path, image: np.ndarray, device: str, blocks: int, folder: Path) -> float:
    """Print the blocks a second of one worker of `agq predict`; return its Mvoxel/s."""
    shape = (image.shape[0], image.shape[1], blocks * (image.shape[2] - 1) + 1)
    raw = create_array(
        folder / "in.zarr", "raw", shape=shape, chunks=image.shape, dtype=np.uint8,
        voxel_size=(30, 6, 6),
    )  # fmt: skip
    raw[:] = np.concatenate([image] * (blocks + 1), axis=2)[:, :, : shape[2]]
    precision = "fp32" if device == "cpu" else "bf16"
    config = {
        "run_dir": str(folder / "run"),
        "input": {"raw": {"path": str(folder / "in.zarr"), "dataset": "raw"}},
        "model": {
            "checkpoint": str(weights),
            "device": device,
            "precision": precision,
            "batch_size": BATCH,
        },
        "blocks": {"read_shape": list(image.shape)},
        "workers": {"count": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    program = "from agq.pipeline.cli.main import main; main()"
    subprocess.run(
        [sys.executable, "-c", program, "predict", str(file)], check=True, capture_output=True
    )
    lines = [
        json.loads(line)
        for journal in (folder / "run" / "journal" / "predict").glob("*.jsonl")
        for line in journal.read_text().splitlines()
    ]
    ends = sorted(line["time"] for line in lines if line["event"] == "block")
    rate = (len(ends) - 1) / max(1e-9, ends[-1] - ends[0])
    voxels = rate * float(np.prod([n - 1 for n in image.shape])) / 1e6
    print(f"\none worker, {precision}: {rate:.2f} blocks/s, {voxels:.2f} Mvoxel/s")
    return voxels


def compare_with_bars(speed: float, each: float, operators: int, waits: int) -> None:
    """Print what was measured beside what is wanted of an H100 or its like."""
    print("\nbars")
    for name, found, bar, at_least in (
        ("Mvoxel/s of one worker", speed, 30, True),
        ("s for the voxels of AC3 at that", AC3_MVOXELS / speed, 3.5, False),
        ("ms a block among others, bf16", each, 25, False),
        ("operators a block", operators, 600, False),
        ("waits of the host a block", waits, 5, False),
    ):
        met = found >= bar if at_least else found <= bar
        sign, word = (">=" if at_least else "<="), ("met" if met else "not met")
        print(f"  {name:33}{found:10.2f}  {sign} {bar:<5}{word}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpoint", type=Path, help="default: random published weights")
    parser.add_argument("--image", type=Path, help="npz with image_u8; default: random cells")
    parser.add_argument("--shape", type=int, nargs=3, default=(17, 257, 257))
    parser.add_argument("--golden", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=100)
    args = parser.parse_args()
    device = resolve_device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    golden(args.golden, args.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder, weights = Path(temporary), args.checkpoint
        if weights is None:
            weights = folder / "random.safetensors"
            random_checkpoint(weights)
        image = np.load(args.image)["image_u8"] if args.image else random_block(tuple(args.shape))
        compare_precisions(weights, image, args.device)
        compare_stages(weights, image, args.device, args.rounds)
        if device.type == "cuda":
            print(f"memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at most")
        speed = worker(weights, image, args.device, args.blocks, folder)
        each = busy(weights, image, args.device, args.blocks)
        compare_with_bars(speed, each, *count_calls(weights, image, args.device))


if __name__ == "__main__":
    main()
