"""The stitch: from fragments and sidecars of a run to one segmentation.

Steps, each with a key made from all that its output depends on, skipped if that output exists:

1. ``contacts``: evidence of leaf superblocks (``contacts/``); for fragments of another model, which
   of these hold pieces of one (:mod:`names`); and, where there are classes, ``classes``: voxels of
   each class in their fragments (``classes/``);
2. ``agglomerate``: exact agglomeration, superblocks joined two by two (``agglomeration/``);
3. ``lut``: segments of the dendrogram cut at the margin, up and down the same tree (``lut/``);
4. ``relabel``: ``data.zarr/segmentation/s0`` and the levels over it that fit into boxes of blocks,
   box by box, journalled by block;
5. ``pyramid``: the other levels, each made of the one below, journalled by file; the OME-NGFF
   metadata.

No process holds the whole graph or the whole id map. The result depends on fragments, evidence and
thresholds alone, not on superblocks or workers. After a crash anywhere, running again ends in the
same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from agq.blockwise.blocks import sidecar as sidecar_module
from agq.blockwise.blocks.grid import BlockGrid, GridSpec
from agq.blockwise.blocks.overlay import require_overlap
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.journal.snapshot import SnapshotError
from agq.blockwise.stitch import contacts as contacts_module
from agq.blockwise.stitch.classes import ClassRule, Count, ShareCounts
from agq.blockwise.stitch.contacts import Collect, PackSidecars
from agq.blockwise.stitch.edits import (
    Constraints,
    Edit,
    constrain,
    find_fragments,
    read_edits,
    require_classes,
    same_fragments,
)
from agq.blockwise.stitch.import_fragments import is_import
from agq.blockwise.stitch.kept_ids import Before, FindChanged, WriteChanged, largest_id
from agq.blockwise.stitch.merge.agglomeration import Merge
from agq.blockwise.stitch.names import FindShared, ListNames, ranges_of
from agq.blockwise.stitch.output.boxes import Coarsen, Relabel
from agq.blockwise.stitch.output.pyramid import Pass, Pyramid
from agq.blockwise.stitch.segments import (
    Cut,
    LeafSegments,
    Map,
    Resolve,
    SortSegments,
    WriteSegments,
    plan_ranges,
)
from agq.blockwise.stitch.settings import (
    Downsampling,
    MergeSettings,
    OutputType,
    Thresholds,
    exact,
)
from agq.blockwise.stitch.steps import Step, digest
from agq.blockwise.stitch.superblocks import (
    MOST_LEAVES,
    Families,
    StitchFiles,
    SuperblockTask,
    SuperblockTree,
    doubled,
    leaf_shape,
)
from agq.blockwise.stitch.workers import (
    AnyClient,
    Progress,
    StitchError,
    Task,
    Workers,
    workers_of,
)
from agq.blockwise.storage.arrays import save_array
from agq.blockwise.storage.files import make_folder, require_folder, write_atomic
from agq.blockwise.volumes.content import read_content
from agq.blockwise.volumes.create import open_array
from agq.blockwise.volumes.open import open_volume
from agq.blockwise.volumes.triples import Triple, checked_triple, triple
from agq.errors import DamagedError, InputError, repairable
from agq.reading import read_file, read_record
from agq.tables import Tabled

if TYPE_CHECKING:
    from rich.text import Text

ALGORITHM_VERSION = 4
"""Raised whenever the same evidence would give another segmentation."""

_LAYOUT = 2
"""Raised whenever the same segmentation would lie in other files: 1 was a chunk a file."""

_TASKS_PER_CORE = 8
"""Of each level: enough to keep workers busy to the end, few enough for the scheduler."""

_NAMED = 10  # blocks listed in an error

_FRAGMENTS = "fragments"
_SEGMENTATION = "segmentation"
_METADATA = "zarr.json"


class StitchSpec(MergeSettings, GridSpec):
    """Fragments to stitch, and how; goes to JSON and back."""

    run_dir: Path
    """Run folder, after predict."""

    start: tuple[int, int, int] | None = None
    """First voxel (z, y, x) of a box: its blocks are stitched. None: the whole volume."""

    stop: tuple[int, int, int] | None = None
    """One past the last voxel of that box."""

    classes: dict[str, Any] | None = None
    """Keyword arguments of `volumes.open.open_volume` for the volume of classes; None: there are
    none."""

    levels: PositiveInt | None = None
    """Most levels of the pyramid, the full one included; None: down to one chunk."""

    downsampling: Downsampling = "majority"
    """How its coarse voxels are chosen (`stitch.output.pyramid`)."""

    dtype: OutputType = "auto"
    """Type of the segmentation."""

    batch_blocks: PositiveInt = 512
    """Most blocks per task. The result does not depend on it."""

    def thresholds(self, margin: float | None = None) -> Thresholds:
        """Return the rule for merging, at the margin of this stitch or at another.

        Raises
        ------
        InputError
            If overlaps are asked for and blocks do not overlap.
        """
        if self.evidence != "affinity":
            grid = self.block_grid()
            for axis, blocks in zip("zyx", range(3), strict=True):
                if grid.shape[blocks] > 1 and not grid.before[blocks] + grid.after[blocks]:
                    raise InputError(
                        f"stitch.evidence: {self.evidence} needs blocks that overlap, but these"
                        f" have no context on {axis} (blocks.before, blocks.after); use affinity"
                    )
        values = self.model_dump(include=set(Thresholds.model_fields))
        return Thresholds(**values | ({} if margin is None else {"margin": margin}))

    def class_rule(self) -> ClassRule | None:
        """Return which fragments may not merge; None without classes."""
        return ClassRule.of(self) if self.classes else None


@dataclass
class StitchReport(Tabled):
    """Counts and times of a stitch.

    Attributes
    ----------
    blocks, skipped, missing
        Blocks with fragments, blocks skipped by predict, and blocks left out because they failed
        or were never done (only with ``allow_missing``).
    fragments, contacts, merges, segments
        Counts; contacts are distinct pairs of fragments, or of their pieces in blocks.
    classed, several_classes, forbidden_contacts
        With `input.classes`: fragments with a class; those that hold several which may not merge;
        contacts between fragments whose classes may not merge.
    edits
        With `stitch.edits`: ``sha256`` of the file, its ``merges`` and ``splits``.
    ids
        With ids that stay: how many segments ``kept`` theirs, how many have ``new`` ones, the
        largest ever given (``most``), and what became of some that ``changed``.
    small_segments, small_voxels
        Segments below ``min_size``, now background.
    largest
        The largest segments: ``id``, ``voxels``, ``fragments``. A merger shows here first.
    levels
        Levels of the pyramid.
    seconds
        Wall time of each step.
    reused
        Steps whose output existed already.
    """

    blocks: int = 0
    skipped: int = 0
    missing: int = 0
    fragments: int = 0
    contacts: int = 0
    classed: int = 0
    several_classes: int = 0
    forbidden_contacts: int = 0
    edits: dict[str, Any] | None = None
    merges: int = 0
    segments: int = 0
    ids: dict[str, Any] | None = None
    small_segments: int = 0
    small_voxels: int = 0
    largest: list[dict[str, int]] = field(default_factory=list)
    levels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def end(self, step: Step) -> None:
        """Note that a step is over."""
        self.seconds[step.name] = round(time.monotonic() - step.begun, 3)
        if step.reused:
            self.reused.append(step.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)

    def facts(self) -> list[tuple[str, str]]:
        """Return the counts by name; a merger shows among the largest segments first."""
        rows = [
            ("fragments", f"{self.fragments:,} in {self.blocks:,} blocks"),
            ("segments", f"{self.segments:,} after {self.merges:,} merges"),
        ]
        if self.classed:
            several = f"; {self.several_classes:,} hold several" if self.several_classes else ""
            rows += [
                ("fragments with a class", f"{self.classed:,}{several}"),
                ("contacts kept apart", f"{self.forbidden_contacts:,} by their classes"),
            ]
        if self.edits:
            counts = [(self.edits[name], name) for name in ("merges", "splits")]
            told = (f"{count:,} {name[: -1 if count == 1 else None]}" for count, name in counts)
            rows.append(("edits", ", ".join(told)))
        if self.ids:
            rows.append(("ids", f"{self.ids['kept']:,} as before, {self.ids['new']:,} new"))
            if changed := self.ids.get("changed"):
                rows.append(("changed ids", "\n".join(map(_told, changed))))
        if self.small_segments:
            small = f"{self.small_segments:,} of {self.small_voxels:,} voxels, now background"
            rows.append(("small segments", small))
        if self.missing:
            rows.append(("missing blocks", f"{self.missing:,} (background)"))
        largest = "\n".join(
            f"{s['id']}: {s['voxels']:,} voxels, {s['fragments']:,} fragment"
            + "s" * (s["fragments"] > 1)
            for s in self.largest
        )
        return [*rows, ("largest", largest)]

    def table(self, segmentation: Path | None = None) -> Text:
        """Return the report for a rich console, with the place of the segmentation if given."""
        from agq.terminal import facts

        rows, title = self.facts(), "Stitch"
        if self.reused:
            rows.append(("kept from before", ", ".join(self.reused)))
        if segmentation is not None:
            rows.append(("segmentation", str(segmentation)))
            title += f" of {segmentation.parents[1].name}"
        return facts(title, rows)


def _told(change: dict[str, Any]) -> str:
    """Return what became of an id; 0 is background."""
    more = ", ..." if change["into"] > len(change["after"]) else ""
    return f"{change['before']} -> {', '.join(map(str, change['after']))}{more}"


def find_blocks(
    spec: StitchSpec,
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint64]]:
    """Find the blocks of the ROI and how their prediction ended.

    Quick, and without dask: callers check with it whether a cluster is worth starting.

    Returns
    -------
    selected
        Block numbers, int64.
    ranks
        State of each, as in :class:`agq.blockwise.journal.records.BlockState`.
    digests
        Of the checksums of what was written for each.

    Raises
    ------
    InputError
        If the ROI holds no block, the journal is another grid's, or blocks failed or are missing
        and the spec does not allow that.
    """
    grid = spec.block_grid()
    selected = grid.select(spec.start or (0, 0, 0), spec.stop or grid.volume_shape)
    if not len(selected):
        raise InputError("stitch: the ROI holds no block of the volume")
    try:
        ranks, digests = _how_ended(spec, grid, selected, lazy=True)
    except SnapshotError:
        ranks, digests = _how_ended(spec, grid, selected, lazy=False)
    bad = selected[ranks < BlockState.SKIPPED]
    if len(bad) and not spec.allow_missing:
        failed = int((ranks == BlockState.FAILED).sum())
        named = ", ".join(str(number) for number in bad[:_NAMED])
        raise InputError(
            f"stitch: of {len(selected)} blocks {failed} failed and {len(bad) - failed} are"
            f" missing (block {named}{', ...' if len(bad) > _NAMED else ''}): predict again,"
            " or leave them background with --allow-missing"
        )
    return selected, ranks, digests


def _how_ended(
    spec: StitchSpec, grid: BlockGrid, selected: NDArray[np.int64], *, lazy: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    journal = Journal(spec.run_dir / "journal" / "predict", lazy=lazy)
    journal.require_grid(grid.n_blocks)
    return journal.ranks(selected), journal.digests(selected)


def run_stitch(
    spec: StitchSpec,
    client: AnyClient,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
    *,
    wait_s: float = 300.0,
) -> StitchReport:
    """Stitch the fragments of a run.

    Parameters
    ----------
    spec
        What to stitch.
    client
        Dask client; its workers must see the run folder under the same path. None: this process
        does it, one task after the other.
    on_progress
        Called with the name of the step, items done, and items in all.
    on_note
        Called with a line about what an earlier stitch left to do, or what is waited for.
    wait_s
        Seconds without any worker after which a scheduler of one's own is given up.

    Raises
    ------
    InputError
        If blocks failed or are missing (unless allowed), or files of the run do not fit.
    StitchError
        If blocks could not be relabelled, or workers kept dying. Running again does the rest.
    RunGoneError
        If the run folder is moved away meanwhile.
    """
    workers = workers_of(client, spec.run_dir, on_progress, on_note, wait_s)
    try:
        return _Stitch(spec, workers, on_note).run()
    except DamagedError as error:
        require_folder(spec.run_dir)
        raise repairable(error, spec.run_dir) from None
    except (OSError, InputError, StitchError):
        # Whatever was not found in it: it may be the folder itself that has gone.
        require_folder(spec.run_dir)
        raise
    finally:
        workers.close()


def _of_ids(key: str, before: Before | None) -> str:
    """Return the key of an id map whose ids may be those of another."""
    return key if before is None else digest(key, before.key)


class _Stitch:
    def __init__(
        self,
        spec: StitchSpec,
        workers: Workers,
        on_note: Callable[[str], None] | None,
    ) -> None:
        self.spec = spec
        self.workers = workers
        self.note = on_note or (lambda text: None)
        self.grid = spec.block_grid()
        self.run_dir = spec.run_dir
        self.files = StitchFiles(spec.run_dir)
        self.container = spec.run_dir / "data.zarr"
        self.journals = spec.run_dir / "journal"
        self.pyramid = Pyramid.planned(
            self.container, _SEGMENTATION, self.grid, self._fragments_unit(), spec.levels
        )
        self.report = StitchReport()
        self.edits: list[Edit] = []
        self.edited_names: dict[int, int] = {}
        self.constraints: Constraints | None = None
        self.leaf_shape: Triple = (1, 1, 1)
        self.leaves: Families
        self.levels: list[Families] = []

    def run(self) -> StitchReport:
        spec = self.spec
        thresholds = spec.thresholds()
        self.workers.wait_for_stragglers()
        numbers, blocks = self._blocks()
        edits = self._read_edits(numbers)
        key = digest(blocks, spec.evidence != "affinity")
        contacts = self._collect(numbers, key)
        classes = self._count_classes(blocks)
        decided = [*classes, *edits]
        merges = self._agglomerate(digest(contacts, *decided) if decided else contacts)
        before = self._number(blocks, *merges)
        # What follows does not depend on the superblocks.
        rule = [*map(str, thresholds.exact), *thresholds.pooling, *decided]
        key = digest(key, spec.evidence, rule, spec.min_contact, spec.segment_ids, spec.min_size)
        if before is not None:
            key = digest(key, before.key)
        self._write(numbers, digest(key, _LAYOUT))
        return self.report

    def _fragments_unit(self) -> str:
        """Return the world unit of the fragments; refuse those of another grid."""
        array = open_array(self.container, _FRAGMENTS, "r")
        if array.shape != self.grid.volume_shape or array.chunks != self.grid.write_shape:
            raise InputError(
                f"{self.container / _FRAGMENTS}: shape {array.shape} in chunks {array.chunks} is"
                f" not that of the block grid, {self.grid.volume_shape} in {self.grid.write_shape}"
            )
        units: Any = array.attrs["units"]
        return str(units[0])

    def _blocks(self) -> tuple[NDArray[np.int64], str]:
        """Return the blocks to stitch, and a digest of what predict wrote for them."""
        selected, ranks, digests = find_blocks(self.spec)
        self.report.skipped = int((ranks == BlockState.SKIPPED).sum())
        self.report.missing = int((ranks < BlockState.SKIPPED).sum())
        done = ranks == BlockState.DONE
        numbers = selected[done]
        self.report.blocks = len(numbers)
        return numbers, digest(
            [ALGORITHM_VERSION, contacts_module.FORMAT_VERSION, sidecar_module.FORMAT_VERSION],
            # Only such fragments have names.
            *(["names"] if is_import(self.run_dir) else []),
            self.grid.to_dict(),
            numbers.data,
            digests[done].data,
        )

    def _read_edits(self, numbers: NDArray[np.int64]) -> list[str]:
        """Find what edits ask for; return what differs for other edits, [] if there is nothing."""
        path = self.spec.edits
        if path is None:
            return []
        edits = read_edits(path)
        unit = self._fragments_unit()
        self.edits = find_fragments(path, edits, self.container, self.grid, numbers, unit)
        if is_import(self.run_dir):
            self.edits, self.edited_names = same_fragments(self.run_dir, self.edits)
        constraints = constrain(path, self.edits)
        merges = sum(edit.merges for edit in edits)
        self.report.edits = {
            "sha256": hashlib.sha256(read_file(path)).hexdigest(),
            "merges": merges,
            "splits": len(edits) - merges,
        }
        if not constraints:
            return []
        self.constraints = constraints
        return [constraints.key]

    def _collect(self, numbers: NDArray[np.int64], key: str) -> str:
        """Find the evidence; return the key of the step."""
        files, spec = self.files, self.spec
        self._cut(numbers, key)
        shape = self.leaf_shape
        step = Step(self.workers, "contacts", digest(key, shape), [files.contacts])
        result = step.finished()
        if result is None:
            layout = json.dumps({"key": key, "shape": shape}).encode()
            write_atomic(files.contacts / "layout.json", layout)
            present = np.zeros(self.grid.n_blocks, bool)
            present[numbers] = True
            save_array(files.present, present)
            overlap = spec.evidence != "affinity"
            collect = Collect(self.leaves, self.run_dir, self.grid, overlap)
            counts = self._split_and_run("contacts", collect)
            fragments, contacts, named = map(sum, zip((0, 0, 0), *counts, strict=True))
            if named:
                fragments = self._find_shared()
            result = {"fragments": fragments, "contacts": contacts}
            step.finish(result, [files.contacts])
        self._pack_sidecars()
        self.report.fragments, self.report.contacts = result["fragments"], result["contacts"]
        self.report.end(step)
        return step.key

    def _cut(self, numbers: NDArray[np.int64], key: str) -> None:
        """Choose the leaves: as asked for, as begun, or what keeps the workers busy."""
        asked, grid = self.spec.superblock, self.grid.shape
        shape = asked or self._begun(key)
        chosen = shape or leaf_shape(grid, len(numbers), self.workers.cores, self.spec.batch_blocks)
        tree = SuperblockTree(grid, chosen)
        leaves = tree.leaves(numbers)
        while shape is None and len(leaves) > MOST_LEAVES:
            tree = replace(tree, leaf_shape=doubled(tree.leaf_shape, grid))
            leaves = tree.leaves(numbers)
        if len(leaves) > MOST_LEAVES:
            raise InputError(
                f"stitch.superblock: {tree.leaf_shape} blocks cut {len(numbers)} blocks into"
                f" {len(leaves)} superblocks, more than {MOST_LEAVES}; choose larger ones, or none"
            )
        self.leaf_shape, self.leaves = tree.leaf_shape, leaves
        self.levels = [leaves, *tree.levels(leaves)]

    def _find_shared(self) -> int:
        """Find the names that several leaves hold; return how many names there are."""
        lists = self._split_and_run("contacts names", ListNames(self.leaves, self.run_dir))
        every = list(itertools.chain.from_iterable(lists))
        ranges = ranges_of([some for _, some in every], sum(count for count, _ in every))
        tasks = [FindShared([one], self.run_dir) for one in ranges]
        names = sum(self.workers.run("contacts shared", tasks))
        shutil.rmtree(self.files.name_lists)
        return names

    def _pack_sidecars(self) -> None:
        """Pack what has been collected: a file for each block is the largest part of a run's."""
        folders = sorted((self.run_dir / "sidecars").glob("[0-9]*/"))
        if not folders:
            return
        batches = self.workers.batches(folders, 1, share=1)
        self.workers.run("contacts packed", [PackSidecars(batch) for batch in batches])

    def _count_classes(self, blocks: str) -> list[Any]:
        """Count classes by fragment; return what decides which may merge, [] without classes."""
        spec, files = self.spec, self.files
        if spec.classes is None:
            return []
        volume = open_volume(**spec.classes, kind="labels")
        require_overlap(volume, self.grid)
        # Not where it lies: a copy of the same classes is the same.
        placed = [list(map(int, v)) for v in (volume.shape, volume.voxel_size, volume.offset)]
        holds = [volume.unit, *placed, read_content(volume).model_dump()]
        step = Step(self.workers, "classes", digest(blocks, self.leaf_shape, holds), [files.counts])
        result = step.finished()
        if result is None:
            count = Count(self.leaves, self.run_dir, self.container, self.grid, volume)
            total = str(sum(self._split_and_run("classes", count)))
            shared = [ShareCounts([p], self.run_dir) for p in sorted(files.shared.glob("*.npy"))]
            if shared:
                self.workers.run("classes shared", shared)
            result = step.finish({"checksum": total}, [files.counts])
        self.report.end(step)
        table = sorted(sorted(pair) for pair in spec.classes_may_merge)
        return [result["checksum"], spec.class_share, table]

    def _begun(self, key: str) -> Triple | None:
        """Return the blocks of a leaf of the evidence that was begun with a key; None: none was."""
        try:
            begun = read_record(self.files.contacts / "layout.json")
        except (FileNotFoundError, DamagedError):
            return None
        if begun.get("key") != key:
            return None
        return checked_triple("superblock", begun.get("shape", ()), 1)

    def _agglomerate(self, key: str) -> tuple[str, Fraction]:
        """Merge down to the lowest margin in use.

        Returns
        -------
        str
            Key of the step.
        Fraction
            By how much the margin of this stitch lies above that one, in the units of the scores.
        """
        spec, files = self.spec, self.files
        thresholds = spec.thresholds()
        *rule, wanted = thresholds.exact
        key = digest(key, spec.evidence, [*map(str, rule), *thresholds.pooling], spec.min_contact)
        before = Step.read(self.run_dir, "agglomerate")
        stored = before.get("result", {}).get("floor")
        if stored is not None and before["key"] == digest(key, stored):
            floor = Fraction(stored)
        else:
            floor = wanted + 1
        if floor > wanted:
            floor = min(wanted, exact(spec.thresholds(spec.margin_floor).margin))
        at_floor = spec.thresholds(float(floor))
        step = Step(self.workers, "agglomerate", digest(key, str(floor)), [files.agglomeration])
        result = step.finished()
        if result is not None:
            if wanted > floor:
                self.note("margin: the stored merges are cut again, without merging anew")
        else:
            if before.get("done") and "contacts" in self.report.reused:
                same = before["result"].get("rule") == key
                self.note(
                    f"{'margin below that of the stored merges' if same else 'rule changed'}:"
                    " merging again, from the stored contacts; no voxel is read for it"
                    + ("" if same else " (stitch.margin alone would only cut the stored merges)")
                )
            # A missing table of a neighbour would look like one without contacts, or classes.
            for leaf in self.leaves.places():
                for file in (files.evidence(leaf), files.classes(leaf))[: 1 + bool(spec.classes)]:
                    if not file.exists():
                        raise repairable(f"{file}: file is missing", self.run_dir)
            self._save_constraints()
            counts = np.zeros(3, np.int64)
            for i, level in enumerate(self.levels, 1):
                edits = self.constraints is not None
                merge = Merge(level, self.run_dir, at_floor, spec.class_rule(), edits)
                counts += sum(self._split_and_run(f"agglomerate {i}/{len(self.levels)}", merge))
            # Only the merges are the result.
            for graph in files.agglomeration.glob("*/*.graph.npz"):
                graph.unlink()
            counted = {"classes": counts.tolist()} if spec.classes else {}
            result = step.finish(
                {"floor": str(floor), "rule": key, **counted}, [files.agglomeration]
            )
        report = self.report
        report.classed, report.several_classes, report.forbidden_contacts = result.get(
            "classes", (0, 0, 0)
        )
        self.report.end(step)
        return step.key, (wanted - floor) * at_floor.units

    def _save_constraints(self) -> None:
        """Write what edits ask for, where the tasks find it."""
        files, rule = self.files, self.spec.class_rule()
        if self.constraints is None:
            return
        if rule is not None:
            kinds = rule.read(files, self.leaves.places())
            assert self.spec.edits is not None
            require_classes(self.spec.edits, self.edits, kinds, self.edited_names)
        files.save(files.edits, self.constraints.arrays("edits"))

    def _before(self, blocks: str, key: str) -> Before | None:
        """Return the ids that stay, of the last stitch that differs from this one."""
        if self.spec.segment_ids != "keep":
            return None
        files = self.files
        kept, last = Before.read(files.before), Step.read(self.run_dir, "lut")
        if last.get("key") == _of_ids(key, kept):
            return kept
        moving = Before.read(files.lut)
        if moving is None and last.get("done") and files.segments.exists():
            result, grid = last["result"], self.grid.shape
            most = max(result.get("ids", {}).get("most", 0), largest_id(files.segments))
            shape = checked_triple("superblock", result.get("leaf", self.leaf_shape), 1)
            moving = Before(last["key"], most, result.get("blocks", ""), grid, shape)
        if moving is None:
            return kept
        moving.move(files)
        return moving

    def _number(self, blocks: str, key: str, margin: Fraction) -> Before | None:
        """Give numbers to the segments and write the id map; return those that stay."""
        spec, files = self.spec, self.files
        key = digest(key, str(margin), spec.segment_ids, spec.min_size)
        before = self._before(blocks, key)
        same = before if before is not None and before.blocks == blocks else None
        if before is not None and same is None:
            self.note(
                "stitch.segment_ids: the last stitch was of other blocks (or an earlier release"
                " made it), so that no id is kept; all are new, above those before"
            )
        step = Step(self.workers, "lut", _of_ids(key, before), [files.lut])
        result = step.finished()
        if result is None:
            top = len(self.levels)
            for i, level in enumerate(self.levels, 1):
                self._split_and_run(f"lut up {i}/{top}", Cut(level, self.run_dir, margin, same))
            begun: list[list[LeafSegments]] = []
            for i, level in enumerate(reversed(self.levels), 1):
                resolve = Resolve(level, self.run_dir, spec.min_size)
                begun = self._split_and_run(f"lut down {i}/{top}", resolve)
            result = self._write_segments(list(itertools.chain.from_iterable(begun)), before, same)
            self._split_and_run("lut map", Map(self.leaves, self.run_dir, spec.segment_ids))
            result |= {"blocks": blocks, "leaf": self.leaf_shape}
            if same is not None:
                self._split_and_run("lut changes", FindChanged(self.leaves, self.run_dir, same))
                changed = WriteChanged(self.leaves, self.run_dir)
                result["ids"]["changed"] = self.workers.run("lut changes", [changed])[0]
            for folder in ("cut", "names", "sorted", "changed"):
                shutil.rmtree(files.lut / folder, ignore_errors=True)
            step.finish(result, [files.lut])
        report = self.report
        for name in ("segments", "small_segments", "small_voxels", "largest"):
            setattr(report, name, result[name])
        report.ids = result.get("ids")
        report.merges = report.fragments - report.segments - report.small_segments
        report.end(step)
        return before

    def _write_segments(
        self, leaves: list[LeafSegments], before: Before | None, same: Before | None
    ) -> dict[str, Any]:
        """Write the table of the segments that begin in leaves; return what the step reports."""
        leaves.sort(key=lambda one: one.leaf)
        ranges = plan_ranges(leaves)
        count = sum(leaf.count for leaf in leaves)
        tasks = [SortSegments([one], self.run_dir) for one in ranges]
        self.workers.run("lut sort", tasks)
        table = WriteSegments(
            [bounds for bounds, _ in ranges],
            self.run_dir,
            self.spec.segment_ids,
            count,
            most=0 if before is None else before.most,
            comparable=same is not None,
        )
        return {
            **self.workers.run("lut segments", [table])[0],
            "segments": count,
            "small_segments": sum(leaf.small for leaf in leaves),
            "small_voxels": sum(leaf.small_voxels for leaf in leaves),
        }

    def _dtype(self) -> Literal["uint32", "uint64"]:
        """Return the type of the segmentation: a function of the ids that were given."""
        report, spec = self.report, self.spec
        largest = (report.ids or {}).get("most", report.segments)
        if spec.dtype == "auto" and spec.segment_ids != "fragment" and largest < 2**32:
            return "uint32"
        return "uint64"

    def _write(self, numbers: NDArray[np.int64], key: str) -> None:
        """Write all levels of the segmentation of some blocks, and their metadata."""
        self.pyramid = replace(self.pyramid, dtype=self._dtype())
        if self.pyramid.dtype != "uint64":
            key = digest(key, self.pyramid.dtype)
        relabelled, coarse = self.journals / "relabel", self.journals / "pyramid"
        group, pyramid, how = self.container / _SEGMENTATION, self.pyramid, self.spec.downsampling
        self._note_layout(group)
        # The coarse levels are made of the full one, so what says they are done goes with it.
        outputs = [group, relabelled, coarse]
        step = Step(self.workers, "relabel", key, outputs, later=["pyramid"])
        done = step.finished() is not None
        arrays = {level.name for level in pyramid.levels[1:]} | {p.name for p in group.glob("s*")}
        outputs = [group / name for name in sorted(arrays - {pyramid.levels[0].name})]
        above = Step(
            self.workers, "pyramid", digest(key, len(pyramid.levels), how), [*outputs, coarse]
        )
        above_done = above.finished() is not None
        if not done:
            pyramid.create(slice(None))
            make_folder(relabelled)
            make_folder(coarse)
            self._relabel(numbers, relabelled)
            step.finish({}, [self.container / pyramid.array(0) / _METADATA])
        self.report.end(step)
        above.begun = time.monotonic()
        if not above_done:
            pyramid.create(slice(1, None))
            make_folder(coarse)
            chunks = numbers
            for made in pyramid.passes:
                chunks = self._coarsen(made, chunks)
            self.workers.end_journal(coarse)
            pyramid.write_metadata(how)
            metadata = [pyramid.array(i) for i in range(1, len(pyramid.levels))]
            places = [self.container, group, *(self.container / name for name in metadata)]
            above.finish({}, [place / _METADATA for place in places])
        self.report.levels = len(pyramid.levels)
        self.report.end(above)

    def _note_layout(self, group: Path) -> None:
        """Say that a segmentation of a former release is written anew."""
        with suppress(InputError):
            if open_array(self.container, self.pyramid.array(0), "r").shards is None:
                self.note(
                    f"{group}: a former release wrote it, a file for each block; it is written"
                    " anew in shards, with the same labels"
                )

    def _relabel(self, numbers: NDArray[np.int64], folder: Path) -> None:
        """Write the full resolution and the levels that are made with it."""
        done, revision = self._ended("relabel", self.grid.n_blocks)
        common = self._common(revision, Journal(self.journals / "pyramid").revision)
        boxes = SuperblockTree(self.grid.shape, self.pyramid.passes[0].box)
        items = boxes.leaves(numbers)
        items = items.holding(boxes.leaves(numbers[~done[numbers]]))
        most = max(1, self.spec.batch_blocks // math.prod(self.pyramid.passes[0].box))
        tasks = [
            Relabel(
                batch,
                *common,
                run_dir=self.run_dir,
                source=_FRAGMENTS,
                leaf_shape=self.leaf_shape,
                grid=self.grid,
            )
            for batch in self.workers.batches(items, most, share=8)
        ]
        self._run_journalled("relabel", tasks, len(numbers), folder)
        self.workers.end_journal(folder)

    def _ended(self, stage: str, count: int) -> tuple[NDArray[np.bool_], int]:
        """Return which of so many parts of a stage are done, and what new records must say."""
        journal = Journal(self.journals / stage)
        return journal.done(count), journal.revision

    def _common(
        self, relabel: int, pyramid: int
    ) -> tuple[Pyramid, Downsampling, Path, tuple[int, int]]:
        """Return what all tasks that write the segmentation are given, with revisions."""
        return self.pyramid, self.spec.downsampling, self.journals, (relabel, pyramid)

    def _coarsen(self, made: Pass, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Write the levels of a pass over some chunks of its base; return those of its last.

        Chunks are numbers in the grid of their level, ascending.
        """
        pyramid, folder = self.pyramid, self.journals / "pyramid"
        levels = range(made.base + 1, made.last + 1)
        if not levels:
            return chunks
        done, revision = self._ended("pyramid", pyramid.first(len(pyramid.levels)))
        grid = pyramid.grid(made.base)
        boxes = SuperblockTree(grid, made.box).leaves(chunks)
        whole = np.all([done[pyramid.numbers(level, boxes.indices)] for level in levels], axis=0)
        sources = self._sources(made, boxes.take(~whole))
        common = self._common(0, revision)  # such tasks write to the journal of the pyramid alone
        tasks = [
            Coarsen(batch, *common, made=made, sources={place: sources[place] for place in batch})
            for batch in self.workers.batches(list(sources), self.spec.batch_blocks, share=4)
        ]
        names = "-".join(dict.fromkeys(pyramid.levels[n].name for n in (levels[0], levels[-1])))
        self._run_journalled(f"pyramid {names}", tasks, len(boxes), folder)
        last = SuperblockTree(grid, pyramid.covered(made.last, made.base)).leaves(chunks).indices
        return np.ravel_multi_index(tuple(last.T), pyramid.grid(made.last))

    def _sources(self, made: Pass, boxes: Families) -> dict[Triple, list[tuple[Triple, int]]]:
        """Return, by box of a pass, the files of its base level with their recorded digests."""
        if not len(boxes):
            return {}
        pyramid, shard = self.pyramid, np.array(self.pyramid.shard(made.base))
        journal = Journal(self.journals / ("pyramid" if made.base else "relabel"))
        sources = {}
        for box, chunks in boxes:
            places = np.stack(np.unravel_index(chunks, boxes.grid_shape), axis=1) // shard
            places, first = np.unique(places, axis=0, return_index=True)
            # All blocks of a file have its checksum.
            numbers = pyramid.numbers(made.base, places) if made.base else chunks[first]
            digests = journal.digests(numbers).tolist()
            sources[box.index] = list(zip(map(triple, places), digests, strict=True))
        return sources

    def _split_and_run(self, name: str, task: SuperblockTask) -> list[Any]:
        return self.workers.run(name, task.split(_TASKS_PER_CORE * self.workers.cores))

    def _run_journalled(self, name: str, tasks: Sequence[Task], total: int, folder: Path) -> None:
        """Run tasks that return how many of their blocks failed; their journal says why."""
        done = total - sum(task.size for task in tasks)
        failed = sum(self.workers.run(name, tasks, done))
        if failed:
            first = Journal(folder).failed()[0]
            raise StitchError(
                f"{name}: {failed} blocks failed, first block {first.block}: {first.reason}"
                f" (tracebacks in {folder})"
            )
