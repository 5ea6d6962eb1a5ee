"""What is known of each segment: a table, and neuroglancer's ``segment_properties`` of the larger.

Voxels, box and surface are counted box by box; nothing is estimated. The surface is that of the
voxels, in steps: faces between a voxel of the segment and one of anything else. That of a ball is
1.5 times as large as a smooth one. Faces on the border of the volume, where nobody knows what comes
next, do not count.

neuroglancer loads all properties as one document, so it gets the larger segments only, the largest
first; the Parquet file beside it holds all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from agq.blockwise.export.rows import (
    Rows,
    Span,
    batches_of,
    part,
    read_span,
    spans_of,
    starts_of,
    write_part,
)
from agq.blockwise.export.target import Target
from agq.blockwise.stitch.steps import digest
from agq.blockwise.stitch.workers import AnyClient, Progress, Task, workers_of
from agq.blockwise.storage.files import atomic_file, make_folder
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Triple, triple

FOLDER = "segment_properties"

LEAST_VOXELS = 1000
"""Segments of fewer voxels have no properties in neuroglancer."""

MOST_SEGMENTS = 300_000
"""Most segments with properties in neuroglancer: about 30 MB of JSON."""

_MOST_VOXELS = 2**23

_MEASURED = np.dtype(
    [
        ("segment", np.uint64),
        ("voxels", np.int64),
        ("begin", np.int64, 3),
        ("end", np.int64, 3),
        ("faces", np.int64, 3),
    ]
)

_SCHEMA = pa.schema(
    [
        ("segment", pa.uint64()),
        ("voxels", pa.int64()),
        ("fragments", pa.int64()),
        ("volume_um3", pa.float64()),
        ("surface_um2", pa.float64()),
        ("cable_um", pa.float64()),
        *((f"{end}_{axis}", pa.int64()) for end in ("begin", "end") for axis in "zyx"),
    ]
)
_SHOWN = {
    "voxels": ("uint32", "Voxels at full resolution"),
    "volume_um3": ("float32", "Volume in cubic micrometres"),
    "surface_um2": ("float32", "Surface of the voxels in square micrometres"),
    "fragments": ("uint32", "Fragments that were joined"),
    "cable_um": ("float32", "Length of the skeleton in micrometres"),
    **{
        f"{end}_{axis}": ("int32", f"Bounding box, voxels: {end} along {axis}")
        for end in ("begin", "end")
        for axis in "xyz"
    },
}


@dataclass(frozen=True)
class PropertiesReport:
    """What was written.

    Attributes
    ----------
    segments
        In the table.
    shown
        With properties in neuroglancer.
    """

    segments: int
    shown: int


def export_properties(
    volume: Volume,
    target: Target,
    client: AnyClient,
    *,
    segments: Path | None = None,
    cable: tuple[Path, int] | None = None,
    least_voxels: int = LEAST_VOXELS,
    on_progress: Progress | None = None,
) -> PropertiesReport:
    """Measure the segments of a volume that `export_precomputed` has exported.

    Stopped anywhere, it goes on there.

    Parameters
    ----------
    volume
        Labels at full resolution.
    target
        The export.
    client
        Dask client whose workers see volume and working folder under the same paths. None:
        this process.
    segments
        Table of segments of a stitch, which knows their fragments.
    cable
        Folder and number of the tables of cable lengths: rows ``segment`` and ``cable_um``.
    least_voxels
        Segments of fewer voxels are in the table only.
    on_progress
        Called with the name of the step, items done and items in all.
    """
    target = target.opened()
    workers = workers_of(client, target.place, on_progress)
    workers.wait_for_stragglers()
    box = _box(volume)
    grid = triple(-(-n // b) for n, b in zip(volume.shape, box, strict=True))
    batches = batches_of(math.prod(grid))
    folder = make_folder(target.work / f"properties-{digest(box, len(batches))[:8]}")
    todo = [i for i in range(len(batches)) if not part(folder, i).exists()]
    tasks = [Measure(batches[i], i, volume, box, grid, folder) for i in todo]
    boxes = math.prod(grid)
    workers.run("measure segments", tasks, boxes - sum(task.size for task in tasks))
    spans = spans_of(folder, len(batches))
    # These are quick, and depend on what is known of fragments and cable: made each time.
    merged = make_folder(target.work / "merged-properties")
    merge = [
        Merge([(i, span)], folder, len(batches), merged, segments, cable)
        for i, span in enumerate(spans)
    ]
    workers.run("merge properties", merge)
    files = [merged / f"{i:06d}.parquet" for i in range(len(spans))]
    return _write(volume, target, files, least_voxels)


def _box(volume: Volume) -> Triple:
    """Return a box of whole stored chunks, of about `_MOST_VOXELS`."""
    box = list(map(min, volume.chunks, volume.shape))
    while True:
        axis = min(range(3), key=lambda d: box[d] if box[d] < volume.shape[d] else math.inf)
        if box[axis] >= volume.shape[axis] or 2 * math.prod(box) > _MOST_VOXELS:
            return triple(box)
        box[axis] *= 2


@dataclass(frozen=True)
class Measure(Task):
    """Measure the segments of some boxes."""

    items: Sequence[int]
    number: int
    volume: Volume
    box: Triple
    grid: Triple
    folder: Path

    def run(self) -> None:
        """Write the part."""
        found = [np.zeros(0, _MEASURED)]
        for index in self.items:
            at = [int(i) for i in np.unravel_index(index, self.grid)]
            start = [i * b for i, b in zip(at, self.box, strict=True)]
            ends = zip(start, self.box, self.volume.shape, strict=True)
            stop = [min(a + b, n) for a, b, n in ends]
            # With one plane of the boxes below, so that each face is counted in one box.
            low = [min(a, 1) for a in start]
            first = [a - n for a, n in zip(start, low, strict=True)]
            found.append(measure(self.volume.read(first, stop), triple(low), triple(first)))
        rows = np.concatenate(found)
        write_part(self.folder, self.number, _added(rows[np.argsort(rows["segment"])]))


def measure(labels: npt.NDArray[Any], low: Triple, first: Triple) -> Rows:
    """Measure the segments of a box.

    Parameters
    ----------
    labels
        (z, y, x) integers; 0 is background.
    low
        Planes at the beginning of each axis that belong to the boxes below: only the faces towards
        them count here.
    first
        Place of the first voxel in the volume.
    """
    ids, compact = compacted(labels)
    voxels = np.zeros(len(ids), np.int64)
    faces = np.zeros((len(ids), 3), np.int64)
    begin = np.full((len(ids), 3), 2**62, np.int64)
    end = np.zeros((len(ids), 3), np.int64)
    _count(compact, np.array(low), voxels, begin, end, faces)
    rows = np.zeros(len(ids), _MEASURED)
    rows["segment"], rows["voxels"], rows["faces"] = ids, voxels, faces
    rows["begin"], rows["end"] = begin + first, end + first
    inside = (ids != 0) & (voxels + faces.sum(1) > 0)
    return np.asarray(rows[inside])


def compacted(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Return the labels of a volume in order, and the place of each voxel's label among them."""
    flat = labels.reshape(-1)
    # Runs along x: there are far fewer of them to sort than voxels.
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    ids, places = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(np.concatenate([starts, [len(flat)]]))
    compact = np.repeat(places.astype(np.int32), lengths).reshape(labels.shape)
    return ids.astype(np.uint64), compact


