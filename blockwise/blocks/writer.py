"""The one way a block becomes durable: fragments, affinities, sidecar, and a checksum of each.

Prediction, import and watershed baseline all keep their blocks in a folder of this form::

    data.zarr/fragments     uint64, one chunk per block
    data.zarr/affinities    uint8, (3, z, y, x), one chunk per block; optional
    sidecars/               one file per block (`blocks.sidecar`)

Each file is written atomically and synced. A caller with a journal writes the block's line
after `BlockWriter.write` has returned, with the checksums that it returns: of stored bytes, a
hundredth of the voxels.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.label_pairs import MaskAgreement
from agq.blockwise.blocks.pack_arrays import is_packed, require_unpacked
from agq.blockwise.blocks.packs import sidecar_path
from agq.blockwise.blocks.sidecar import build_sidecar
from agq.blockwise.storage.files import Unsynced, checksum, require_folder, write_atomic
from agq.blockwise.storage.shards import ChunkFiles
from agq.blockwise.volumes.create import (
    chunk_file,
    create_affinities,
    create_array,
    open_array,
)
from agq.errors import DamagedError, InputError, repairable

_CONTAINER = "data.zarr"


@dataclass(frozen=True)
class BlockWriter:
    """The outputs of blocks, open for writing; threads may share it.

    Attributes
    ----------
    folder
        Holds the container and the sidecars.
    grid
        The blocks of the whole volume.
    fragments, affinities
        The arrays; no affinities: they are not kept.
    """

    folder: Path
    grid: BlockGrid
    fragments: "zarr.Array[Any]"
    affinities: "zarr.Array[Any] | None" = None
    _named: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)

    @classmethod
    def create(
        cls, folder: Path, grid: BlockGrid, unit: str = "nm", *, affinities: bool = False
    ) -> "BlockWriter":
        """Create the arrays, or open those of an earlier call.

        Raises
        ------
        InputError
            If an array exists and was made for other blocks.
        """
        layout: dict[str, Any] = {
            "shape": grid.volume_shape,
            "chunks": grid.write_shape,
            "voxel_size": grid.voxel_size,
            "offset": grid.offset,
            "unit": unit,
        }
        container = folder / _CONTAINER
        try:
            if is_packed(folder):  # finished; more blocks are refused when they are opened
                return cls(folder, grid, open_array(container, "fragments", "r"))
            fragments = create_array(container, "fragments", dtype=np.uint64, **layout)
            kept = create_affinities(container, "affinities", **layout) if affinities else None
        except DamagedError as error:
            raise repairable(error, folder) from None
        return cls(folder, grid, fragments, kept)

    @classmethod
    def open(cls, folder: Path, grid: BlockGrid, *, affinities: bool = False) -> "BlockWriter":
        """Open the arrays, which must exist.

        Raises
        ------
        InputError
            If one is missing, packed, or does not fit the grid.
        """
        require_unpacked(folder)
        container = folder / _CONTAINER
        kept = open_array(container, "affinities") if affinities else None
        writer = cls(folder, grid, open_array(container, "fragments"), kept)
        for array in (writer.fragments, writer.affinities):
            # A chunk with two writers loses blocks silently.
            if array is not None and (
                array.chunks[-3:] != grid.write_shape or array.shape[-3:] != grid.volume_shape
            ):
                raise InputError(
                    f"{container}: array {array.name} has shape {array.shape} and chunks "
                    f"{array.chunks}, which do not fit the block grid; start over with --overwrite"
                )
        return writer

    def write(
        self,
        number: int,
        labels: npt.NDArray[Any],
        affinities: npt.NDArray[np.uint8],
        *,
        original_labels: npt.NDArray[np.uint64] | None = None,
        agreement: MaskAgreement | None = None,
        mask: str = "",
    ) -> dict[str, str]:
        """Write the outputs of a block durably; return the journal's `sums`, a checksum of each.

        Parameters
        ----------
        number, labels, affinities, original_labels, agreement, mask
            As for `build_sidecar`: arrays over the block's read box.

        Raises
        ------
        InputError
            If an array does not have the shape or type of the block; nothing is written then.
        """
        sidecar = build_sidecar(
            labels, affinities, self.grid, number, original_labels, agreement, mask
        ).to_bytes()
        crop, index = self.grid.write_in_read(number), self.grid.index(number)
        ids = self.grid.fragment_ids(number, labels[crop])
        kept: dict[str, tuple[tuple[int, ...], npt.NDArray[Any]]] = {"fragments": (index, ids)}
        if self.affinities is not None:
            kept["affinities"] = ((0, *index), affinities[(slice(None), *crop)])
        sums = {"sidecar": checksum(sidecar)}
        unsynced = Unsynced(self._named)
        for name, (place, data) in kept.items():
            encoded = self._chunks[name].encode(data)
            sums[name] = checksum(encoded)
            self._chunks[name].write(place, encoded, unsynced)
        require_folder(self.folder)
        write_atomic(sidecar_path(self.folder, number), sidecar)
        unsynced.sync()
        return sums

    @cached_property
    def _chunks(self) -> dict[str, ChunkFiles]:
        arrays = {"fragments": self.fragments, "affinities": self.affinities}
        return {name: ChunkFiles(array) for name, array in arrays.items() if array is not None}

    def files(self, number: int) -> list[Path]:
        """Return the paths of all files of a block, written or not."""
        index = self.grid.index(number)
        files = [chunk_file(self.fragments, index), sidecar_path(self.folder, number)]
        if self.affinities is not None:
            files.append(chunk_file(self.affinities, (0, *index)))
        return files
