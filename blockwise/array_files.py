"""Files of plain arrays (npy, npz): no pickle, bytes that depend on the arrays alone."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blockwise.errors import InputError
from blockwise.files import write_atomic


def save_array(path: Path, array: NDArray) -> None:
    """Write an npy file atomically; ``numpy.load(path, mmap_mode="r")`` maps it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getbuffer())


def pack_arrays(arrays: Mapping[str, NDArray], *, compress: bool = True) -> bytes:
    """Return an npz of plain arrays whose bytes depend on the arrays alone."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            # A ZipInfo of its own carries the fixed date 1980-01-01; level 1 because label
            # planes compress by their runs and higher levels only cost time.
            info = zipfile.ZipInfo(f"{name}.npy")
            archive.writestr(info, member.getbuffer(), method, compresslevel=1)
    return buffer.getvalue()


def unpack_arrays(data: bytes, skip: tuple[str, ...] = ()) -> dict[str, NDArray]:
    """Read :func:`pack_arrays`, but for members whose name begins with one of ``skip``.

    Raises
    ------
    InputError
        If the data are not a readable npz.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            wanted = (name for name in archive.files if not name.startswith(skip))
            return {name: archive[name] for name in wanted}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise InputError(f"file is damaged ({error})") from None