@numba.njit(cache=True, nogil=True)
def _count(
    labels: npt.NDArray[np.int32],
    low: npt.NDArray[np.int64],
    voxels: npt.NDArray[np.int64],
    begin: npt.NDArray[np.int64],
    end: npt.NDArray[np.int64],
    faces: npt.NDArray[np.int64],
) -> None:  # pragma: no cover (compiled)
    for z in range(low[0], labels.shape[0]):
        for y in range(low[1], labels.shape[1]):
            for x in range(low[2], labels.shape[2]):
                label = labels[z, y, x]
                voxels[label] += 1
                place = (z, y, x)
                for axis in range(3):
                    begin[label, axis] = min(begin[label, axis], place[axis])
                    end[label, axis] = max(end[label, axis], place[axis] + 1)
                    if place[axis] == 0:
                        continue
                    other = labels[z - (axis == 0), y - (axis == 1), x - (axis == 2)]
                    if other != label:
                        faces[label, axis] += 1
                        faces[other, axis] += 1


def _added(rows: Rows) -> Rows:
    """Add up sorted rows of one segment."""
    starts = starts_of(rows)
    out = np.asarray(rows[starts])
    if len(starts):
        for name in ("voxels", "faces"):
            out[name] = np.add.reduceat(rows[name], starts)
        out["begin"] = np.minimum.reduceat(rows["begin"], starts)
        out["end"] = np.maximum.reduceat(rows["end"], starts)
    return out


