"""Stacks of image files, one section each: which files, in which order, and none left out."""

import glob
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from agq.errors import InputError
from agq.paths import expanded
from agq.pipeline.data.numbering import in_order, listed
from agq.pipeline.data.section_stack import (
    Section,
    Sections,
    checked,
    native,
    require_section,
    unreadable,
)
from agq.pipeline.data.tif import open_tif
from agq.reading import read_file

TIF = (".tif", ".tiff")
IMAGES = (*TIF, ".png")
OTHER_IMAGES = (".jpg", ".jpeg", ".jp2", ".bmp", ".gif", ".webp")
"""Images that are no sections, but show that a folder is meant to be a stack."""

_WIDEST = np.dtype("u8")  # four channels of 16 bits
_PNG_END = b"IEND\xaeB`\x82"


def is_stack(text: str) -> bool:
    """Tell whether a path is a folder of images, or a glob that matches any file."""
    place = expanded(text)
    if place.is_dir():
        return any(entry.suffix.lower() in (*IMAGES, *OTHER_IMAGES) for entry in place.iterdir())
    return not place.exists() and glob.has_magic(text) and bool(_matches(place))


def open_files(text: str, gap_value: float | None = None) -> Sections:
    """Open a folder or glob of tif or png files.

    Parameters
    ----------
    text
        The folder or glob.
    gap_value
        Fills the sections whose number no file has; None: they are an error.

    Raises
    ------
    InputError
        One line that names the files that are not one whole stack.
    """
    place = expanded(text)
    if place.is_dir():
        files = [p for p in place.iterdir() if not p.name.startswith(".")]
        others = [p for p in files if p.suffix.lower() in OTHER_IMAGES]
        files = [p for p in files if p.suffix.lower() in IMAGES]
    else:
        files = _matches(place)
        others = [p for p in files if p.suffix.lower() not in IMAGES]
    if others:
        raise InputError(
            f"{text}: {others[0].name} is no tif or png file; convert it, or name the sections by "
            "a glob that leaves it out"
        )
    if not files:
        raise InputError(f"{text}: no tif or png sections found; correct the path")
    _require_files(files, text)
    kinds = {"tif" if file.suffix.lower() in TIF else ".png" for file in files}
    if len(kinds) > 1:
        raise InputError(f"{text} mixes {' and '.join(sorted(kinds))} files; keep one kind")
    if whole := _one_set(files, text):
        return whole
    ordered = in_order(files, text)
    if ordered.missing and gap_value is None:
        count = len(ordered.missing)
        raise InputError(
            f"{text}: {count} section{'s are' if count > 1 else ' is'} missing, by number: "
            f"{listed(ordered.missing)}; add the files, allow gaps (--allow-gaps, or allow_gaps: "
            "true), or rename the files if these numbers do not count sections"
        )
    return _stack(text, ordered.places, ordered.missing, gap_value)


def _matches(pattern: Path) -> list[Path]:
    root = Path(pattern.anchor)
    found = root.glob(str(pattern.relative_to(root)))
    # Folders beside the sections may match too; a link to nowhere is a section that is lost.
    return [file for file in found if not file.is_dir() or file.suffix.lower() in IMAGES]


def _require_files(files: list[Path], where: str) -> None:
    for file in files:
        if file.is_symlink() and not file.exists():
            raise InputError(
                f"{where}: {file.name} is a link to {file.readlink()}, which does not exist; "
                "restore that file or remove the link"
            )
        if not file.is_file():
            raise InputError(f"{where}: {file.name} is no file; remove it")


def _one_set(files: list[Path], where: str) -> Sections | None:
    """Open files of one OME set, whose metadata say where each plane lies."""
    first = min(files)
    if first.suffix.lower() not in TIF:
        return None
    whole = _tif(first)
    members = {file.resolve() for file in whole.files}
    if len(members) < 2:
        return None
    stray = sorted(file.name for file in files if file.resolve() not in members)
    if stray:
        raise InputError(
            f"{where}: {listed(stray)} do not belong to the OME set of {first.name}; move them away"
        )
    return whole


def _tif(file: Path) -> Sections:
    try:
        return open_tif(file)
    except InputError:
        raise
    except Exception as error:
        raise unreadable(file, error) from error


def _image(file: Path) -> Section:
    if file.suffix.lower() in TIF:
        stack = _tif(file)
        if stack.shape[0] != 1:
            raise InputError(
                f"{file} holds 3-D data of shape {stack.shape}; in a folder each file is one 2-D "
                "section: name this file alone"
            )
        return next(stack.read(0))
    data = read_file(file)
    # A file of a few megabytes can unpack to any number of zeros.
    if data[12:16] == b"IHDR" and len(data) >= 24:
        require_section(struct.unpack_from(">II", data, 16), _WIDEST, str(file))
    try:
        image = np.asarray(imagecodecs.png_decode(data))
    except Exception as error:
        raise unreadable(file, error) from error
    if _PNG_END not in data:
        raise unreadable(file, EOFError("the file ends too early"))
    if image.ndim != 2:
        raise InputError(
            f"{file} holds {image.ndim}-D data of shape {image.shape}; a section must be one 2-D "
            "grey-value image"
        )
    return image


def _stack(
    name: str,
    places: tuple[Path | None, ...],
    missing: tuple[str, ...],
    gap_value: float | None,
) -> Sections:
    files = tuple(file for file in places if file is not None)
    first = _image(files[0])
    shape = (len(places), first.shape[0], first.shape[1])
    dtype = native(first.dtype)
    if missing and not _fits(gap_value, dtype):
        raise InputError(f"{name}: the gap value {gap_value} is no {dtype}; correct gap_value")
    filled = None if not missing else np.full(first.shape, gap_value, dtype)

    def read(start: int) -> Iterator[Section]:
        for file in places[start:]:
            if file is None:
                assert filled is not None
                yield filled
            else:
                yield checked(_image(file), shape, dtype, str(file), files[0].name)

    about = _tif(files[0]) if files[0].suffix.lower() in TIF else None
    return Sections(
        name,
        files,
        shape,
        dtype,
        read,
        places=places,
        inverted=about is not None and about.inverted,
        sources=() if about is None else about.sources,
        filled=missing,
        fill_value=gap_value if missing else None,
    )


def _fits(value: float | None, dtype: np.dtype[Any]) -> bool:
    with np.errstate(invalid="ignore"):
        return bool(np.array(value).astype(dtype) == value)
