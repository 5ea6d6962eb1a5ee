"""Agglomeration by a quantile of affinities, in memory, with waterz.

A quantile of a histogram is not a ratio of sums, so the exact stitch does not have it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import waterz

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.volumes.create import create_array, open_array, write_chunk
from agq.errors import InputError
from agq.pipeline.evaluate.baseline.watershed import WatershedRun

_logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.uint64]

_QUANTILE = "OneMinus<HistogramQuantileAffinity<RegionGraphType,75,ScoreValue,256,false>>"
# What waterz needs: float32 affinities, uint64 fragments in and out, its own tables.
_BYTES_PER_VOXEL = 40


def quantile_segments(
    job: WatershedRun, thresholds: Sequence[float]
) -> list[tuple[float, Ids, Ids]]:
    """Agglomerate in memory by the 75 % quantile of 256-bin histograms of affinities.

    Returns
    -------
    list of tuple
        For each threshold, ascending: it, all fragment ids (sorted), and the segment of each.

    Raises
    ------
    InputError
        If there is not enough memory.
    """
    array = open_array(job.folder / "data.zarr", "fragments", "r")
    need = _BYTES_PER_VOXEL * int(np.prod(array.shape))
    if need > psutil.virtual_memory().available:
        raise InputError(
            f"the quantile runs in memory and needs {need / 2**30:.0f} GiB for {array.shape} "
            "voxels; compare on a part of the volume, or with --method mean"
        )
    ids, places, compact = np.unique(
        np.asarray(array[:], np.uint64), return_index=True, return_inverse=True
    )
    # Compact ids, for waterz makes tables of the size of the largest; 0 stays 0.
    first = 0 if ids[0] == 0 else 1
    volume = (compact.reshape(array.shape) + first).astype(np.uint64)
    if first == 0:
        ids, places = ids[1:], places[1:]
    source = open_array(job.source, "affinities", "r")
    affinities = np.asarray(source[:], np.float32)
    affinities /= np.float32(255)
    descending = sorted(thresholds, reverse=True)
    joined = []
    with _quiet_stdout():
        results = waterz.agglomerate(
            affinities,
            [1 - t for t in descending],
            fragments=volume,
            scoring_function=_QUANTILE,
        )
        for threshold, result in zip(descending, results, strict=True):
            labels = result[0] if isinstance(result, tuple) else result
            joined.append((threshold, ids, labels.reshape(-1)[places]))
    return joined[::-1]


def write_joined(job: WatershedRun, name: str, ids: Ids, segments: Ids, min_size: int) -> None:
    """Write fragments joined to segments as a volume beside them; small segments become 0.

    The array is new or from an earlier call. `ids` are all fragment ids, sorted, and `segments` in
    the same order.
    """
    fragments = open_array(job.folder / "data.zarr", "fragments", "r")
    grid = BlockGrid.from_dict(job.grid)
    units: Any = fragments.attrs["units"]
    out = create_array(
        job.folder / "data.zarr",
        name,
        shape=grid.volume_shape,
        chunks=grid.write_shape,
        dtype="uint64",
        voxel_size=grid.voxel_size,
        offset=grid.offset,
        unit=str(units[0]),
    )
    number = np.unique(segments, return_inverse=True)[1].reshape(-1)
    sizes = np.zeros(number.max(initial=0) + 1, np.int64)

    def blocks() -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        for block in range(grid.n_blocks):
            box = tuple(slice(a, b) for a, b in zip(*grid.write_box(block), strict=True))
            yield block, np.asarray(fragments[box], np.uint64)

    for _, labels in blocks():
        np.add.at(sizes, number[np.searchsorted(ids, labels[labels > 0])], 1)
    new_ids = np.where(sizes[number] >= min_size, number + 1, 0).astype(np.uint64)
    for block, labels in blocks():
        joined = np.zeros_like(labels)
        joined[labels > 0] = new_ids[np.searchsorted(ids, labels[labels > 0])]
        write_chunk(out, grid.index(block), joined)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what C++ code prints to the log: standard output is for results."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            ctypes.CDLL(None).fflush(None)  # C keeps lines back where there is no terminal
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        _logger.debug("waterz: %s", file.read().decode(errors="replace"))
