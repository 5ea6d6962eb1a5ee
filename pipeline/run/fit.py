"""Whether voxels of a volume have the size that the network was trained at."""

from collections.abc import Iterator, Sequence
from typing import Final

from agq.blockwise.volumes.open import Volume, open_volume
from agq.blockwise.volumes.placement import PER_NANOMETRE
from agq.errors import InputError

LIMIT: Final = 1.5
"""Largest ratio of voxel sizes, on any axis, at which a network is used unasked."""

_MOST_LEVELS: Final = 16

Size = tuple[float, float, float]


def nanometres(volume: Volume) -> Size:
    """Return the voxel size of a volume, (z, y, x), in nanometres."""
    z, y, x = (int(size) / PER_NANOMETRE[volume.unit] for size in volume.voxel_size)
    return z, y, x


def ratios(size: Sequence[float], trained: Sequence[float]) -> Size:
    """Return how many times larger than at training voxels are, on each axis (z, y, x)."""
    z, y, x = (a / b for a, b in zip(size, trained, strict=True))
    return z, y, x


def fits(size: Sequence[float], trained: Sequence[float]) -> bool:
    """Tell whether two voxel sizes differ by no more than `LIMIT` on any axis."""
    return all(map(_is_near, ratios(size, trained)))


def misfit(size: Sequence[float], trained: Sequence[float]) -> str:
    """Say on which axes voxel sizes do not fit, and by how much."""
    named = zip("zyx", ratios(size, trained), strict=True)
    return ", ".join(
        f"{axis} {_apart(ratio):.3g} times {'larger' if ratio > 1 else 'smaller'}"
        for axis, ratio in named
        if not _is_near(ratio)
    )


def show(size: Sequence[float]) -> str:
    """Return a size in nanometres for messages."""
    return " x ".join(f"{value:.6g}" for value in size) + " nm"


def require_fit(raw: Volume, dataset: str | None, checkpoint: str, trained: Size) -> None:
    """Refuse a volume whose voxels are not of the size that a network was trained at.

    Parameters
    ----------
    raw
        The volume.
    dataset
        `input.raw.dataset` of the configuration.
    checkpoint
        `model.checkpoint` of the configuration.
    trained
        Voxel size (z, y, x) in nanometres of the checkpoint.

    Raises
    ------
    InputError
        If the sizes differ by more than `LIMIT`, with the ratio and what to do.
    """
    size = nanometres(raw)
    if fits(size, trained):
        return
    raise InputError(
        f"input.raw: voxels of {show(size)}, but checkpoint {checkpoint} was trained at "
        f"{show(trained)}: {misfit(size, trained)} (up to {LIMIT} times fits). "
        f"{_advice(raw, dataset, trained)}train or choose a checkpoint for these voxels, or set "
        "model.any_voxel_size: true to use this one all the same"
    )


def _advice(raw: Volume, dataset: str | None, trained: Size) -> str:
    """Return what is probably wrong, as the beginning of a sentence."""
    size = nanometres(raw)
    if fits(size[::-1], trained):
        return "In reverse order they fit: sizes are (z, y, x); if that is not it, "
    for factor, unit in ((10, "angstrom"), (1000, "pm"), (1e6, "fm")):
        for power in (factor, 1 / factor):
            if fits([value / power for value in size], trained):
                return (
                    f"The factor is about {power:g}: check the unit of the voxel size"
                    f"{f' ({unit}?)' if power > 1 and unit != 'fm' else ''}; if that is not it, "
                )
    levels = list(_levels(raw, dataset))
    fitting = [(field, at) for field, at in levels if fits(at, trained)]
    if fitting:
        field, at = min(fitting, key=lambda level: max(map(_apart, ratios(level[1], trained))))
        return f"{field} of the same pyramid ({show(at)}) fits; else "
    return f"None of the pyramid's {len(levels)} levels fits: " if len(levels) > 1 else "Resample, "


def _levels(raw: Volume, dataset: str | None) -> Iterator[tuple[str, Size]]:
    """Yield the setting and the voxel size of every level of the pyramid that a volume is of."""
    above, _, name = raw.dataset.rpartition("/")
    container, _, last = raw.path.rstrip("/").rpartition("/")
    groups = [(raw.path, dataset)]
    groups += [(raw.path, above)] if name else [(container, None)] if container and last else []
    for path, group in dict.fromkeys(groups):
        found = _levels_of(path, group, raw.unit)
        if any(level.shape == raw.shape for level in found.values()) and len(found) > 1:
            for number, level in found.items():
                field = f"input.raw.level: {number}"
                if (path, group) != (raw.path, dataset):
                    field = f"input.raw.path: {path}, dataset: {level.dataset}"
                yield field, nanometres(level)
            return


def _levels_of(path: str, group: str | None, unit: str) -> dict[int, Volume]:
    found: dict[int, Volume] = {}
    for level in range(_MOST_LEVELS):
        try:
            volume = open_volume(path, group or None, level=level, unit=unit)
        except InputError:
            # There is no such level, or its voxels are not whole in this unit.
            continue
        # The only array of a container is opened whatever the level.
        if all(other.dataset != volume.dataset for other in found.values()):
            found[level] = volume
    return found


def _is_near(ratio: float) -> bool:
    # A ratio of 1.5 itself fits, whatever its last bit.
    return _apart(ratio) <= LIMIT + 1e-9


def _apart(ratio: float) -> float:
    return max(ratio, 1 / ratio)
