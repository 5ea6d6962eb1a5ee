"""Whether a segmentation looks plausible: figures that need no truth, and what to try next.

All is read from what lies on disk, the table of segments piece by piece, so memory does not grow
with the number of segments. The rules are here and nowhere else:

1. *Merged too far*: one segment holds more than `MOST_IN_ONE` of all labelled voxels.
2. *Too split*: fewer than `LEAST_MERGED` of the fragments were joined to another one.
3. *Specks*: half of the segments are smaller than `SPECK_NM3`.
4. *Empty*: more than `MOST_EMPTY` of the blocks computed have no labels.

None is applied to fewer than `LEAST_VOXELS` labelled voxels: a single object may well fill so small
a volume. What a rule says is advice, never an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.stitch.superblocks import StitchFiles
from agq.blockwise.volumes.open import open_volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.errors import InputError
from agq.plain_text import printable
from agq.reading import open_file
from agq.terminal import facts

if TYPE_CHECKING:
    from rich.text import Text

LEAST_VOXELS: Final = 1_000_000
"""About a cube of 1.6 um at 6 x 6 x 30 nm; the largest object of a smaller one fills a third of it
in the demo, where it is right."""

MOST_IN_ONE: Final = 0.5
"""No neurite comes near; only a cell body in a volume of its own size does."""

LEAST_MERGED: Final = 0.5
"""Objects are larger than blocks, so most fragments go on behind a border. On 20 sections of AC4
good settings join 98 % of the fragments, bad ones 10 %."""

LEAST_BLOCKS: Final = 8
"""For rule 2: in fewer blocks most fragments reach no border between two."""

SPECK_NM3: Final = 50.0**3
"""A synaptic vesicle measures 40 to 50 nm; nothing that is a piece of a cell is smaller."""

LEAST_SPECK: Final = 10
"""Voxels of a speck at the least: where voxels are coarse, a few may be a piece of a neurite."""

MOST_EMPTY: Final = 0.5
"""Resin and blood vessels have no labels, but rarely fill most of what is not masked."""

STEP: Final = 0.05
"""By how much to move thresholds at first: some tenths of a bit of VOI in the sweeps measured."""

_PIECE: Final = 2**16
_SHIFT: Final = 45
_FIRST: Final = 1023 << 7
_BINS: Final = 64 << 7


class Advice(BaseModel):
    """What looks wrong, why, and a command to try."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    title: str
    text: str
    command: str


