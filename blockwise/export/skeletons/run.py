"""Skeletons of all segments of an export, on dask: traced by windows, then joined by segments."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

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
from agq.blockwise.export.skeletons.encode import INFO, encoded, ids_of_shard, sharding_of, swc
from agq.blockwise.export.skeletons.join import join
from agq.blockwise.export.skeletons.trace import trace
from agq.blockwise.export.target import Target
from agq.blockwise.stitch.steps import digest
from agq.blockwise.stitch.workers import AnyClient, Progress, Task, workers_of
from agq.blockwise.storage.arrays import map_array
from agq.blockwise.storage.files import make_folder, write_atomic
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Triple, triple
from agq.reading import parse_json, read_file

FOLDER = "skeletons"

VOXEL_NM = 32.0
"""The level whose voxels are nearest to this is traced."""

CORE_NM = 4000.0
"""Side of the core of a window."""

MARGIN_NM = 1200.0
"""How much a window sees around its core."""

_RECORD = "skeletons.json"

_EDGE = np.dtype(
    [
        ("segment", np.uint64),
        ("a", np.int64),
        ("b", np.int64),
        ("radii", np.float32, 2),
    ]
)
_SIZE = np.dtype([("segment", np.uint64), ("voxels", np.int64)])
_CABLE = np.dtype([("segment", np.uint64), ("cable_um", np.float64)])


@dataclass(frozen=True)
class SkeletonsReport:
    """What was written.

    Attributes
    ----------
    level
        Resolution that was traced.
    skeletons
        Segments with a skeleton.
    small
        Segments without: too few voxels, or no line in them.
    cable_um
        Length of all.
    cable
        Folder and number of the tables of lengths, for `export_properties`.
    written
        Ranges of segments written now; 0 if all were there.
    """

    level: int
    skeletons: int
    small: int
    cable_um: float
    cable: tuple[Path, int]
    written: int


@dataclass(frozen=True)
class Windows:
    """How a level is cut into windows.

    Attributes
    ----------
    volume
        Labels of the level.
    core, margin
        Triples in voxels, (z, y, x).
    """

    volume: Volume
    core: Triple
    margin: Triple

    @classmethod
    def of(cls, volume: Volume, core_nm: float = CORE_NM) -> Windows:
        """Return windows of about a size."""
        size = _nm(volume, volume.voxel_size)
        core = [min(n, max(1, round(core_nm / s))) for n, s in zip(volume.shape, size, strict=True)]
        return cls(volume, triple(core), triple(math.ceil(MARGIN_NM / s) for s in size))

    @property
    def grid(self) -> Triple:
        """Windows along each axis."""
        return triple(-(-n // c) for n, c in zip(self.volume.shape, self.core, strict=True))

    @property
    def size(self) -> tuple[float, float, float]:
        """Nanometres of a voxel, (z, y, x)."""
        return _nm(self.volume, self.volume.voxel_size)

    @property
    def offset(self) -> tuple[float, float, float]:
        """Nanometres of the volume's corner, (z, y, x)."""
        return _nm(self.volume, self.volume.offset)

    def trace(self, index: int) -> tuple[Rows, Rows]:
        """Return the edges that touch a core, and how many voxels of each segment are in it."""
        shape = self.volume.shape
        at = np.unravel_index(index, self.grid)
        start = [int(i) * c for i, c in zip(at, self.core, strict=True)]
        stop = [min(a + c, n) for a, c, n in zip(start, self.core, shape, strict=True)]
        begin = [max(0, a - m) for a, m in zip(start, self.margin, strict=True)]
        end = [min(b + m, n) for b, m, n in zip(stop, self.margin, shape, strict=True)]
        labels = self.volume.read(begin, end)
        low = triple(a - b for a, b in zip(start, begin, strict=True))
        high = triple(a - b for a, b in zip(stop, begin, strict=True))
        segments, a, b, radii = trace(labels, low, high, self.size)
        edges = np.zeros(len(segments), _EDGE)
        edges["segment"], edges["radii"] = segments, radii
        for name, ends in (("a", a), ("b", b)):
            edges[name] = np.ravel_multi_index(tuple((ends + begin).T), shape)
        core = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        ids, counts = np.unique(labels[core], return_counts=True)
        sizes = np.zeros(np.count_nonzero(ids), _SIZE)
        sizes["segment"], sizes["voxels"] = ids[ids != 0], counts[ids != 0]
        return edges, sizes


