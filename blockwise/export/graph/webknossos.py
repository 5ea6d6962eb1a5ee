"""An exported graph as a dataset of WEBKNOSSOS: fragments, and an agglomerate attachment.

::

    OUT/webknossos/datasource-properties.json     written last
    OUT/webknossos/fragments/1                    dense ids of fragments, zarr v3
    OUT/webknossos/fragments/agglomerates/segmentation/   which of them are one segment, and edges

The attachment has format version 4 (zarr v3; public in webknossos-libs), which numbers segments
from 1 without a gap: fragments are numbered in the order of their ids. An agglomerate is a segment
of the run, with its id if ids are dense too (else its place in their order). Edges are the contacts
inside segments, with their mean affinity, and edges of affinity 1 where fragments are joined by an
edit, or pieces by their name, that do not touch. So an agglomerate is connected, and can be split
between any two fragments.

Blocks are written by tasks; the attachment is made in one process, in about 200 bytes for each
fragment and edge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from numpy.typing import NDArray

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.export.graph.tables import read_graph
from agq.blockwise.stitch.workers import AnyClient, Progress, Task, workers_of
from agq.blockwise.storage.arrays import Ids
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.volumes.create import (
    ChunkFiles,
    open_array,
    read_chunk,
    write_chunk,
)

FOLDER = "webknossos"
_LAYER, _MAG, _NAME = "fragments", "1", "segmentation"
_PROPERTIES = "datasource-properties.json"
_UNITS = {"nm": "nanometer", "angstrom": "angstrom", "pm": "picometer"}
_CHUNK = 2**15
_SHARD = 2**27
"""Rows of a chunk and of a file of the attachment."""

_FORCED = 2.0
"""Above any affinity: the score of merges without evidence is about 2,000."""

_ATTRIBUTES = {
    "voxelytics": {"artifact_schema_version": 4, "artifact_class": "AgglomerateViewArtifact"}
}


@dataclass(frozen=True)
class Dense:
    """Fragments in the order of their ids: the first has number 1.

    Attributes
    ----------
    ids, segments
        Fragments, ascending, and their segments, uint64.
    points
        A voxel inside each, (n, 3), (z, y, x).
    """

    ids: Ids
    segments: Ids
    points: NDArray[np.int64]

    @classmethod
    def read(cls, graph: Path) -> Dense:
        """Read the table of fragments."""
        table = pa.concat_tables(read_graph(graph, "fragments"))
        columns = [table[name].to_numpy() for name in ("id", "segment")]
        points = np.stack([table[f"point_{axis}"].to_numpy() for axis in "zyx"], axis=1)
        order = np.argsort(columns[0])
        return cls(columns[0][order], columns[1][order], points[order])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the layer: the smaller one that holds all numbers."""
        return np.dtype(np.uint32 if len(self.ids) < 2**32 - 1 else np.uint64)

    def agglomerates(self) -> NDArray[np.int64]:
        """Return the agglomerate of each fragment: its segment, or the place of that if sparse."""
        if not len(self.ids) or int(self.segments.max()) <= 4 * len(self.ids):
            return self.segments.astype(np.int64)
        known, place = np.unique(self.segments, return_inverse=True)
        return place.reshape(-1).astype(np.int64) + int(known[0] != 0)


def write_dataset(
    run_dir: Path,
    graph: Path,
    grid: BlockGrid,
    client: AnyClient,
    *,
    unit: str = "nm",
    on_progress: Progress | None = None,
) -> int:
    """Write the dataset beside the tables of a whole graph; return how many edges it has.

    Parameters
    ----------
    run_dir
        Folder of the run.
    graph
        Folder of the graph, exported to the end.
    grid
        Blocks of the run.
    client
        Dask client whose workers see both folders under the same paths. None: this process.
    unit
        World unit of the grid.
    on_progress
        Called with the name of the step, items done and items in all.
    """
    out = graph / FOLDER
    (out / _PROPERTIES).unlink(missing_ok=True)
    dense = Dense.read(graph)
    volume = out / _LAYER / _MAG
    if not (volume / "zarr.json").exists():
        # In the order of axes that webknossos-libs write.
        zarr.create_array(
            store=volume,
            shape=(1, *grid.volume_shape[::-1]),
            chunks=(1, *grid.write_shape[::-1]),
            dtype=dense.dtype,
            fill_value=0,
            dimension_names=("c", "x", "y", "z"),
        )
    blocks, first = np.unique(BlockGrid.split_ids(dense.ids)[0], return_index=True)
    items = list(zip(blocks.tolist(), (first + 1).tolist(), strict=True))
    workers = workers_of(client, graph, on_progress)
    batches = workers.batches(items, 64, share=4)
    workers.run("webknossos", [WriteDense(batch, run_dir, out, grid) for batch in batches])
    edges = _write_attachment(out / _LAYER / "agglomerates" / _NAME, dense, graph)
    properties = json.dumps(_properties(graph.name, grid, unit, dense), indent=1)
    write_atomic(out / _PROPERTIES, properties.encode())
    return edges


