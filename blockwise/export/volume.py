"""Export of volumes as neuroglancer "precomputed", scale by scale, through tensorstore.

A scale is cut into boxes; each box has one writer, and a journal says which are done, so an export
goes on where it was stopped and workers never share a file. Memory is bounded by the box: one
shard (``neuroglancer_uint64_sharded_v1``), or whole chunks with a file each. A shard holds chunks
that follow each other in the compressed Morton code: 2^n of them, which are a box. Labels are
uint64 in the ``compressed_segmentation`` encoding, images are stored raw. Chunks of background are
not stored: readers take them for 0.

The format counts in x, y, z, in nanometres, and places a scale by a whole number of its own voxels.
Voxel sizes may be fractions of a nanometre (4.2 nm is held as such). Where the offset of a coarse
scale is not a whole number of its voxels, it is rounded down and :attr:`Scale.shift` says by how
much the scale appears too low; the finest scale is never shifted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agq.blockwise.export.target import FOLDER, MARK, Target, first_line
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.writer import run_journalled
from agq.blockwise.stitch.steps import digest
from agq.blockwise.stitch.workers import (
    AnyClient,
    Progress,
    StitchError,
    Task,
    Workers,
    workers_of,
)
from agq.blockwise.storage.files import Unsynced
from agq.blockwise.volumes.content import Content, difference, read_content
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import InputError
from agq.reading import parse_json

CHUNK = (64, 64, 64)
"""Triple of a chunk, (z, y, x)."""

_MOST_VOXELS = 2**23
"""Of a box, unless one chunk is larger: 64 MiB of labels."""

_MOST_IN_SHARD = 2**24
"""Voxels of a shard, unless one chunk is larger: a cube of 4 x 4 x 4 chunks by default."""

_MINISHARD_BITS = 9
"""Chunks of a minishard, as a power of two: a reader loads an index of 24 bytes for each."""

_BATCH = 64
"""Most boxes of a task."""

_IMAGES = ("uint8", "uint16", "float32")
_BLOCK = [8, 8, 8]
_NAMES = ("path", "dataset", "format", "metadata")


class ExportError(StitchError):
    """A part of an export failed at run time; exporting again does only what is missing."""


@dataclass(frozen=True)
class Scale:
    """One resolution of the export.

    Attributes
    ----------
    key
        Folder of its chunks.
    shape, chunk, box
        Triple of the scale, of a chunk and of what one task item writes, (z, y, x).
    resolution
        Nanometres per voxel, (z, y, x).
    voxel_offset
        Place of the first voxel in voxels of this scale, (z, y, x).
    shift
        Nanometres by which the place is rounded down, (z, y, x); 0 for the finest scale.
    data_type
        Of the voxels in the export.
    sharding
        Specification of the shards; None: a file for each chunk.
    """

    key: str
    shape: Triple
    chunk: Triple
    box: Triple
    resolution: tuple[float, float, float]
    voxel_offset: Triple
    shift: tuple[float, float, float]
    data_type: str
    sharding: dict[str, Any] | None = None

    @property
    def grid(self) -> Triple:
        """Boxes along each axis."""
        return triple(-(-n // b) for n, b in zip(self.shape, self.box, strict=True))

    @property
    def chunks(self) -> int:
        """Chunks in all."""
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types."""
        described = asdict(self)
        if self.sharding is None:
            del described["sharding"]  # as earlier releases have described it
        return described

    def spec(self, out: Target) -> dict[str, Any]:
        """Return what tensorstore opens or creates."""
        labels = self.data_type == "uint64"
        encoding: dict[str, Any] = {"encoding": "raw"}
        if labels:
            encoding = {
                "encoding": "compressed_segmentation",
                "compressed_segmentation_block_size": _BLOCK,
            }
        return {
            "driver": "neuroglancer_precomputed",
            "kvstore": out.store(),
            "multiscale_metadata": {
                "type": "segmentation" if labels else "image",
                "data_type": self.data_type,
                "num_channels": 1,
            },
            "scale_metadata": {
                "key": self.key,
                "size": self.shape[::-1],
                "resolution": self.resolution[::-1],
                "voxel_offset": self.voxel_offset[::-1],
                "chunk_size": self.chunk[::-1],
                "sharding": self.sharding,
                **encoding,
            },
            # One box at a time: nothing is kept, and workers do not compete for cores.
            "context": {
                "cache_pool": {"total_bytes_limit": 0},
                "data_copy_concurrency": {"limit": 1},
            },
        }


