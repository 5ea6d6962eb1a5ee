"""Grey values of raw: whether the network can use them, and which sections stand out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final, Literal

from agq.blockwise.predict.paths import spec_path
from agq.blockwise.predict.spec import PredictSpec
from agq.blockwise.volumes.open import Volume
from agq.blockwise.volumes.sections import Sections, read_sections
from agq.errors import InputError

Normalise = Literal["none", "volume", "section"] | None
Contrast = tuple[tuple[float, float], ...]

READS: Final = 1024
"""Chunks of raw that a plan, and a measurement of a whole volume's contrast, read at most."""

_BLACK, _WHITE = 0.1, 0.9
_READS: Final = 128
_LEAST_CONTRAST, _LITTLE_CONTRAST = 0.1, 0.25


def contrast_of_run(
    run_dir: Path,
    raw: Volume,
    normalise: Normalise,
    on_progress: Callable[[int, int], object] | None = None,
) -> Contrast | None:
    """Return the grey values that become black and white, as the run has them or measured now.

    Parameters
    ----------
    run_dir
        Run folder; what its ``predict.json`` holds is not measured again.
    raw
        The volume.
    normalise
        `model.normalise` of the configuration.
    on_progress
        As for `read_sections`.

    Returns
    -------
    pairs
        One pair for the volume, or one for each section; None if grey values stay as they are.
    """
    if normalise in (None, "none"):
        return None
    if spec_path(run_dir).exists():
        recorded = PredictSpec.load(run_dir).contrast
        if recorded is not None:
            return recorded
    whole = normalise == "volume"
    sections = read_sections(raw, most_reads=READS if whole else None, on_progress=on_progress)
    return (contrast_of_volume(sections),) if whole else contrast_of_sections(sections)


def contrast_of_volume(sections: Sections) -> tuple[float, float]:
    """Return the grey values that become black and white, from usual percentiles of sections."""
    low, high = sections.usual() or (0.0, sections.span)
    return _stretch(low, high if high > low else low + sections.span)


def contrast_of_sections(sections: Sections) -> Contrast:
    """Return the same for each section; one without contrast gets what is usual."""
    return tuple(_stretch(low, high) for low, high in sections.ends().tolist())


def _stretch(low: float, high: float) -> tuple[float, float]:
    """Return black and white such that the percentiles lie about where they do in real EM."""
    width = (high - low) / (_WHITE - _BLACK)
    black = low - _BLACK * width
    return black, black + width


def check_greys(raw: Volume) -> list[str]:
    """Look at a sample of a volume that is to be used as it is; return notes.

    Raises
    ------
    InputError
        If its values are outside of what the network takes, or have very little contrast.
    """
    try:
        seen = read_sections(raw, most_reads=_READS)
    except InputError as error:
        return [f"the contrast is not known: {error}"]
    advice = "set model.normalise: volume, or section"
    if raw.dtype.kind == "f" and (seen.least < 0 or seen.most > 1):
        raise InputError(
            f"input.raw: {raw.name} is float32 with values from {seen.least:g} to {seen.most:g}; "
            f"the network takes 0 to 1: {advice}"
        )
    usual = seen.usual()
    if usual is None:
        return []
    low, high = usual
    share = (high - low) / seen.span
    if share >= _LITTLE_CONTRAST:
        return []
    found = (
        f"grey values of {raw.name} are {low:g} to {high:g} (1st and 99th percentile), "
        f"{share:.1%} of what {raw.dtype} holds"
    )
    if share < _LEAST_CONTRAST:
        raise InputError(
            f"input.raw: {found}: the network would see next to nothing; {advice} (none uses them "
            "as they are)"
        )
    return [f"{found}; if the result is poor, {advice}"]


def suggestion(sections: Sections, depth: int, named: Iterable[int]) -> str | None:
    """Return a line on sections that stand out and are not named as bad; None if none does.

    Parameters
    ----------
    sections
        What was looked at.
    depth
        Sections of the volume.
    named
        `input.bad_sections` of the configuration.
    """
    found = sections.outstanding()
    new = {z: why for z, why in found.items() if z not in set(named)}
    if not new:
        return None
    reasons = ", ".join(f"{_range(group)} {new[group[0]]}" for group in _runs(new))
    listed = ", ".join(map(_range, _runs(dict.fromkeys([*new, *named], ""))))
    part = "" if sections.z.size == depth else f" ({sections.z.size} of {depth} were looked at)"
    return (
        f"sections that stand out: {reasons}{part}; look at them, and if they are bad set "
        f"input.bad_sections: [{listed}]"
    )


def _runs(found: Mapping[int, str]) -> list[list[int]]:
    """Return sections that follow each other for the same reason as lists."""
    keyed = groupby(enumerate(sorted(found)), key=lambda item: (item[1] - item[0], found[item[1]]))
    return [[z for _, z in group] for _, group in keyed]


def _range(members: Sequence[int]) -> str:
    return str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
