"""Small runs for tests: a blob volume, a configuration, and the command line as users start it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import ndimage

from agq.blockwise.blocks.packs import sidecar_bytes
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_volume
from tests.helpers import ROOT

FAKE = {"factory": "tests.helpers.fakes:threshold"}
VOXEL_SIZE = (30, 6, 6)


def blobs(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Smooth random blobs, uint8 up to 240 (above it the fake predictor sees marks)."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, (1.0, 3.0, 3.0))
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return (smooth * 240).astype(np.uint8)


def write_volume(container: Path, name: str, data: np.ndarray, **placed: Any) -> None:
    """Write one array with its voxel size."""
    array = create_array(
        container,
        name,
        shape=data.shape,
        chunks=tuple(min(32, n) for n in data.shape),
        dtype=data.dtype,
        **{"voxel_size": VOXEL_SIZE, **placed},
    )
    array[:] = data


def stored(
    folder: Path, labels: np.ndarray, offset: Any = (0, 0, 0), size: Any = VOXEL_SIZE
) -> Any:
    """Write labels and open them as a volume."""
    write_volume(folder, "labels", labels, voxel_size=size, offset=offset)
    return open_volume(folder, "labels", kind="labels")


def make_config(folder: Path, data: np.ndarray | None = None, **sections: Any) -> Path:
    """Write input and configuration of a run with the fake predictor; return the config's path."""
    if data is None:
        data = blobs((20, 50, 70))
    if not (folder / "in.zarr" / "raw").exists():
        write_volume(folder / "in.zarr", "raw", data)
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "input": {"raw": {"path": str(folder / "in.zarr"), "dataset": "raw"}},
        "model": FAKE,
        "blocks": {"read_shape": [9, 17, 17], "before": [1, 1, 1], "after": [1, 1, 1]},
        "workers": {"count": 2},
    }
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def environment() -> dict[str, str]:
    """Return what `agq` is run with: one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    """Return the command line of `agq`, run by this Python."""
    code = "from agq.pipeline.cli.main import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def agq(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `agq` in a process of its own."""
    return subprocess.run(
        command(*arguments),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def kill_after(lines: int, code: str, folder: Path) -> str:
    """Run Python code on a folder, SIGKILL it after some lines of output; return what is left."""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        process.kill()
        return process.stdout.read()


def results(run_dir: Path) -> dict[str, bytes]:
    """Return the bytes of everything a run computes: arrays, sidecars, segments.

    The id map says the same as the segmentation, in files that follow the workers.
    """
    rows = Journal(run_dir / "journal" / "predict").rows
    done = rows["block"][rows["rank"] == BlockState.DONE].tolist()
    # Packed or not.
    kept = {f"sidecars/{number}": sidecar_bytes(run_dir, number) for number in sorted(done)}
    for part in ("data.zarr", "lut"):
        for file in sorted((run_dir / part).rglob("*")):
            if file.is_file() and file.parent.name != "map":
                kept[str(file.relative_to(run_dir))] = file.read_bytes()
    return kept
