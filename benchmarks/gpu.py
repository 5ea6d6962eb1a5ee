"""What one GPU does with blocks: right or not, how fast, and what its time goes into.

Run ``python benchmarks/gpu.py`` on a machine with a card (five minutes; ``--device cpu`` tries the
script without one). Printed are:

1. fp32 on the card against the published results in ``tests/data`` (or ``--golden FOLDER``);
2. bf16 against fp32 on an image: equal voxels, variation of information between the labels;
3. milliseconds a block by stage, in fp32 and bf16, beside the published arithmetic done plainly;
4. blocks a second of one worker of `agq predict` on a volume, and the largest memory of the card;
5. the share of time in which the card computes, while one process segments block after block.
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
import yaml
from forward import random_block, random_checkpoint
from plain_agq import PlainAGQ, settle

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
from agq.pipeline.evaluate.contingency import Contingency
from agq.pipeline.evaluate.scores import Scores

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
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


def busy(weights: Path, image: np.ndarray, device: str, blocks: int) -> None:
    """Print the share of time in which the card computes."""
    if not torch.cuda.is_available() or device == "cpu":
        print("the card is busy: not measured without one")
        return
    predictor = AGQPredictor(weights, device=device, precision="bf16")
    predictor.predict([image])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        predictor.predict([image] * blocks)
        wall = time.perf_counter() - start
    computed = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    each = 1000 * wall / blocks
    print(f"the card is busy {computed / wall:.0%} of the time ({each:.1f} ms a block)")


def worker(weights: Path, image: np.ndarray, device: str, blocks: int, folder: Path) -> None:
    """Print the blocks a second of one worker of `agq predict`."""
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
        "model": {"checkpoint": str(weights), "device": device, "precision": precision},
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
        worker(weights, image, args.device, args.blocks, folder)
        busy(weights, image, args.device, args.blocks)


if __name__ == "__main__":
    main()
