"""Sections in npy and npz files, streamed so that memory holds one section at a time.

In an npz file sections may also be packed as JPEG XL: ``<key>_jxl`` holds the encoded sections end
to end as uint8, ``<key>_ends`` where each one ends.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import imagecodecs
import numpy as np

from agq.errors import InputError
from agq.pipeline.data.section_stack import (
    Section,
    Sections,
    checked,
    choose,
    native,
    require_section,
    stack_shape,
    unreadable,
)

_MOST_PACKED = 10**7
"""Sections that are packed in one file."""


def open_npy(file: Path, key: str | None) -> Sections:
    """Open an npy file, memory-mapped.

    Parameters
    ----------
    key
        Ignored: an npy file holds one array.

    Raises
    ------
    InputError
        If it holds no stack of sections. Other errors mean that the file is damaged.
    """
    del key
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    shape = stack_shape(array.shape, str(file))

    def read(start: int) -> Iterator[Section]:
        yield from np.load(file, mmap_mode="r", allow_pickle=False)[start:]

    return Sections(str(file), (file,), shape, native(array.dtype), read)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


def _header(stream: IO[bytes]) -> _Header:
    """Read the header of an npy stream, leaving it at the first byte of the data."""
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"npy format {version} is not supported")
    header = _Header(*readers[version](stream))
    if header.dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    return header


def open_npz(file: Path, key: str | None) -> Sections:
    """Open an array, or packed sections, of an npz file.

    Parameters
    ----------
    key
        Which one; may be left out where only one is 3-D.

    Raises
    ------
    InputError
        If it holds no stack of sections. Other errors mean that the file is damaged.
    """
    headers: dict[str, _Header] = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            if member.endswith(".npy"):
                with archive.open(member) as stream:
                    headers[member.removesuffix(".npy")] = _header(stream)
    packed = {
        name.removesuffix("_jxl")
        for name in headers
        if name.endswith("_jxl") and f"{name.removesuffix('_jxl')}_ends" in headers
    }
    choices = {name: f"{headers[f'{name}_ends'].shape[0]} JPEG XL sections" for name in packed}
    for name, header in headers.items():
        if len(header.shape) == 3 or name == key:
            choices[name] = f"{header.shape} {header.dtype}"
    chosen = choose(key, dict(sorted(choices.items())), str(file))
    if chosen not in headers:
        return _jpegxl(file, chosen, headers[f"{chosen}_jxl"], headers[f"{chosen}_ends"])
    header = headers[chosen]
    shape = stack_shape(header.shape, f"{file}:{chosen}")
    if header.fortran:  # its sections are not contiguous, so they are read together
        require_section(shape, header.dtype, f"{file}:{chosen} (in Fortran order)")

    def read(start: int) -> Iterator[Section]:
        if header.fortran:
            with np.load(file, allow_pickle=False) as arrays:
                yield from arrays[chosen][start:]
            return
        size = shape[1] * shape[2] * header.dtype.itemsize
        with zipfile.ZipFile(file) as archive, archive.open(f"{chosen}.npy") as stream:
            _header(stream)
            for number in range(shape[0]):
                data = _exactly(stream, size, f"{file}:{chosen}", number)
                if number >= start:
                    yield np.frombuffer(data, header.dtype).reshape(shape[1:])

    return Sections(f"{file}:{chosen}", (file,), shape, native(header.dtype), read)


def _exactly(stream: IO[bytes], size: int, name: str, number: int) -> bytes:
    try:
        data = stream.read(size)
    except Exception as error:
        raise unreadable(name, error, number) from error
    if len(data) != size:
        raise unreadable(name, EOFError("the file ends too early"), number)
    return data


def _jpegxl(file: Path, key: str, header: _Header, count: _Header) -> Sections:
    name = f"{file}:{key}"
    if prod(count.shape) > _MOST_PACKED or count.dtype.itemsize > 8:
        raise InputError(f"{name}: {key}_ends has shape {count.shape}; the file is damaged")
    with np.load(file, allow_pickle=False) as arrays:
        ends = [int(end) for end in arrays[f"{key}_ends"]]
    sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if not sizes or min(sizes) <= 0 or ends[-1] > header.shape[0] or header.dtype.itemsize != 1:
        raise InputError(f"{name}: {key}_ends does not fit {key}_jxl; the file is damaged")

    def decode(start: int) -> Iterator[Section]:
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}_jxl.npy") as stream:
            _header(stream)
            for number, size in enumerate(sizes):
                require_section((size,), header.dtype, name)
                data = _exactly(stream, size, name, number)
                if number < start:
                    continue
                try:
                    section = np.asarray(imagecodecs.jpegxl_decode(data))
                except Exception as error:
                    raise unreadable(name, error, number) from error
                yield section

    first = next(decode(0))
    shape = stack_shape((len(ends), *first.shape), name)

    def read(start: int) -> Iterator[Section]:
        for number, section in enumerate(decode(start), start):
            yield checked(section, shape, first.dtype, f"{name}: section {number}")

    return Sections(name, (file,), shape, native(first.dtype), read)