def plan_export(
    levels: Sequence[Volume],
    *,
    image: bool = False,
    chunk: Sequence[int] = CHUNK,
    sharded: bool = True,
) -> list[Scale]:
    """Return the scales of an export, and check that the format can hold them.

    Parameters
    ----------
    levels
        Resolutions of one volume, finest first; (z, y, x).
    image
        Grey values instead of labels.
    chunk
        Triple of a chunk, (z, y, x).
    sharded
        Many chunks in a file instead of one.

    Raises
    ------
    InputError
        If the offset is not a whole number of voxels, or grey values have another type than uint8,
        uint16 and float32.
    """
    scales = []
    for i, volume in enumerate(levels):
        if image and volume.dtype.name not in _IMAGES:
            raise InputError(
                f"{volume.name}: an image of type {volume.dtype.name} cannot be exported; convert"
                f" it to one of {', '.join(_IMAGES)}"
            )
        places, rests = zip(
            *(divmod(o, v) for o, v in zip(volume.offset, volume.voxel_size, strict=True)),
            strict=True,
        )
        if i == 0 and any(rests):
            raise InputError(
                f"{volume.name}: its offset {tuple(volume.offset)} is not a whole number of voxels"
                f" of {tuple(volume.voxel_size)} {volume.unit}, which precomputed needs; give"
                " --offset"
            )
        resolution = _nm(volume.voxel_size, volume.unit)
        box, sharding = _box(volume.chunks, chunk), None
        if sharded:
            box, sharding = _shard(volume.shape, chunk)
        scales.append(
            Scale(
                key="_".join(number(v) for v in resolution[::-1]),
                shape=volume.shape,
                chunk=triple(chunk),
                box=box,
                resolution=resolution,
                voxel_offset=triple(places),
                shift=_nm(rests, volume.unit),
                data_type=volume.dtype.name if image else "uint64",
                sharding=sharding,
            )
        )
    return scales


