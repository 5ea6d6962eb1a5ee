"""The settings of the stitch."""

import math
from fractions import Fraction as Exact
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from agq.settings import File, Settings, Size

HALF_UNITS = 510
"""Half units in an affinity of 1."""

DECIMALS = 6
"""Decimals of thresholds and shares that count; they bound the unit that scores are whole in."""

EvidenceKind = Literal["affinity", "overlap", "both"]
"""What speaks for a merge across a border: affinities, overlapping labels, or both."""

SegmentIds = Literal["consecutive", "fragment", "keep"]
"""Ids 1..n in the order of the smallest fragment id, that fragment id itself, or those before."""

Downsampling = Literal["majority", "stride"]
"""Which label a coarse voxel takes: the most frequent one, or that of its first voxel."""

ContactWeight = Literal["voxels", "sqrt"]
"""What a contact counts among those pooled: its touching voxel pairs, or their square root."""

OutputType = Literal["auto", "uint64"]
"""Type of the segmentation: the smaller of uint32 and uint64 that holds all ids, or uint64."""

MOST_TABLED = 63
"""Classes that `classes_may_merge` may name."""

Class = Annotated[int, Field(ge=1, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MarginOfScore = Annotated[float, Field(ge=-1, le=1)]


def exact(value: float) -> Exact:
    """Return the decimal number that a user wrote, as a fraction; rounded to `DECIMALS`."""
    return Exact(f"{value:.{DECIMALS}f}")


class DaskSettings(Settings):
    """Where the stitch runs."""

    address: str | None = None
    """Address of a running scheduler (tcp:// or tls://); default: a local cluster. Its workers need
    this package and the run folder under the same path."""

    ca_file: File | None = None
    """For a tls:// address: PEM file of the authority that signed the scheduler's certificate."""

    cert_file: File | None = None
    """For a tls:// address: PEM file of this client's certificate."""

    key_file: File | None = None
    """For a tls:// address: PEM file of this client's private key."""

    workers: NonNegativeInt | None = None
    """Processes of the local cluster, one thread each. 0: none, the command itself does all, on one
    core. Default: 0 for at most 512 blocks of 16 million voxels in all, which is quicker done than
    processes start; else one per core."""

    wait_s: Annotated[float, Field(ge=1)] = 300.0
    """Seconds without any worker after which a stitch on a scheduler of one's own gives up."""

    @model_validator(mode="after")
    def _certificates_are_whole(self) -> "DaskSettings":
        files = (self.ca_file, self.cert_file, self.key_file)
        if any(files) and not all(files):
            raise ValueError("ca_file, cert_file and key_file go together")
        if any(files) and not (self.address or "").startswith("tls://"):
            raise ValueError("certificates are for an address that starts with tls://")
        return self


class Thresholds(Settings):
    """What contacts must show to speak for a merge; six decimals count, exactly."""

    across: Fraction = 0.7
    """Affinity that a contact across a block border must exceed to count for a merge (published:
    0.7): at a mean of exactly this it does not. A run takes what the checkpoint recommends where it
    is not set."""

    within: Fraction = 1.0
    """The same for contacts inside a block; at 1.0 (published) they only veto. A run takes what the
    checkpoint recommends where it is not set."""

    evidence: EvidenceKind = "affinity"
    """What speaks for a merge across a border: `affinity` (published); `overlap`: how well the
    labels of two blocks agree where both predicted; `both`: affinities, but a contact whose own
    overlap is below `overlap` only vetoes, like one inside a block. Overlaps need blocks that
    overlap (`blocks.before`, `blocks.after`)."""

    overlap: Fraction = 0.5
    """Intersection over union that labels of two blocks must exceed (`overlap`) or reach
    (`both`)."""

    min_contact: NonNegativeInt = 0
    """Border contacts of fewer touching voxel pairs are left out."""

    contact_weight: ContactWeight = "voxels"
    """What a contact counts among those that are pooled in a score: the number of its touching
    voxel pairs (`voxels`, published), or the square root of it (`sqrt`): neighbouring pairs are no
    independent evidence, and one large contact otherwise outweighs many small ones. A run takes
    what the checkpoint recommends where it is not set."""

    margin: MarginOfScore = 0.0
    """Added to all thresholds of the score. A later stitch with a larger margin cuts the stored
    merges again, in seconds, instead of merging anew."""

    @property
    def exact(self) -> tuple[Exact, Exact, Exact, Exact]:
        """Thresholds across, within and overlap, and the margin, as the user wrote them."""
        return exact(self.across), exact(self.within), exact(self.overlap), exact(self.margin)

    @property
    def pooling(self) -> list[str]:
        """What else than the thresholds decides scores, for the keys of steps."""
        # Nothing where it is as published: stitches of earlier releases go on.
        return [] if self.contact_weight == "voxels" else [self.contact_weight]

    @property
    def units(self) -> int:
        """Units in an affinity of 1: the smallest that make thresholds and margin whole.

        A multiple of `HALF_UNITS`, at most 51 million (`DECIMALS`).
        """
        return math.lcm(HALF_UNITS, *(value.denominator for value in self.exact))

    @property
    def in_units(self) -> tuple[int, int, int, int]:
        """Thresholds across, within and overlap, and the margin, in `units` (0.7: 357 of 510)."""
        across, within, overlap, margin = (int(value * self.units) for value in self.exact)
        return across, within, overlap, margin


class MergeSettings(Thresholds):
    """How fragments of different blocks become segments."""

    margin_floor: MarginOfScore | None = None
    """Merge down to this margin, so that later stitches may use any margin from here on; default:
    the margin itself."""

    superblock: Size | None = None
    """Blocks (z, y, x) of a leaf superblock of the hierarchical agglomeration; default: chosen from
    the number of blocks and workers. Never changes the result."""

    class_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """With `input.classes`: a fragment has the class that most of its voxels with one have, if more
    than this share of all its voxels has it."""

    classes_may_merge: tuple[tuple[Class, Class], ...] = ()
    """Pairs of classes that may merge; all others never do."""

    edits: File | None = None
    """Merges and splits from proofreading, a CSV file (`agq stitch RUN --edits FILE`). It is copied
    into the run folder, and the copy counts from then on."""

    segment_ids: SegmentIds = "consecutive"
    """Ids 1..n in the order of the smallest fragment id (`consecutive`); that fragment id itself
    (`fragment`); or (`keep`) those of the last stitch for segments of the same fragments, and new
    ones above for others."""

    min_size: NonNegativeInt = 0
    """Segments with fewer voxels become background (counted in the report); 0 keeps all. A run
    takes what the checkpoint recommends where it is not set."""

    allow_missing: bool = False
    """Stitch even when blocks failed or are missing; they stay background."""

    @field_validator("classes_may_merge")
    @classmethod
    def _table_fits(cls, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        if len({value for pair in pairs for value in pair}) > MOST_TABLED:
            raise ValueError(f"names more than {MOST_TABLED} classes")
        return pairs


class StitchSettings(MergeSettings):
    """How fragments of different blocks become segments."""

    dask: DaskSettings = DaskSettings()
    """Scheduler and workers."""


class PyramidSettings(Settings):
    """Lower resolutions of the segmentation."""

    levels: Annotated[int, Field(ge=0, le=20)] | Literal["auto"] = "auto"
    """Levels beyond full resolution; `auto` stops when a level fits into one block."""

    downsampling: Downsampling = "majority"
    """A coarse voxel takes the most frequent label of the voxels that it covers (`majority`), or
    that of the first of them (`stride`: quicker, with rougher borders)."""
