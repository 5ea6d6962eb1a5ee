"""Which blocks hold the segments of a shard, as sorted tables of many blocks each.

A shard's segments lie in a few of all blocks. With these tables a task that makes a shard opens
one file for `GROUP` blocks, and then only the files of blocks that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from agq.blockwise.export.meshes.encode import shard_of
from agq.blockwise.export.meshes.fragments import BlockFragments
from agq.blockwise.export.rows import Rows, starts_of
from agq.blockwise.storage.arrays import map_array, save_array

GROUP = 512
"""Blocks of a table."""

_ENTRY = np.dtype(
    [
        ("shard", np.int64),
        ("segment", np.uint64),
        ("block", np.int64),
        ("row", np.int64),
        ("voxels", np.int64),
        ("faces", np.int64),
    ]
)

Entries = Rows
"""Places of fragments: shard and segment, block and row in its file, voxels and triangles."""


def write_index(path: Path, blocks: Iterable[tuple[int, Path]], shard_bits: int) -> None:
    """Write the table of some blocks.

    Parameters
    ----------
    path
        Of the table.
    blocks
        Numbers of blocks, ascending, and the files of their fragments.
    shard_bits
        Bits of the number of a shard.
    """
    parts = [np.zeros(0, _ENTRY)]
    for number, file in blocks:
        found = BlockFragments(file)
        part = np.zeros(len(found.segments), _ENTRY)
        part["shard"] = shard_of(found.segments, shard_bits)
        part["segment"], part["block"] = found.segments, number
        part["row"] = np.arange(len(part))
        part["voxels"], part["faces"] = found.voxels, found.faces
        parts.append(part)
    entries = np.concatenate(parts)
    save_array(path, entries[np.lexsort([entries["segment"], entries["shard"]])])


def read_index(tables: Iterable[Path], shards: Sequence[int]) -> dict[int, Entries]:
    """Return the entries of each shard, by segment, then block.

    Parameters
    ----------
    tables
        In the order of their blocks.
    shards
        Numbers of shards.
    """
    parts: dict[int, list[Entries]] = {shard: [np.zeros(0, _ENTRY)] for shard in shards}
    for path in tables:
        entries = map_array(path)
        known = np.asarray(entries["shard"])
        for shard in shards:
            first, end = np.searchsorted(known, [shard, shard + 1])
            parts[shard].append(np.array(entries[first:end]))
    return {shard: _by_segment(np.concatenate(found)) for shard, found in parts.items()}


def segments_of(entries: Entries) -> Iterator[tuple[int, Entries]]:
    """Yield each segment of a shard with its entries."""
    for some in np.split(entries, starts_of(entries)[1:]) if len(entries) else ():
        yield int(some["segment"][0]), some


def _by_segment(entries: Entries) -> Entries:
    return entries[np.argsort(entries["segment"], kind="stable")]
