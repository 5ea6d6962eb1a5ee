"""A stack of equal sections, and the messages that every format of them shares."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agq.blockwise.volumes.placement import Source
from agq.blockwise.volumes.triples import Triple
from agq.errors import InputError

Section = npt.NDArray[Any]

MOST_SECTION_BYTES = 2**32
"""Bytes of the largest section that can be imported."""


@dataclass(frozen=True)
class Sections:
    """A stack of equal sections.

    Attributes
    ----------
    name
        For messages: the file, and the key inside it.
    files
        All files that the stack is made of.
    shape
        (z, y, x).
    dtype
        In native byte order.
    read
        ``read(first)`` yields the 2-D sections from number `first` to the last.
    places
        The file of each section, None for one that is filled; None if one file holds all.
    inverted
        Whether 0 is white in the files; sections are read with 0 as black.
    filled
        Names of sections that no file holds.
    fill_value
        What they are filled with.
    sources
        What the file says of its place in the world; a tuple (None, y, x) leaves z open.
    array_shape
        The shape that the file has, if its axes are not (z, y, x).
    """

    name: str
    files: tuple[Path, ...]
    shape: Triple
    dtype: np.dtype[Any]
    read: Callable[[int], Iterator[Section]]
    places: tuple[Path | None, ...] | None = None
    inverted: bool = False
    filled: tuple[str, ...] = ()
    fill_value: float | None = None
    sources: tuple[Source, ...] = ()
    array_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require_section(self.shape[1:], self.dtype, self.name)


def require_section(shape: Sequence[int], dtype: np.dtype[Any], name: str) -> None:
    """Check that a section, which is held in memory whole, is not too large.

    Raises
    ------
    InputError
        If it has more than `MOST_SECTION_BYTES`: the head of a file can claim any size.
    """
    if (size := prod(shape) * dtype.itemsize) > MOST_SECTION_BYTES:
        raise InputError(
            f"{name} has sections of {tuple(shape)} {dtype}, {size} bytes each, and "
            f"{MOST_SECTION_BYTES} can be read; cut them into parts"
        )


def unreadable(place: Path | str, error: Exception, section: int | None = None) -> InputError:
    """Return the one-line error of a file, or of one section in it, that cannot be decoded."""
    line = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    where = "" if section is None else f" section {section}"
    return InputError(
        f"{place}:{where} cannot be read ({line}); the file is damaged or unsupported"
    )


def checked(
    section: Section,
    shape: Triple,
    dtype: np.dtype[Any],
    where: str,
    first: str = "the first",
) -> Section:
    """Return a section if it is like the others.

    Parameters
    ----------
    section
        As it was decoded.
    shape, dtype
        Of the stack.
    where
        Name of the section, for messages.
    first
        Name of the first section, which set shape and type.

    Raises
    ------
    InputError
        If its shape or type is another.
    """
    if section.shape != shape[1:] or native(section.dtype) != dtype:
        raise InputError(
            f"{where} is {section.shape} {section.dtype}, but {first} is {shape[1:]} {dtype}; "
            "all sections must be alike"
        )
    return section


def native(dtype: Any) -> np.dtype[Any]:
    """Return a data type in native byte order."""
    return np.dtype(dtype).newbyteorder("=")


def stack_shape(shape: Sequence[int], name: str) -> Triple:
    """Check that a shape is (z, y, x) and not empty.

    Raises
    ------
    InputError
        If it is not.
    """
    if len(shape) != 3:
        raise InputError(
            f"{name} is {len(shape)}-D with shape {tuple(shape)}; it must be (z, y, x)"
        )
    z, y, x = (int(n) for n in shape)
    if min(z, y, x) < 1:
        raise InputError(f"{name} is empty, with shape {(z, y, x)}")
    return z, y, x


def choose(key: str | None, choices: dict[str, str], name: str) -> str:
    """Return the key asked for, or the only one.

    Parameters
    ----------
    choices
        The keys that there are, each with a few words on what it holds.

    Raises
    ------
    InputError
        If there is no such key, or none was asked for among several; it lists the choices.
    """
    listing = ", ".join(f"{k} {what}".strip() for k, what in choices.items()) or "nothing 3-D"
    if key is not None:
        if key.strip("/") in choices:
            return key.strip("/")
        raise InputError(f"{name} has no array {key!r}; it holds: {listing}")
    if len(choices) == 1:
        return next(iter(choices))
    raise InputError(f"{name}: say which array is meant (the key or dataset); it holds: {listing}")