def export_precomputed(
    levels: Sequence[Volume],
    scales: Sequence[Scale],
    out: Target | Path,
    client: AnyClient,
    *,
    version: str = "",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """Write all scales, or those boxes that are missing.

    Parameters
    ----------
    levels, scales
        Volumes, and what `plan_export` made of them.
    out
        Folder or bucket of the export.
    client
        Dask client whose workers see volumes and folders under the same paths. None: this process.
    version
        Whatever changes when the voxels do; with another one an existing export is not continued.
    overwrite
        Delete an existing export.
    on_progress
        Called with the name of the step, boxes done, and boxes in all.

    Returns
    -------
    int
        Boxes written now; 0 if the export was complete.

    Raises
    ------
    InputError
        If the folder holds something else.
    ExportError
        If boxes could not be written.
    """
    target = Target.of(out)
    with closing(workers_of(client, target.place, on_progress)) as workers:
        return _export(levels, scales, target, workers, version, overwrite=overwrite)


def _export(
    levels: Sequence[Volume],
    scales: Sequence[Scale],
    target: Target,
    workers: Workers,
    version: str,
    *,
    overwrite: bool,
) -> int:
    """Write what is missing; return how many boxes."""
    workers.wait_for_stragglers()
    target = _claim(levels, scales, target, version, overwrite)
    for scale in scales:
        _open(scale, target)
    folder = target.work / "journal"
    done = Journal(folder).done(sum(math.prod(scale.grid) for scale in scales))
    first = written = 0
    for volume, scale in zip(levels, scales, strict=True):
        boxes = math.prod(scale.grid)
        todo = np.flatnonzero(~done[first : first + boxes])
        batches = workers.batches(todo.tolist(), _BATCH, share=8)
        tasks = [Export(batch, volume, scale, target, first) for batch in batches]
        failed = sum(workers.run(f"export {scale.key}", tasks, boxes - len(todo)))
        if failed:
            record = Journal(folder).failed()[0]
            raise ExportError(
                f"export {scale.key}: {failed} boxes failed, first: {first_line(record.reason)}"
                f" (tracebacks in {folder})"
            )
        first += boxes
        written += len(todo)
    workers.end_journal(folder)
    return written


@dataclass(frozen=True)
class Export(Task):
    """Write some boxes of a scale, given by their places in its grid, in C order.

    Attributes
    ----------
    volume, scale, out
        What is exported, how, and the folder or bucket.
    first
        Number in the journal of the scale's first box.
    """

    items: Sequence[int]
    volume: Volume
    scale: Scale
    out: Target
    first: int

    def run(self) -> int:
        """Return how many boxes failed."""
        store = _open(self.scale, self.out)
        scale, volume = self.scale, self.volume

        def work(number: int, _unsynced: Unsynced) -> tuple[int, dict[str, str]]:
            # tensorstore syncs what it writes itself.
            index = np.unravel_index(number - self.first, scale.grid)
            start = [int(i) * b for i, b in zip(index, scale.box, strict=True)]
            stop = [min(a + b, n) for a, b, n in zip(start, scale.box, scale.shape, strict=True)]
            data = volume.read(start, stop)
            if scale.data_type == "uint64":
                if data.dtype.kind == "i" and data.size and data.min() < 0:
                    raise InputError(f"{volume.name}: labels below 0 between {start} and {stop}")
                data = data.astype(np.uint64, copy=False)
            place = tuple(
                slice(o + a, o + b) for o, a, b in zip(scale.voxel_offset, start, stop, strict=True)
            )[::-1]
            import tensorstore as ts

            # All chunks of a shard at once: each write of a shard replaces the file.
            with ts.Transaction() as transaction:
                store.with_transaction(transaction)[(*place, 0)].write(data.transpose()).result()
            return data.size, {}

        numbers = [self.first + place for place in self.items]
        return run_journalled(self.out.work / "journal", numbers, work)


def _open(scale: Scale, out: Target) -> Any:
    import tensorstore as ts

    try:
        return ts.open(ts.Spec(scale.spec(out)), open=True, create=True).result()
    except ValueError as error:
        # Another volume's metadata were refused before; this may be a full disk.
        raise InputError(f"{out.text}: {first_line(error)}") from None


def _claim(
    levels: Sequence[Volume], scales: Sequence[Scale], out: Target, version: str, overwrite: bool
) -> Target:
    """Make the target ours: empty, or an export of the same volume."""
    described = [volume.describe() for volume in levels]
    placed = [{k: v for k, v in d.items() if k not in _NAMES} for d in described]
    key = digest([placed, [scale.to_dict() for scale in scales]], version)
    # The key of earlier releases, which held the path.
    pairs = zip(described, scales, strict=True)
    earlier = digest([[volume, scale.to_dict()] for volume, scale in pairs], version)
    names = out.names()
    recorded = None
    if names:
        recorded = _document(out, MARK)
        # A start or a deletion that was interrupted leaves only this folder.
        begun = names == {FOLDER}
        if overwrite:
            if recorded is None and "scales" not in (_document(out, "info") or {}) and not begun:
                raise InputError(
                    f"{out.text} is not empty and no precomputed volume; it is left alone"
                )
            out.clear()
            recorded = None
        elif recorded is None and not begun:
            raise InputError(f"{out.text} is not empty; choose another folder, or use --overwrite")
        elif recorded is not None:
            changed = None
            if content := recorded.get("content"):
                changed = difference(levels[0], Content.model_validate(content))
            if recorded["key"] not in (key, earlier) or changed:
                raise InputError(
                    f"{out.text} is an export of another volume or version"
                    f"{f' ({levels[0].name}: {changed})' if changed else ''}; use --overwrite to "
                    "replace it"
                )
    # A version stands for the content.
    content = None if version else read_content(levels[0]).model_dump(mode="json")
    record = {"key": key, "source": levels[0].name, "content": content, "version": version}
    return out.marked(recorded, record)


def _document(out: Target, key: str) -> dict[str, Any] | None:
    """Return a document of the target; None if there is none, or it is damaged."""
    try:
        document = parse_json(out.read(key) or b"")
    except (ValueError, InputError):
        return None
    return document if isinstance(document, dict) else None


def _box(stored: Sequence[int], chunk: Sequence[int]) -> Triple:
    """Return whole chunks that cover a stored chunk, so that each is read once if it fits."""
    box = [c * -(-s // c) for s, c in zip(stored, chunk, strict=True)]
    while math.prod(box) > _MOST_VOXELS and list(box) != list(chunk):
        axis = max(range(3), key=lambda d: box[d] // chunk[d])
        box[axis] = chunk[axis] * -(-box[axis] // (2 * chunk[axis]))
    return triple(box)


def _shard(shape: Sequence[int], chunk: Sequence[int]) -> tuple[Triple, dict[str, Any]]:
    """Return the box of a shard in voxels, and the specification of shards."""
    grid = [-(-n // c) for n, c in zip(shape, chunk, strict=True)]
    needed = [(n - 1).bit_length() for n in grid]
    # Axes of the bits of the compressed Morton code, lowest first: x, y, z while they have some.
    axes = [axis for bit in range(max(needed)) for axis in (2, 1, 0) if bit < needed[axis]]
    most = max(0, (_MOST_IN_SHARD // math.prod(chunk)).bit_length() - 1)
    inside = axes[:most]
    box = triple(c << inside.count(axis) for axis, c in enumerate(chunk))
    preshift = min(len(inside), _MINISHARD_BITS)
    return box, {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": "identity",
        "preshift_bits": preshift,
        "minishard_bits": len(inside) - preshift,
        "shard_bits": len(axes) - len(inside),
        "minishard_index_encoding": "gzip",
        "data_encoding": "gzip",
    }


def number(value: float) -> str:
    """Return a number as text, whole ones without a point."""
    return str(int(value)) if value == int(value) else str(value)


def _nm(values: Any, unit: str) -> tuple[float, float, float]:
    z, y, x = (int(v) / PER_NANOMETRE[unit] for v in values)
    return z, y, x