@dataclass(frozen=True)
class Merge(Task):
    """Put together what all boxes say of ranges of segments."""

    items: Sequence[tuple[int, Span]]
    folder: Path
    parts: int
    merged: Path
    segments: Path | None
    cable: tuple[Path, int] | None

    def run(self) -> None:
        """Write the table of each range."""
        for number, span in self.items:
            rows = _added(read_span(self.folder, self.parts, span))
            columns = {
                "segment": rows["segment"],
                "voxels": rows["voxels"],
                **{f"faces_{axis}": rows["faces"][:, i] for i, axis in enumerate("zyx")},
                **{
                    f"{end}_{axis}": rows[end][:, i]
                    for end in ("begin", "end")
                    for i, axis in enumerate("zyx")
                },
            }
            table = pa.table(columns)
            table = table.append_column("fragments", _fragments(self.segments, rows, span))
            table = table.append_column("cable_um", _cable(self.cable, rows, span))
            with atomic_file(self.merged / f"{number:06d}.parquet") as file:
                pq.write_table(table, file, compression="zstd")


def _fragments(file: Path | None, rows: Rows, span: Span) -> pa.Array:
    """Return the fragments of segments from the table of the stitch."""
    if file is None or not len(rows):
        return pa.nulls(len(rows), pa.int64())
    first, last = (pa.scalar(int(rows["segment"][i]), pa.uint64()) for i in (0, -1))
    known = pq.read_table(
        file,
        columns=["segment", "fragments"],
        filters=[("segment", ">=", first), ("segment", "<=", last)],
    )
    known = known.sort_by("segment")  # ids that stitches have kept come in any order
    return _matched(
        rows["segment"], known["segment"].to_numpy(), known["fragments"].to_numpy(), pa.int64()
    )


def _cable(tables: tuple[Path, int] | None, rows: Rows, span: Span) -> pa.Array:
    if tables is None:
        return pa.nulls(len(rows), pa.float64())
    known = read_span(*tables, span)
    return _matched(rows["segment"], known["segment"], known["cable_um"], pa.float64())


def _matched(wanted: Any, known: Any, values: Any, kind: pa.DataType) -> pa.Array:
    """Return the value of each segment; null where it has none. Both are sorted."""
    places = np.searchsorted(known, wanted)
    inside = places < len(known)
    places = np.where(inside, places, 0)
    if not len(known):
        return pa.nulls(len(wanted), kind)
    missing = ~(inside & (np.asarray(known[places]) == wanted))
    return pa.array(np.asarray(values[places]), kind, mask=missing)


def _write(
    volume: Volume, target: Target, files: Sequence[Path], least_voxels: int
) -> PropertiesReport:
    """Write the table, and the properties of the largest segments."""
    scale = PER_NANOMETRE[volume.unit] * 1000  # world units of a micrometre
    z, y, x = (int(v) / scale for v in volume.voxel_size)
    areas = {"faces_z": y * x, "faces_y": z * x, "faces_x": z * y}
    largest, count = _SCHEMA.empty_table(), 0
    local = target.work / "segments.parquet"
    with (
        atomic_file(local) as file,
        pq.ParquetWriter(file, _SCHEMA, compression="zstd") as writer,
    ):
        for name in files:
            table = pq.read_table(name)
            surface = sum(table[key].to_numpy() * area for key, area in areas.items())
            table = table.append_column("volume_um3", [table["voxels"].to_numpy() * (z * y * x)])
            table = table.append_column("surface_um2", [surface]).select(_SCHEMA.names)
            writer.write_table(table.cast(_SCHEMA))
            count += table.num_rows
            large = table.filter(np.asarray(table["voxels"]) >= least_voxels).cast(_SCHEMA)
            order = [("voxels", "descending"), ("segment", "ascending")]
            largest = pa.concat_tables([largest, large]).sort_by(order)[:MOST_SEGMENTS]
    target.write_file(f"{FOLDER}/segments.parquet", local)
    info = {"@type": "neuroglancer_segment_properties", "inline": _inline(largest)}
    target.write_json(f"{FOLDER}/info", info)
    target.refer(FOLDER, FOLDER)
    return PropertiesReport(count, largest.num_rows)


def _inline(table: pa.Table) -> dict[str, Any]:
    properties = []
    for name, (kind, description) in _SHOWN.items():
        column = table[name]
        if column.null_count == len(column) and len(column):
            continue  # nobody has counted it
        values = column.fill_null(0).to_numpy()
        if kind != "float32" and len(values) and values.max() > np.iinfo(kind).max:
            kind = "float32"
        shown = values.astype(kind).tolist()
        properties.append(
            {
                "id": name,
                "type": "number",
                "data_type": kind,
                "description": description,
                "values": [float(f"{v:.6g}") for v in shown] if kind == "float32" else shown,
            }
        )
    return {"ids": [str(s) for s in table["segment"].to_pylist()], "properties": properties}
