"""What a worker reads and writes of one block."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.mask_agreement import Agreement
from agq.blockwise.blocks.sidecar import build_sidecar, sidecar_path
from agq.blockwise.journal.reader import Journal
from agq.blockwise.predict.paths import container_path
from agq.blockwise.predict.predictor import Prediction
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.storage.files import checksum, write_atomic
from agq.blockwise.storage.leftovers import remove_temporaries
from agq.blockwise.volumes.create import Volume, chunk_file, open_array, open_volume, write_chunk
from agq.errors import InputError


class BlockError(Exception):
    """A block whose data cannot be used; the message says why."""


@dataclass(frozen=True)
class BlockFiles:
    """The input and the outputs of a run, open; shared by the threads of a worker."""

    run_dir: Path
    grid: BlockGrid
    raw: Volume
    fragments: "zarr.Array[Any]"
    affinities: "zarr.Array[Any] | None"

    @classmethod
    def open(cls, spec: PredictSpec, run_dir: Path) -> "BlockFiles":
        """Open the raw volume and the output arrays, which must exist.

        Raises
        ------
        InputError
            If one is missing, or does not fit the grid.
        """
        grid = spec.block_grid()
        raw = open_volume(**spec.raw)
        if raw.shape != grid.volume_shape:
            raise InputError(
                f"{raw.name} has {raw.shape} voxels, but the run was made for {grid.volume_shape}; "
                "use another run folder or start over with --overwrite"
            )
        container = container_path(run_dir)
        affinities = open_array(container, "affinities") if spec.affinities else None
        files = cls(run_dir, grid, raw, open_array(container, "fragments"), affinities)
        for array in (files.fragments, files.affinities):
            # A chunk with two writers loses blocks silently.
            if array is not None and (
                array.chunks[-3:] != grid.write_shape or array.shape[-3:] != grid.volume_shape
            ):
                raise InputError(
                    f"{container}: array {array.name} has shape {array.shape} and chunks "
                    f"{array.chunks}, which do not fit the block grid; start over with --overwrite"
                )
        return files

    def read(self, number: int) -> npt.NDArray[Any]:
        """Read the raw voxels of a block, (z, y, x), always of the grid's `read_shape`.

        Where the volume is smaller than the window, it is continued by reflection behind its end.

        Raises
        ------
        BlockError
            If values are NaN or infinite. Errors of the storage pass through.
        """
        raw = self.raw.read(*self.grid.read_box(number))
        if raw.dtype.kind == "f" and not (finite := np.isfinite(raw)).all():
            bad = int(raw.size - np.count_nonzero(finite))
            raise BlockError(f"raw has {bad} NaN or infinite of {raw.size} voxels")
        missing = [(0, want - n) for want, n in zip(self.grid.read_shape, raw.shape, strict=True)]
        return np.pad(raw, missing, mode="reflect") if any(m for _, m in missing) else raw

    def write(self, number: int, prediction: Prediction) -> dict[str, str]:
        """Write the outputs of a block durably; return a checksum of each.

        Parameters
        ----------
        number
            Block number.
        prediction
            Over the `read_shape` of the grid.

        Raises
        ------
        BlockError
            If the prediction has a wrong shape or type.
        """
        labels, affinities = self._checked(number, prediction)
        crop = self.grid.write_in_read(number)
        index = self.grid.index(number)
        sidecar = self._sidecar(number, labels, affinities, prediction)
        ids = self.grid.fragment_ids(number, labels[crop])
        sums = {"fragments": checksum(ids), "sidecar": checksum(sidecar)}
        write_chunk(self.fragments, index, ids)
        if self.affinities is not None:
            own = np.ascontiguousarray(affinities[(slice(None), *crop)])
            sums["affinities"] = checksum(own)
            write_chunk(self.affinities, (0, *index), own)
        write_atomic(sidecar_path(self.run_dir, number), sidecar)
        return sums

    def _sidecar(
        self,
        number: int,
        labels: npt.NDArray[Any],
        affinities: npt.NDArray[np.uint8],
        prediction: Prediction,
    ) -> bytes:
        memberships = getattr(prediction, "memberships", None)
        try:
            agreement = None
            if memberships is not None:
                weight = float(getattr(prediction, "mask_weight", 0))
                agreement = Agreement(np.asarray(memberships), weight)
            return build_sidecar(
                labels, affinities, self.grid, number, agreement=agreement
            ).to_bytes()
        except InputError as error:
            raise BlockError(f"the predictor's answer cannot be used: {error}") from None

    def _checked(
        self, number: int, prediction: Prediction
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
        """Return labels and affinities over the read box, without padding."""
        labels, affinities = np.asarray(prediction.labels), np.asarray(prediction.affinities)
        shape = self.grid.read_shape
        if labels.shape != shape or affinities.shape != (3, *shape):
            raise BlockError(
                f"the predictor returned labels {labels.shape} and affinities {affinities.shape} "
                f"for a block of {shape}"
            )
        if labels.dtype not in (np.uint16, np.uint32) or affinities.dtype != np.uint8:
            raise BlockError(
                f"the predictor returned labels of {labels.dtype} and affinities of "
                f"{affinities.dtype}; uint16 or uint32, and uint8, are expected"
            )
        start, stop = self.grid.read_box(number)
        z, y, x = (slice(0, hi - lo) for lo, hi in zip(start, stop, strict=True))
        return labels[z, y, x], affinities[:, z, y, x]


def clean_up_killed(spec: PredictSpec, journal: Journal) -> int:
    """Remove the temporary files of workers that were killed in a block, ever; return how many.

    Only when no worker writes any more. The journal knows the blocks: a killed worker began them
    and never wrote how they ended.

    Parameters
    ----------
    spec
        Of the run, whose arrays exist.
    journal
        Of the prediction, read to its end.
    """
    blocks = {block for worker in journal.workers.values() for block in worker.current}
    if not blocks:
        return 0
    grid, container = spec.block_grid(), container_path(spec.run_dir)
    fragments = open_array(container, "fragments", "r")
    affinities = open_array(container, "affinities", "r") if spec.affinities else None
    files = []
    for block in blocks:
        index = grid.index(block)
        files += [chunk_file(fragments, index), sidecar_path(Path(spec.run_dir), block)]
        if affinities is not None:
            files.append(chunk_file(affinities, (0, *index)))
    return remove_temporaries(files)
