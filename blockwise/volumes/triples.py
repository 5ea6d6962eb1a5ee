"""Three whole numbers, (z, y, x): positions, sizes and boxes in voxels, voxel sizes."""

from collections.abc import Iterable
from typing import Any

from agq.errors import InputError

Triple = tuple[int, int, int]

Box = tuple[Triple, Triple]
"""First voxel and one past the last voxel."""


def triple(values: Iterable[Any]) -> Triple:
    """Return three integers of any kind as a tuple of int."""
    z, y, x = (int(v) for v in values)
    return z, y, x


def checked_triple(name: str, values: Iterable[Any], least: int | None = None) -> Triple:
    """Return three whole numbers that a user gave.

    Raises
    ------
    InputError
        If they are not three whole numbers, or one is below `least`; it begins with `name`.
    """
    try:
        given = list(values)
        whole = [int(v) for v in given]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: expected three whole numbers (z, y, x), got {values}") from None
    if len(whole) != 3 or any(w != g for w, g in zip(whole, given, strict=True)):
        raise InputError(f"{name}: expected three whole numbers (z, y, x), got {given}")
    if least is not None and min(whole) < least:
        raise InputError(f"{name}: every value must be at least {least}, got {whole}")
    return triple(whole)