class Plausibility(BaseModel):
    """Figures of a segmentation that need no truth, and what they suggest."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    segments: int
    fragments: int
    """Fragments in these segments."""
    merged: float
    """Share of the fragments that were joined to another one."""
    voxels: int
    """Voxels of all segments."""
    median_voxels: int
    """Half of the segments are smaller. Exact below 256 voxels, else less than 1 % too small."""
    half_voxels: int
    """Half of the labelled voxels are in segments of at least so many voxels."""
    largest: float
    """Share of the labelled voxels that the largest segment holds."""
    voxel_nm3: float
    blocks: int
    """Blocks computed."""
    empty_blocks: int | None
    """Of these, blocks without labels; None if their labels were not counted."""
    dropped: int
    """Objects dropped by a limit of the predictor."""
    advice: tuple[Advice, ...] = ()

    def facts(self) -> list[tuple[str, str]]:
        """Return the figures by name, as texts."""
        each = self.fragments / max(self.segments, 1)
        rows = [
            ("segments", f"{self.segments:,} of {each:.3g} fragments on average"),
            ("fragments merged", _percent(self.merged)),
            ("median segment", f"{self.median_voxels:,} voxels ({self._volume()})"),
            ("half of the volume in", f"segments of {self.half_voxels:,} voxels or more"),
            ("largest segment", f"{_percent(self.largest)} of all labelled voxels"),
        ]
        if self.empty_blocks is not None:
            rows.append(("blocks without labels", f"{self.empty_blocks:,} of {self.blocks:,}"))
        rows.append(("dropped queries", f"{self.dropped:,}"))
        return rows

    def _volume(self) -> str:
        volume = self.median_voxels * self.voxel_nm3
        return f"{volume:,.0f} nm3" if volume < 1e6 else f"{volume / 1e9:.3g} um3"

    def to_dict(self) -> dict[str, Any]:
        """Return it in JSON types, with the facts as they are shown."""
        return self.model_dump(mode="json") | {"facts": self.facts()}

    def table(self) -> Text:
        """Return figures and advice for a rich console."""
        text = facts("Is it plausible?", self.facts())
        for advice in self.advice:
            text.append(f"\n{advice.title}: ", "yellow")
            text.append(f"{advice.text}\n  {printable(advice.command)}")
        return text


def assess(folder: Path, thresholds: Thresholds, *, truth: bool) -> Plausibility | None:
    """Measure the segmentation of a stitched folder.

    Parameters
    ----------
    folder
        Run folder.
    thresholds
        Of its stitch.
    truth
        Whether its configuration names a ground truth to search thresholds with.

    Returns
    -------
    plausibility
        None if there is no segment, or something cannot be read: this is never an error.
    """
    try:
        sizes = _Sizes.read(StitchFiles(folder).segments)
        rows = Journal(folder / "journal" / "predict").rows
        fragments = open_volume(folder / "data.zarr", "fragments", kind="labels")
    except (InputError, OSError, ValueError, KeyError, pa.ArrowException):
        return None
    if not sizes.segments:
        return None
    done = rows[rows["rank"] == BlockState.DONE]
    scale = PER_NANOMETRE[fragments.unit]
    counted = bool(done["labels"].any())
    measured = Plausibility(
        segments=sizes.segments,
        fragments=sizes.fragments,
        merged=1 - sizes.alone / sizes.fragments,
        voxels=sizes.voxels,
        median_voxels=sizes.median(),
        half_voxels=sizes.half(),
        largest=sizes.largest / sizes.voxels,
        voxel_nm3=float(np.prod([int(v) / scale for v in fragments.voxel_size])),
        blocks=len(done),
        empty_blocks=int(np.count_nonzero(done["labels"] == 0)) if counted else None,
        dropped=int(done["dropped"].sum()),
    )
    return measured.model_copy(update={"advice": _advice(measured, folder, thresholds, truth)})


def recorded_plausibility(entry: Mapping[str, Any]) -> Plausibility | None:
    """Return what the record of a stitch says, or None if it says nothing that can be read.

    Parameters
    ----------
    entry
        That of the stage in ``run.json``.
    """
    try:
        return Plausibility.model_validate(entry.get("plausibility"))
    except ValidationError:
        return None


def _advice(
    measured: Plausibility, folder: Path, thresholds: Thresholds, truth: bool
) -> tuple[Advice, ...]:
    if measured.voxels < LEAST_VOXELS:
        return ()
    found = []
    if measured.largest > MOST_IN_ONE:
        text = (
            f"one segment holds {_percent(measured.largest)} of all labelled voxels, as only a cell"
            " body could; to merge less:"
        )
        command = _thresholds(folder, thresholds, truth, STEP)
        found.append(Advice(title="looks merged too far", text=text, command=command))
    split = measured.merged < LEAST_MERGED and measured.blocks >= LEAST_BLOCKS
    speck = max(LEAST_SPECK, round(SPECK_NM3 / measured.voxel_nm3))
    if split:
        text = (
            f"only {_percent(measured.merged)} of the fragments were joined to another one;"
            " to merge more:"
        )
        command = _thresholds(folder, thresholds, truth, -STEP)
        found.append(Advice(title="looks too split", text=text, command=command))
    if measured.median_voxels < speck:
        text = (
            f"half of the segments are smaller than a synaptic vesicle ({speck:,} voxels); to make"
            " them background:"
        )
        command = _command("stitch", folder, "--set", f"stitch.min_size={speck}")
        found.append(Advice(title="many specks", text=text, command=command))
    if measured.empty_blocks is not None and measured.empty_blocks > MOST_EMPTY * measured.blocks:
        text = (
            f"{measured.empty_blocks:,} of {measured.blocks:,} blocks have no labels; see whether"
            " there is tissue, and grey values as the model was trained on:"
        )
        command = _command("snapshot", folder, "--out", "snapshot.png")
        found.append(Advice(title="looks empty", text=text, command=command))
    return tuple(found)


def _thresholds(folder: Path, thresholds: Thresholds, truth: bool, step: float) -> str:
    """Return the command that looks for better thresholds: with a truth, by their scores."""
    if truth:
        return _command("sweep", folder)
    if step < 0 and thresholds.within >= thresholds.across + 2 * STEP:
        # Contacts inside blocks mostly veto: that they may merge too is the larger step.
        return _command("stitch", folder, "--set", f"stitch.within={thresholds.across:g}")
    margin = min(1.0, max(-1.0, round(thresholds.margin + step, 3)))
    # One word: a value that begins with a minus would be taken for an option.
    return _command("stitch", folder, f"--margin={margin:g}")


def _command(name: str, folder: Path, *options: str) -> str:
    return shlex.join(["agq", name, str(folder), *options])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


class _Sizes:
    """Sums over the table of segments, and a histogram of sizes with bins of less than 1 %.

    The bin of a size is the exponent and the first seven bits of its floating-point form.
    """

    def __init__(self) -> None:
        self.segments = self.fragments = self.alone = self.voxels = self.largest = 0
        self._count = np.zeros(_BINS, np.int64)
        self._voxels = np.zeros(_BINS)

    @classmethod
    def read(cls, table: Path) -> _Sizes:
        """Read the table in pieces."""
        sizes = cls()
        with open_file(table) as file:
            batches = pq.ParquetFile(file).iter_batches(_PIECE, columns=["voxels", "fragments"])
            for batch in batches:
                # Its own `to_numpy` imports pandas.
                columns = (np.from_dlpack(batch.column(n)) for n in batch.schema.names)
                sizes._add(*(np.asarray(column, np.int64) for column in columns))
        return sizes

    def _add(self, voxels: npt.NDArray[np.int64], fragments: npt.NDArray[np.int64]) -> None:
        if not voxels.size:
            return
        self.segments += voxels.size
        self.fragments += int(fragments.sum())
        self.alone += int(np.count_nonzero(fragments == 1))
        self.voxels += int(voxels.sum())
        self.largest = max(self.largest, int(voxels.max()))
        bins = (voxels.astype(np.float64).view(np.int64) >> _SHIFT) - _FIRST
        self._count += np.bincount(bins, minlength=_BINS)
        self._voxels += np.bincount(bins, voxels, minlength=_BINS)

    def median(self) -> int:
        """Return the size that half of the segments have at most."""
        return _size(int(np.searchsorted(np.cumsum(self._count), self.segments / 2)))

    def half(self) -> int:
        """Return the size of the segments from which on half of the voxels are in larger ones."""
        above = np.cumsum(self._voxels[::-1])
        return _size(_BINS - 1 - int(np.searchsorted(above, above[-1] / 2)))


def _size(place: int) -> int:
    """Return the smallest size of a bin."""
    return int(np.int64((place + _FIRST) << _SHIFT).view(np.float64))
