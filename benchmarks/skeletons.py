"""Length of all skeletons of a label volume: by windows, in one piece, and kimimaro's beside them.

    python benchmarks/skeletons.py labels.zarr::labels --window-nm 1500

The volume is read whole. All run on one core. kimimaro runs in `.venv-readers`, where there is one.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
from funlib.geometry import Roi

from agq.blockwise.export.rows import starts_of
from agq.blockwise.export.skeletons.join import join
from agq.blockwise.export.skeletons.run import Windows
from agq.blockwise.export.skeletons.trace import CONSTANT_NM, SCALE
from agq.blockwise.volumes.open import Volume
from agq.pipeline.cli.arguments import open_location
from tests.helpers.readers import PYTHON, read_with

KIMIMARO = """
import time, numpy, kimimaro
labels = numpy.load(arguments["file"])
began = time.process_time()
found = kimimaro.skeletonize(
    labels, anisotropy=arguments["size"],
    teasar_params={"scale": arguments["scale"], "const": arguments["constant"]},
    dust_threshold=arguments["least"], progress=False,
)
seconds = time.process_time() - began
result = sum(float(skeleton.cable_length()) for skeleton in found.values()), seconds
"""


def length_nm(volume: Volume, window_nm: float, large: np.ndarray) -> tuple[float, int]:
    """Return the length of the skeletons of some segments, and how many windows there were."""
    windows = Windows.of(volume, window_nm)
    count = math.prod(windows.grid)
    edges = np.concatenate([windows.trace(index)[0] for index in range(count)])
    edges = edges[np.isin(edges["segment"], large)]
    edges = edges[np.argsort(edges["segment"], kind="stable")]
    where = (volume.shape, windows.core, windows.size, windows.offset)
    split = np.split(edges, starts_of(edges)[1:])
    return sum(join(rows, *where).cable_nm for rows in split), count


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", help="path or path::dataset")
    parser.add_argument("--window-nm", type=float, default=1500)
    parser.add_argument("--least-voxels", type=int, default=300)
    given = parser.parse_args()
    volume = open_location(given.labels, "labels", None)
    labels = volume.read((0, 0, 0), volume.shape)
    ids, voxels = np.unique(labels, return_counts=True)
    large = ids[(ids != 0) & (voxels >= given.least_voxels)]
    Windows.of(volume.crop(Roi(volume.offset, volume.voxel_size * 8))).trace(0)  # compiles
    whole = one = None
    for window in (math.inf, given.window_nm):
        began = time.process_time()
        length, count = length_nm(volume, min(window, 1e12), large)
        seconds = time.process_time() - began
        whole = whole or length
        print(
            f"{count} windows: {length / 1000:,.1f} um, {length / whole:.4f} of one,"
            f" {seconds:.1f} s, {labels.size / seconds / 1e6:.2f} Mvoxel/s"
        )
        one = one or seconds
    if PYTHON.exists():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "labels.npy"
            np.save(file, np.searchsorted(ids, labels).astype(np.uint32) * (labels != 0))
            arguments = {
                "file": str(file),
                "size": Windows.of(volume).size,
                "scale": SCALE,
                "constant": CONSTANT_NM,
                "least": given.least_voxels,
            }
            length, seconds = read_with(KIMIMARO, arguments, seconds=3600)
        print(
            f"kimimaro: {length / 1000:,.1f} um, {length / whole:.4f} of one window,"
            f" {seconds:.1f} s: {seconds / one:.2f} times as long"
        )


if __name__ == "__main__":
    main()
