"""Three whole numbers, (z, y, x): positions, sizes and boxes in voxels, voxel sizes."""

from collections.abc import Iterable, Sequence
from typing import Any

from agq.errors import InputError

Triple = tuple[int, int, int]

Box = tuple[Triple, Triple]
"""First voxel and one past the last voxel."""


def triple(values: Iterable[Any]) -> Triple:
    """Return three integers of any kind as a tuple of int."""
    z, y, x = (int(v) for v in values)
    return z, y, x


def commas(values: Iterable[Any]) -> str:
    """Write numbers as commands take them: ``12,345,678`` is z 12, y 345, x 678."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def show_voxel(
    voxel: Sequence[int], voxel_size: Sequence[Any], unit: str, offset: Sequence[Any] = (0, 0, 0)
) -> str:
    """Write a place for people, the same way wherever one is printed.

    Parameters
    ----------
    voxel
        (z, y, x), counted from the first voxel of the volume, as ``--at`` takes it.
    voxel_size, unit, offset
        Of the volume, in world units.

    Returns
    -------
    str
        ``voxel 12,345,678 (375,2073,4071 nm)``: the world position is that of the voxel's middle.
    """
    return f"voxel {commas(voxel)} ({commas(middle(voxel, voxel_size, offset))} {unit})"


def middle(
    voxel: Sequence[int], voxel_size: Sequence[Any], offset: Sequence[Any] = (0, 0, 0)
) -> Triple:
    """Return the world position of the middle of a voxel, in whole units."""
    return triple(
        int(o) + int(v) * int(s) + int(s) // 2
        for v, s, o in zip(voxel, voxel_size, offset, strict=True)
    )


def voxel_at(
    world: Sequence[Any], voxel_size: Sequence[Any], offset: Sequence[Any] = (0, 0, 0)
) -> Triple:
    """Return the voxel in which a world position lies."""
    return triple(
        (int(w) - int(o)) // int(s) for w, s, o in zip(world, voxel_size, offset, strict=True)
    )


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
