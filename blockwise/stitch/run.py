"""The stitch: from fragments and sidecars of a run to one segmentation, on dask.

Steps, each with a key made from all that its output depends on, skipped if that output is there:

1. ``contacts``: evidence of leaf superblocks (``contacts/``);
2. ``agglomerate``: exact agglomeration, superblocks joined two by two (``agglomeration/``);
3. ``lut``: segments of the dendrogram cut at the margin, up and down the same tree (``lut/``);
4. ``relabel``: ``data.zarr/segmentation/s0``, by batches of blocks, journalled by block;
5. ``pyramid``: ``s1``, ``s2``, ... and the OME-NGFF metadata, journalled by chunk.

No process holds the whole graph or the whole id map. The result depends on fragments, evidence and
thresholds alone, not on superblocks or workers. After a crash anywhere, running again ends in the
same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from distributed import Client
from distributed.comm import CommClosedError
from numpy.typing import NDArray

from agq.blockwise.blocks import sidecar as sidecar_module
from agq.blockwise.journal.records import STATE_RANK
from agq.blockwise.stitch.cluster import local_client
from agq.blockwise.stitch.evidence import contacts as contacts_module
from agq.blockwise.stitch.files import StitchFiles, groups, leaf_shape
from agq.blockwise.stitch.output.write import Writer
from agq.blockwise.stitch.segments.ids import cut_superblocks, map_leaves, name_superblocks
from agq.blockwise.stitch.segments.table import write_segments
from agq.blockwise.stitch.spec import StitchReport, StitchSpec, find_blocks
from agq.blockwise.stitch.steps import (
    Progress,
    Step,
    StitchError,
    cores,
    digest,
    run_tasks,
    wait_for_stragglers,
)
from agq.blockwise.stitch.superblocks import Superblock, SuperblockTree
from agq.blockwise.stitch.tasks import collect_leaves, contract_superblocks
from agq.blockwise.storage.files import write_atomic
from agq.blockwise.storage.npz import save_array
from agq.errors import InputError

__all__ = [
    "Progress",
    "StitchError",
    "StitchReport",
    "StitchSpec",
    "find_blocks",
    "local_client",
    "run_stitch",
]

ALGORITHM_VERSION = 3
"""Raised whenever the same evidence would give another segmentation or other bytes."""

_DONE = STATE_RANK["done"]
_SKIPPED = STATE_RANK["skipped"]
_TASKS_PER_CORE = 8
"""Of each level: enough to keep workers busy to the end, few enough for the scheduler."""

_MOST_LEAVES = 50_000
"""So that no step has more than about 10^5 tasks, and no folder more than that many files."""

Family = tuple[Superblock, Sequence[Any]]
"""A superblock with its children, or a leaf with its block numbers."""


def run_stitch(
    spec: StitchSpec,
    client: Client,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> StitchReport:
    """Stitch the fragments of a run.

    Parameters
    ----------
    spec
        What to stitch.
    client
        Dask client; its workers must see the run folder under the same path.
    on_progress
        Called with the name of the step, items done, and items in all.
    on_note
        Called with a line about what an earlier stitch left to do.

    Raises
    ------
    InputError
        If blocks failed or are missing (unless allowed), or files of the run do not fit.
    StitchError
        If blocks could not be relabelled, or workers kept dying. Running again does the rest.
    """
    try:
        return _Stitch(spec, client, on_progress, on_note).run()
    except CommClosedError as error:
        raise StitchError(f"lost the dask scheduler ({error})") from None


class _Stitch:
    def __init__(
        self,
        spec: StitchSpec,
        client: Client,
        on_progress: Progress | None,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self.spec = spec
        self.client = client
        self.on_progress = on_progress
        self.on_note = on_note
        self.grid = spec.block_grid()
        self.run_dir = spec.run_dir
        self.files = StitchFiles(spec.run_dir)
        self.report = StitchReport()
        self.writer = Writer(spec, client, on_progress, self.report)
        self.leaves: list[Family] = []
        self.levels: list[list[Family]] = []

    def run(self) -> StitchReport:
        spec = self.spec
        thresholds = spec.thresholds()
        wait_for_stragglers(self.client, spec.run_dir, self.on_note)
        numbers, key = self._blocks()
        key = digest(key, spec.evidence != "affinity")
        done = self._collect(numbers, key)
        done = self._agglomerate(done)
        self._number(done)
        rule = [*thresholds.half_units, thresholds.margin_half_units]
        key = digest(key, spec.evidence, rule, spec.min_contact, spec.segment_ids, spec.min_size)
        maps = [(self.files.map(leaf), blocks) for leaf, blocks in self.leaves]
        key = self.writer.relabel(maps, key)
        self.writer.pyramid(numbers, key)
        return self.report

    def _blocks(self) -> tuple[NDArray[np.int64], str]:
        """Return the blocks to stitch, and a digest of what predict wrote for them."""
        selected, ranks, journal = find_blocks(self.spec)
        self.report.skipped = int((ranks == _SKIPPED).sum())
        self.report.missing = int((ranks < _SKIPPED).sum())
        numbers = selected[ranks == _DONE]
        self.report.blocks = len(numbers)
        rows = journal.rows
        rows = rows[np.argsort(rows["block"])]
        sums = rows["digest"][np.searchsorted(rows["block"], numbers)]
        return numbers, digest(
            [ALGORITHM_VERSION, contacts_module.FORMAT_VERSION, sidecar_module.FORMAT_VERSION],
            self.grid.to_dict(),
            numbers.tobytes(),
            np.ascontiguousarray(sums).tobytes(),
        )

    def _collect(self, numbers: NDArray[np.int64], key: str) -> str:
        """Collect the evidence; return the key of the result."""
        files, spec = self.files, self.spec
        layout = files.contacts / "layout.json"
        shape = self._leaf_shape(len(numbers), key)
        tree = SuperblockTree(self.grid.shape, shape)
        self.leaves = [(leaf, blocks.tolist()) for leaf, blocks in tree.leaves(numbers)]
        if len(self.leaves) > _MOST_LEAVES:
            raise InputError(
                f"stitch.superblock: {shape} blocks cut {len(numbers)} blocks into"
                f" {len(self.leaves)} superblocks, more than {_MOST_LEAVES}; "
                + ("choose larger ones" if spec.superblock else "name a larger stitch.superblock")
            )
        step = Step(self.client, self.run_dir, "contacts", digest(key, shape), [files.contacts])
        result = step.finished()
        parents = tree.levels([leaf for leaf, _ in self.leaves])
        self.levels = [self.leaves]
        self.levels += [list(level.items()) for level in parents]
        if result is None:
            write_atomic(layout, json.dumps({"key": key, "shape": shape}).encode())
            present = np.zeros(self.grid.n_blocks, bool)
            present[numbers] = True
            save_array(files.present, present)
            overlap = spec.evidence != "affinity"
            counts = self._tasks("contacts", self.leaves, collect_leaves, spec.grid, overlap)
            fragments, contacts = (sum(column) for column in zip((0, 0), *counts, strict=True))
            result = step.finish({"fragments": fragments, "contacts": contacts})
        self.report.fragments, self.report.contacts = result["fragments"], result["contacts"]
        return self._end(step)

    def _leaf_shape(self, blocks: int, key: str) -> tuple[int, int, int]:
        """Return the blocks of a leaf: as asked for, as begun, or what keeps the workers busy."""
        if self.spec.superblock is not None:
            return self.spec.superblock
        try:
            begun = json.loads((self.files.contacts / "layout.json").read_bytes())
        except FileNotFoundError:
            begun = {}
        if begun.get("key") == key:
            z, y, x = begun["shape"]
            return z, y, x
        return leaf_shape(self.grid.shape, blocks, cores(self.client), self.spec.batch_blocks)

    def _agglomerate(self, key: str) -> str:
        """Merge down to the lowest margin in use; return the key of the result."""
        spec, files = self.spec, self.files
        thresholds = spec.thresholds()
        key = digest(key, spec.evidence, thresholds.half_units, spec.min_contact)
        wanted = thresholds.margin_half_units
        known = Step.read(self.run_dir, "agglomerate")
        floor = known.get("result", {}).get("floor", wanted + 1)
        if floor > wanted or known["key"] != digest(key, floor):
            floor = min(wanted, spec.thresholds(spec.margin_floor).margin_half_units)
        step = Step(
            self.client, self.run_dir, "agglomerate", digest(key, floor), [files.agglomeration]
        )
        if step.finished() is not None:
            if wanted > floor:
                self._note("margin: the stored merges are cut again, without merging anew")
        else:
            if known.get("done") and "contacts" in self.report.reused:
                same = known["result"].get("rule") == key
                self._note(
                    f"{'margin below that of the stored merges' if same else 'rule changed'}:"
                    " merging again, from the stored contacts; no voxel is read for it"
                    + ("" if same else " (stitch.margin alone would only cut the stored merges)")
                )
            at_floor = spec.thresholds(floor / contacts_module.HALF_UNITS)
            for i, level in enumerate(self.levels):
                name = f"agglomerate {i + 1}/{len(self.levels)}"
                self._tasks(name, level, contract_superblocks, at_floor)
            # The residual graphs have served; the merges are the result.
            for graph in files.agglomeration.glob("*/*.graph.npz"):
                graph.unlink()
            step.finish({"floor": floor, "rule": key})
        self._cut = wanted - floor
        return self._end(step)

    def _number(self, key: str) -> None:
        """Name the segments and write the id map."""
        spec, files = self.spec, self.files
        step = Step(
            self.client,
            self.run_dir,
            "lut",
            digest(key, self._cut, spec.segment_ids, spec.min_size),
            [files.lut],
        )
        result = step.finished()
        if result is None:
            top = len(self.levels)
            for i, level in enumerate(self.levels):
                self._tasks(f"lut up {i + 1}/{top}", level, cut_superblocks, self._cut)
            for i, level in enumerate(reversed(self.levels)):
                self._tasks(f"lut down {i + 1}/{top}", level, name_superblocks, spec.min_size)
            leaves = [leaf for leaf, _ in self.leaves]
            result = run_tasks(
                self.client,
                self.run_dir,
                "lut segments",
                write_segments,
                [(str(self.run_dir), spec.segment_ids, leaves)],
                [1],
                self.on_progress,
            )[0]
            self._tasks("lut map", self.leaves, map_leaves, spec.segment_ids)
            for folder in ("cut", "names"):
                shutil.rmtree(files.lut / folder, ignore_errors=True)
            step.finish(result)
        report = self.report
        for name in ("segments", "small_segments", "small_voxels", "largest"):
            setattr(report, name, result[name])
        report.merges = report.fragments - report.segments - report.small_segments
        self._end(step)

    def _tasks(
        self, name: str, items: Sequence[Family], function: Callable[..., Any], *arguments: Any
    ) -> list[Any]:
        """Run ``function(run_dir, *arguments, items)`` on parts of the items."""
        weights = np.array([len(members) for _, members in items], np.int64)
        parts = groups(weights, _TASKS_PER_CORE * cores(self.client))
        return run_tasks(
            self.client,
            self.run_dir,
            name,
            function,
            [(str(self.run_dir), *arguments, items[part]) for part in parts],
            [int(weights[part].sum()) for part in parts],
            self.on_progress,
        )

    def _note(self, text: str) -> None:
        if self.on_note is not None:
            self.on_note(text)

    def _end(self, step: Step) -> str:
        self.report.end(step)
        return step.key
