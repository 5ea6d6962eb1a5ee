"""A changed mask: which blocks that exist it would make otherwise."""

import itertools

import numpy as np

from agq.blockwise.blocks.mask import Tissue, mask_blocks
from agq.blockwise.blocks.sidecar import open_sidecar
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockState
from agq.blockwise.journal.writer import take_back
from agq.blockwise.volumes.boxes import unordered
from agq.errors import InputError
from agq.pipeline.run.identity import mask_changed, record_mask
from agq.pipeline.run.prepare import Prepared


def apply_mask(prepared: Prepared) -> int:
    """Remove the blocks that a changed mask would make otherwise, and record the mask.

    Blocks are compared one by one with what their sidecars say of the mask that they were made
    with; skipped ones by whether there is tissue now.

    Returns
    -------
    int
        How many are to be computed or skipped again.
    """
    if not mask_changed(prepared):
        return 0
    folder, grid, mask = prepared.run.journal("predict"), prepared.grid, prepared.mask
    numbers = np.arange(grid.n_blocks, dtype=np.int64)
    ranks = Journal(folder).ranks(numbers)
    tissue = np.ones(grid.n_blocks, np.bool_)
    ended = numbers[ranks >= BlockState.SKIPPED]
    if mask is not None and ended.size:
        tissue[ended] = mask_blocks(mask, grid, ended)
    done = ranks == BlockState.DONE
    changed = unordered(lambda number: _changed(prepared, number), numbers[done & tissue].tolist())
    otherwise = [number for number in changed if number is not None]
    stale = (done & ~tissue) | ((ranks == BlockState.SKIPPED) & tissue)
    again = np.union1d(numbers[stale], otherwise).tolist()
    # Files first: until the mask is recorded, a block without them is taken back all the same.
    writer = BlockWriter.open(prepared.run.path, grid, affinities=prepared.config.output.affinities)
    for file in itertools.chain.from_iterable(map(writer.files, again)):
        file.unlink(missing_ok=True)
    count = take_back(folder, again, "mask changed")
    record_mask(prepared)
    return count


def require_applied(prepared: Prepared) -> None:
    """Refuse to stitch blocks that were made with another mask.

    Raises
    ------
    InputError
        If the mask has changed since then.
    """
    if mask_changed(prepared):
        raise InputError(
            "input.mask has changed since blocks were computed: `agq predict` computes those again"
            " of which it shows other voxels"
        )


def _changed(prepared: Prepared, number: int) -> int | None:
    """Return the number of a block that was made with another mask or is damaged, else None."""
    try:
        before = open_sidecar(prepared.run.path, number).mask
    except InputError:
        return number
    now = ""
    if prepared.mask is not None and prepared.hides_voxels:
        now = Tissue.read(prepared.mask, prepared.grid, number).checksum()
    return None if before == now else number