@dataclass(frozen=True)
class WriteDense(Task):
    """Write the numbers of fragments of some blocks, each given with its first one."""

    items: Sequence[tuple[int, int]]
    run_dir: Path
    out: Path
    grid: BlockGrid

    def run(self) -> None:
        """Write the blocks that are not there yet."""
        fragments = open_array(self.run_dir / "data.zarr", "fragments", "r")
        array = open_array(self.out, f"{_LAYER}/{_MAG}", "r+")
        files = ChunkFiles(array)
        for number, first in self.items:
            index = self.grid.index(number)
            place = (0, *index[::-1])
            if files.file(place).exists():
                continue
            labels = read_chunk(fragments, index)
            start, stop = self.grid.write_box(number)
            labels = labels[tuple(slice(0, b - a) for a, b in zip(start, stop, strict=True))]
            ids, row = np.unique(labels, return_inverse=True)
            numbers = (np.arange(len(ids)) + first - int(ids[0] == 0)).astype(array.dtype)
            numbers[ids == 0] = 0
            write_chunk(array, place, numbers[row.reshape(labels.shape)].T[None])


def _write_attachment(folder: Path, dense: Dense, graph: Path) -> int:
    agglomerate = dense.agglomerates()
    number = np.arange(1, len(dense.ids) + 1)
    order = np.lexsort((number, agglomerate))
    order = order[agglomerate[order] > 0]
    count = int(agglomerate.max(initial=0))
    begins = _offsets(agglomerate[order], count)
    local = np.zeros(len(number), np.int64)
    local[order] = np.arange(len(order)) - begins[agglomerate[order]].astype(np.int64)
    ends, affinity = _edges(dense, graph)
    of = agglomerate[ends[:, 0]]
    pairs = np.sort(local[ends], axis=1)
    rows = np.lexsort((pairs[:, 1], pairs[:, 0], of))
    arrays: dict[str, npt.NDArray[Any]] = {
        "segment_to_agglomerate": np.concatenate(([0], agglomerate)).astype(np.uint64),
        "agglomerate_to_segments_offsets": begins,
        "agglomerate_to_segments": number[order].astype(dense.dtype),
        "agglomerate_to_positions": dense.points[order][:, ::-1].astype(np.int32),
        "agglomerate_to_edges_offsets": _offsets(of[rows], count),
        "agglomerate_to_edges": pairs[rows].astype(dense.dtype),
        "agglomerate_to_affinities": affinity[rows].astype(np.float32),
    }
    zarr.create_group(store=folder, attributes=_ATTRIBUTES, overwrite=True)
    for name, values in arrays.items():
        # A file ends with its last chunk: a larger one would only hold a larger index.
        length = max(1, min(_CHUNK, len(values)))
        shard = min(_SHARD, max(1, -(-len(values) // length)) * length)
        array = zarr.create_array(
            store=folder / name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(length, *values.shape[1:]),
            shards=(shard, *values.shape[1:]),
            fill_value=0,
        )
        if len(values):
            array[...] = values
    return len(rows)


def _offsets(of: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Return where the rows of agglomerates 0 .. count begin, and where the last ends."""
    sizes = np.bincount(of, minlength=count + 1)
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.uint64)


def _edges(dense: Dense, graph: Path) -> tuple[NDArray[np.int64], NDArray]:
    """Return the edges inside segments by the places of their fragments, and their affinities."""
    parts, affinities = [np.zeros((0, 2), np.int64)], [np.zeros(0)]

    def add(u: Ids, v: Ids, affinity: NDArray) -> None:
        ends = np.stack([np.searchsorted(dense.ids, end) for end in (u, v)], axis=1)
        one, other = dense.segments[ends].T
        inside = (one == other) & (one > 0) & ~np.isnan(affinity)
        parts.append(ends[inside])
        affinities.append(affinity[inside])

    for table in read_graph(graph, "edges"):
        if len(table):
            columns = [table[name].to_numpy() for name in ("u", "v", "affinity")]
            add(columns[0], columns[1], columns[2].astype(np.float64))
    for table in read_graph(graph, "merges"):
        forced = table.filter(pc.greater(table["score"], _FORCED))
        add(forced["u"].to_numpy(), forced["v"].to_numpy(), np.ones(len(forced)))
    ends = np.sort(np.concatenate(parts), axis=1)
    # Of a merge of fragments that touch, the contact stays.
    ends, first = np.unique(ends, axis=0, return_index=True)
    return ends, np.concatenate(affinities)[first]


def _properties(name: str, grid: BlockGrid, unit: str, dense: Dense) -> dict[str, Any]:
    depth, height, width = grid.volume_shape
    mag = {
        "mag": [1, 1, 1],
        "path": f"./{_LAYER}/{_MAG}",
        "axisOrder": {"c": 0, "x": 1, "y": 2, "z": 3},
    }
    attachment = {
        "name": _NAME,
        "path": f"./{_LAYER}/agglomerates/{_NAME}",
        "dataFormat": "zarr3",
    }
    layer = {
        "name": _LAYER,
        "category": "segmentation",
        "boundingBox": {"topLeft": [0, 0, 0], "width": width, "height": height, "depth": depth},
        "dataFormat": "zarr3",
        "mags": [mag],
        "largestSegmentId": len(dense.ids),
        "attachments": {"agglomerates": [attachment]},
        "numChannels": 1,
        "elementClass": str(dense.dtype),
    }
    scale = {"factor": list(map(float, grid.voxel_size[::-1])), "unit": _UNITS[unit]}
    return {"id": {"name": name, "team": ""}, "scale": scale, "dataLayers": [layer], "version": 1}
