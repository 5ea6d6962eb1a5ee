"""What a check of a run folder has found."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from agq.tables import Tabled

if TYPE_CHECKING:
    from rich.text import Text

Kind = Literal[
    "fragments", "affinities", "sidecars", "segmentation", "pyramid", "tables", "metadata"
]
"""What a run writes."""

_NAMED = 20
"""Problems listed in a table."""


@dataclass(frozen=True)
class Problem:
    """A file that is missing, or is not what was written.

    Attributes
    ----------
    kind
        What it belongs to.
    path
        In the run folder.
    what
        What is wrong, in a few words.
    block
        Number of its block, or of its chunk of the pyramid, in the journal; None: of no block.
    """

    kind: Kind
    path: str
    what: str
    block: int | None = None


@dataclass(frozen=True)
class Check:
    """What came of checking one block or file.

    Attributes
    ----------
    compared
        Kinds of the files that were looked at.
    unrecorded
        Kinds of those without a recorded checksum.
    problems
        What is wrong.
    """

    compared: list[Kind]
    unrecorded: list[Kind]
    problems: list[Problem]


@dataclass
class VerifyReport(Tabled):
    """What was checked, and what is wrong.

    Attributes
    ----------
    run_dir
        The folder.
    checked
        Files compared with their checksums, by kind.
    present
        Files of which only the presence was checked: not in the sample.
    unrecorded
        Files without a recorded checksum, by kind: an earlier release wrote them.
    damaged_lines
        Lines of the journal that cannot be read, by stage; they count for nothing.
    problems
        What is missing or differs.
    taken_back
        Blocks, chunks and files that the next run makes again, by kind; empty without repair.
    """

    run_dir: str
    checked: Counter[str] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    unrecorded: Counter[str] = field(default_factory=Counter)
    damaged_lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    taken_back: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        values = {name: value for name, value in vars(self).items() if name != "problems"}
        return {**values, "problems": [asdict(problem) for problem in self.problems]}

    def table(self) -> "Text":
        """Return the report for a rich console."""
        from agq.terminal import facts

        rows = [(kind, f"{count:,} checked") for kind, count in sorted(self.checked.items())]
        for kind, count in sorted(self.present.items()):
            rows.append((kind, f"{count:,} not in the sample: present"))
        for kind, count in sorted(self.unrecorded.items()):
            rows.append((kind, f"{count:,} not checked: recorded by an earlier release"))
        for stage, count in self.damaged_lines.items():
            rows.append(
                (f"journal of {stage}", f"{count:,} damaged lines, which count for nothing")
            )
        rows.append(("missing or different", f"{len(self.problems):,}"))
        for problem in self.problems[:_NAMED]:
            block = "" if problem.block is None else f"block {problem.block}, "
            rows.append((f"  {problem.kind}", f"{block}{problem.path}: {problem.what}"))
        if len(self.problems) > _NAMED:
            rows.append(("", f"... and {len(self.problems) - _NAMED:,} more (--json)"))
        for kind, count in self.taken_back.items():
            rows.append((f"taken back: {kind}", f"{count:,}"))
        return facts(f"Check of {self.run_dir}", rows)