def export_skeletons(
    levels: Sequence[Volume],
    target: Target,
    client: AnyClient,
    *,
    level: int | None = None,
    least_voxels: int = 1000,
    swc_folder: Path | None = None,
    core_nm: float = CORE_NM,
    on_progress: Progress | None = None,
) -> SkeletonsReport:
    """Write the skeletons of a volume that `export_precomputed` has exported.

    Stopped anywhere, it goes on there.

    Parameters
    ----------
    levels
        Labels, finest first.
    target
        The export.
    client
        Dask client whose workers see volume and working folder under the same paths. None:
        this process.
    level
        The one that is traced; default: the one with voxels nearest to `VOXEL_NM`.
    least_voxels
        Segments of fewer voxels of the finest level have none.
    swc_folder
        Local folder for an SWC file of each segment.
    core_nm
        Side of the core of a window.
    on_progress
        Called with the name of the step, items done and items in all.
    """
    target = target.opened()
    workers = workers_of(client, target.place, on_progress)
    workers.wait_for_stragglers()
    level = nearest_level(levels) if level is None else level
    windows = Windows.of(levels[level], core_nm)
    finest = math.prod(levels[0].voxel_size)
    least = max(1, round(least_voxels * finest / math.prod(levels[level].voxel_size)))
    count = math.prod(windows.grid)
    batches = batches_of(count, 16)
    work = target.work / f"skeletons-{digest(level, windows.core)[:8]}"
    edges, sizes = make_folder(work / "edges"), make_folder(work / "sizes")
    # The sizes of a batch are written last.
    todo = [i for i in range(len(batches)) if not part(sizes, i).exists()]
    tasks = [Trace(batches[i], i, windows, edges, sizes) for i in todo]
    workers.run("trace skeletons", tasks, count - sum(task.size for task in tasks))

    parts = [map_array(part(sizes, i))["segment"] for i in range(len(batches))]
    largest = max((int(p[-1]) for p in parts if len(p)), default=0)
    sharding = sharding_of(largest, sum(map(len, parts)))
    spans = _aligned(spans_of(sizes, len(batches)), ids_of_shard(sharding) if sharding else 1)
    made = work / f"joined-{digest(least, str(swc_folder))[:8]}"
    if not made.exists():
        # Those of other settings: first what says that they are done.
        for other in target.work.glob("skeletons-*/joined-*"):
            shutil.rmtree(other)
        (target.work / _RECORD).unlink(missing_ok=True)
        target.remove(FOLDER)
    make_folder(made)
    order = (windows, edges, sizes, len(batches), made, target, sharding, least, swc_folder)
    left = [(i, span) for i, span in enumerate(spans) if not part(made, i).exists()]
    join_tasks = [Join([item], *order) for item in left]
    workers.run("join skeletons", join_tasks, len(spans) - len(join_tasks))
    info = INFO if sharding is None else {**INFO, "sharding": sharding}
    target.write_json(f"{FOLDER}/info", info)
    target.refer("skeletons", FOLDER)
    record = {"folder": str(made.relative_to(target.work)), "tables": len(spans)}
    write_atomic(target.work / _RECORD, json.dumps(record).encode())
    tables = [map_array(part(made, i)) for i in range(len(spans))]
    return SkeletonsReport(
        level,
        sum(int(np.count_nonzero(t["cable_um"])) for t in tables),
        sum(int(np.count_nonzero(t["cable_um"] == 0)) for t in tables),
        sum(float(t["cable_um"].sum()) for t in tables),
        (made, len(spans)),
        len(left),
    )


