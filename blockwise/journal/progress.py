"""How far a stage is: what the journal and the ledger's documents of it both say."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

from agq.blockwise.journal.records import BlockRecord
from agq.blockwise.journal.tail import WorkerState

if TYPE_CHECKING:
    import numpy.typing as npt

RECENT_S: Final = 60.0
"""Present rates are of the blocks done in so many seconds."""


class StageProgress(Protocol):
    """What `Journal` and `ledger.progress.LedgerStage` have in common."""

    @property
    def workers(self) -> Mapping[str, WorkerState]:
        """All processes that have worked on the stage, by token."""
        ...

    @property
    def rows(self) -> "npt.NDArray[Any]":
        """One row per block that has ended, dtype `agq.blockwise.journal.table.ROW`."""
        ...

    @property
    def version(self) -> float:
        """A number that changes when the rows do."""
        ...

    def progress(self, since: float | None, now: float) -> dict[str, Any]:
        """Add up the blocks; see `Journal.progress`."""
        ...

    def failed(self, limit: int | None = None) -> list[BlockRecord]:
        """Return the first failed blocks by number; all of them may be too many to read."""
        ...

    def reasons(self) -> Iterable[tuple[str, int, int]]:
        """Yield texts of errors, the number of blocks failed by each, and the first of them."""
        ...

    def record(self, block: int) -> BlockRecord | None:
        """Return the record of a block that has ended."""
        ...

    def running(self, now: float) -> Iterable[int]:
        """Return the blocks begun and not ended, of workers that are not silent."""
        ...