def cable_of(target: Target) -> tuple[Path, int] | None:
    """Return the tables of lengths of an export's skeletons, for `export_properties`.

    None if it has no skeletons.
    """
    work = target.opened().work
    file = work / _RECORD
    if not file.is_file():
        return None
    record = parse_json(read_file(file))
    return work / record["folder"], int(record["tables"])


def nearest_level(levels: Sequence[Volume]) -> int:
    """Return the level whose voxels are nearest to `VOXEL_NM`, by the mean of the three axes."""

    def apart(volume: Volume) -> float:
        mean = math.prod(_nm(volume, volume.voxel_size)) ** (1 / 3)
        return abs(math.log(mean / VOXEL_NM))

    return min(range(len(levels)), key=lambda i: apart(levels[i]))


def _nm(volume: Volume, values: Any) -> tuple[float, float, float]:
    z, y, x = (int(v) / PER_NANOMETRE[volume.unit] for v in values)
    return z, y, x


def _aligned(spans: Sequence[Span], step: int) -> list[Span]:
    """Return spans that begin at multiples of a number of ids: shards have one writer."""
    firsts = sorted({first // step * step for first, _ in spans})
    return list(zip(firsts, [*firsts[1:], 2**64], strict=True))


@dataclass(frozen=True)
class Trace(Task):
    """Trace some windows."""

    items: Sequence[int]
    number: int
    windows: Windows
    edges: Path
    sizes: Path

    def run(self) -> None:
        """Write edges and sizes."""
        edges, sizes = [np.zeros(0, _EDGE)], [np.zeros(0, _SIZE)]
        for index in self.items:
            found, counted = self.windows.trace(index)
            edges.append(found)
            sizes.append(counted)
        write_part(self.edges, self.number, np.concatenate(edges))
        write_part(self.sizes, self.number, np.concatenate(sizes))


@dataclass(frozen=True)
class Join(Task):
    """Write the skeletons of ranges of segments."""

    items: Sequence[tuple[int, Span]]
    windows: Windows
    edges: Path
    sizes: Path
    parts: int
    made: Path
    target: Target
    sharding: dict[str, Any] | None
    least: int
    swc_folder: Path | None

    def run(self) -> None:
        """Write the skeletons, then the table of their lengths."""
        for number, span in self.items:
            sizes = read_span(self.sizes, self.parts, span)
            starts = starts_of(sizes)
            table = np.zeros(len(starts), _CABLE)
            table["segment"] = sizes["segment"][starts]
            voxels = np.add.reduceat(sizes["voxels"], starts) if len(starts) else starts
            place = dict(zip(table["segment"].tolist(), range(len(table)), strict=True))
            rows = read_span(self.edges, self.parts, span)
            files: dict[int, bytes] = {}
            for some in np.split(rows, starts_of(rows)[1:]) if len(rows) else ():
                segment = int(some["segment"][0])
                if voxels[place[segment]] < self.least:
                    continue
                skeleton = join(
                    some,
                    self.windows.volume.shape,
                    self.windows.core,
                    self.windows.size,
                    self.windows.offset,
                )
                table["cable_um"][place[segment]] = skeleton.cable_nm / 1000
                if len(skeleton.edges):
                    files[segment] = encoded(skeleton)
                    if self.swc_folder is not None:
                        text = swc(skeleton, segment)
                        write_atomic(self.swc_folder / f"{segment}.swc", text.encode())
            self._write(files)
            write_part(self.made, number, table)

    def _write(self, files: dict[int, bytes]) -> None:
        if self.sharding is None:
            for segment, data in files.items():
                self.target.write(f"{FOLDER}/{segment}", data)
            return
        spec = {
            "driver": "neuroglancer_uint64_sharded",
            "metadata": self.sharding,
            "base": self.target.store(FOLDER),
        }
        # Each write of a shard replaces the file: all of it at once.
        with ts.Transaction() as transaction:
            store = ts.KvStore.open(spec).result().with_transaction(transaction)
            for segment, data in files.items():
                store[segment.to_bytes(8, "big")] = data
