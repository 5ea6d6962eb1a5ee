"""Sections in tif files: every page is checked, so that nothing is read that is not there.

tifffile reads what is left of a damaged file and only logs it. Here what it logs as an error is
one, the pages are counted against what the file declares, and the data of a page must lie in the
file.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Context, Decimal
from math import prod
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from agq.blockwise.volumes.placement import Source
from agq.errors import InputError
from agq.pipeline.data.section_stack import (
    Section,
    Sections,
    checked,
    native,
    stack_shape,
    unreadable,
)

_MINISWHITE, _MINISBLACK, _PHOTOMETRIC = 0, 1, 262
# Axes of tifffile that are no sections: samples, and channels, of which ImageJ composes up to 7.
# More "channels" are sections that were saved without naming their axis.
_CHANNELS = 7
# ImageJ writes pixels per unit as a whole number of millionths.
_ROUNDED_PER = 100_000
_MOST_PLANES = 10**6


def open_tif(file: Path, key: str | None = None) -> Sections:
    """Open a tif file of one or many pages, or a set of OME files by one of them.

    Parameters
    ----------
    file
        The file.
    key
        Ignored: a tif file holds one stack.

    Raises
    ------
    InputError
        If it holds no stack of grey sections, or fewer than it declares. Other errors mean that
        the file is damaged.
    """
    del key
    with _opened(file) as tif:
        series = tif.series[0]
        if {(s.shape, str(s.dtype)) for s in tif.series} != {(series.shape, str(series.dtype))}:
            shapes = ", ".join(str(series.shape) for series in tif.series[:5])
            raise InputError(f"{file} holds images that are not alike: {shapes}; split it")
        first = tif.pages.first
        _require_grey(first, str(file))
        _require_no_channels(series, file)
        squeezed = [n for n in (len(tif.series), *series.shape[:-2]) if n != 1]
        shape = stack_shape((*(squeezed or [1]), *series.shape[-2:]), str(file))
        declared = _declared(tif, series)
        if declared > shape[0]:
            raise InputError(
                f"{file} declares {declared} pages, but has {shape[0]}; the file is incomplete: "
                "copy or save it again"
            )
        dtype = native(series.dtype)
        files = {file, *(_file_of(page) for page in series.pages if page is not None)}
        pages = len(tif.pages)
        if series.kind != "ome" and pages < shape[0]:
            if series.dataoffset is None:
                raise InputError(
                    f"{file}: its sections are packed in one page; save it page by page"
                )
            end = series.dataoffset + shape[0] * shape[1] * shape[2] * dtype.itemsize
            if end > tif.filehandle.size:
                raise unreadable(file, EOFError("the file ends too early"))
        inverted = _inverted(first)
        sources = _said(tif, file)

    def read(start: int) -> Iterator[Section]:
        with _opened(file) as tif:
            series = tif.series[0]
            tif.pages.useframes = False
            packed = None
            if series.kind != "ome" and pages < shape[0]:
                packed = tifffile.memmap(file, mode="r").reshape(shape)
            for number in range(start, shape[0]):
                try:
                    if packed is not None:
                        section = _upright(packed[number], first)
                    else:
                        pages_of = series.pages if series.kind == "ome" else tif.pages
                        section = _image(pages_of[number], f"{file}: section {number}")
                except InputError:
                    raise
                except Exception as error:
                    raise unreadable(file, error, number) from error
                yield checked(section, shape, dtype, f"{file}: section {number}")

    return Sections(
        str(file), tuple(sorted(files)), shape, dtype, read, inverted=inverted, sources=sources
    )


class _Errors(logging.Handler):
    """Turns what tifffile logs as an error into one, and keeps its warnings from the screen."""

    def __init__(self) -> None:
        super().__init__()
        self.first: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and self.first is None:
            self.first = record.getMessage()


@contextmanager
def _opened(file: Path) -> Iterator[tifffile.TiffFile]:
    """Open a tif file and follow the chain of its pages to the end."""
    logger, errors = logging.getLogger("tifffile"), _Errors()
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(errors)
    try:
        with tifffile.TiffFile(file) as tif:
            count = len(tif.pages)
            if (planes := _ome_planes(tif)) > _MOST_PLANES:
                # tifffile makes a list of them, whatever the file has.
                raise ValueError(f"its OME metadata name {planes} planes")
            if count == 0 or not tif.series:
                raise ValueError("it holds no image")
            if errors.first is not None:
                raise ValueError(f"after {count} pages: {errors.first}")
            yield tif
            if errors.first is not None:
                raise unreadable(file, ValueError(errors.first))
    finally:
        logger.removeHandler(errors)
        logger.propagate = propagated


def _image(page: Any, where: str) -> Section:
    """Decode one page whose data are all there."""
    if page is None:
        raise InputError(f"{where} is missing: the OME metadata name a plane that no file holds")
    handle = page.parent.filehandle
    closed = handle.closed  # the other files of an OME set are
    if closed:
        handle.open()
    try:
        page = page.aspage()
        _require_grey(page, where)
        spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if not spans or any(offset <= 0 or count <= 0 for offset, count in spans):
            raise InputError(f"{where} has no data; the file is incomplete")
        if page.compression == 1:
            # Some writers round up the length of the last strip.
            spans[-1] = (spans[-1][0], min(spans[-1][1], page.nbytes))
        if any(offset + count > handle.size for offset, count in spans):
            raise InputError(f"{where} cannot be read (the file ends too early); copy it again")
        return _upright(page.asarray(), page)
    finally:
        if closed:
            handle.close()


def _upright(image: Section, page: Any) -> Section:
    """Return an image in which 0 is black."""
    if not _inverted(page):
        return image
    if image.dtype.kind not in "bu":
        raise InputError(
            f"its type is {image.dtype.name}, and it says that 0 is white (photometric "
            "MINISWHITE), which is only known for unsigned integers; save it as MINISBLACK"
        )
    if image.dtype.kind == "b":
        return ~image
    bits = page.bitspersample
    return image.dtype.type(2 ** int(bits) - 1) - image


def _inverted(page: Any) -> bool:
    return _PHOTOMETRIC in page.tags and page.photometric == _MINISWHITE


def _require_grey(page: Any, where: str) -> None:
    if page.samplesperpixel != 1:
        raise InputError(f"{where} is a colour image {page.shape}; convert it to grey values")
    if _PHOTOMETRIC in page.tags and page.photometric not in (_MINISWHITE, _MINISBLACK):
        name = getattr(page.photometric, "name", page.photometric)
        raise InputError(
            f"{where} is an image of photometric kind {name}; convert it to grey values"
        )


def _require_no_channels(series: Any, file: Path) -> None:
    for axis, size in zip(series.axes, series.shape, strict=True):
        if axis == "S" or (axis == "C" and 1 < size <= _CHANNELS):
            raise InputError(
                f"{file} holds {size} channels, which are no sections; save one channel, with "
                "axes ZYX"
            )


def _declared(tif: tifffile.TiffFile, series: Any) -> int:
    """Return the number of pages that the metadata of a file announce."""
    if tif.is_imagej:
        about = tif.imagej_metadata or {}
        sizes = [int(about.get(name, 1)) for name in ("frames", "slices", "channels")]
        return max(int(np.prod(sizes)), int(about.get("images", 1)))
    if pixels := _ome_pixels(tif):
        return int(np.prod([int(pixels.get(f"Size{axis}", 1)) for axis in "ZCT"]))
    if tif.is_shaped:
        voxels = sum(int(np.prod(about["shape"])) for about in tif.shaped_metadata or ())
        return voxels // int(np.prod(series.shape[-2:]))
    return 0


def _ome_pixels(tif: tifffile.TiffFile) -> dict[str, Any]:
    """Return what OME metadata say of the pixels of the first image; nothing without them."""
    if not tif.is_ome or not tif.ome_metadata:
        return {}
    images = tifffile.xml2dict(tif.ome_metadata)["OME"].get("Image", {})
    image = images[0] if isinstance(images, list) else images
    pixels = image.get("Pixels", {})
    return pixels if isinstance(pixels, dict) else {}


def _ome_planes(tif: tifffile.TiffFile) -> int:
    """Return how many planes the largest image of OME metadata has; 0 without them."""
    if not tif.is_ome or not tif.ome_metadata:
        return 0
    pixels = ElementTree.fromstring(tif.ome_metadata).iter()  # noqa: S314 (expat refuses bombs)
    return max(
        (
            prod(int(p.attrib.get(f"Size{axis}", 1)) for axis in "ZCT")
            for p in pixels
            if p.tag.rpartition("}")[2] == "Pixels"
        ),
        default=0,
    )


def _said(tif: tifffile.TiffFile, file: Path) -> tuple[Source, ...]:
    """Return what OME or ImageJ metadata say of the voxel size."""
    if pixels := _ome_pixels(tif):
        sizes = tuple(pixels.get(f"PhysicalSize{axis}") for axis in "ZYX")
        units = [pixels.get(f"PhysicalSize{axis}Unit", "um") for axis in "ZYX"]
        units = ["pixel" if unit == "reference frame" else unit for unit in units]
        name = f"PhysicalSize of {file} (OME)"
        return (Source(name, voxel_size=sizes, units=units),) if None not in sizes[1:] else ()
    about = tif.imagej_metadata if tif.is_imagej else None
    unit = str((about or {}).get("unit", "pixel")).replace("\\u00B5", "u")
    if about is None or unit in ("", "pixel"):
        return ()
    tags = tif.pages.first.tags
    sizes = (about.get("spacing"), *(_size_of(tags.get(f"{axis}Resolution")) for axis in "YX"))
    name = f"spacing of {file} (ImageJ)"
    return (Source(name, voxel_size=sizes, units=unit),) if None not in sizes[1:] else ()


def _size_of(resolution: Any) -> Decimal | None:
    """Return the size of a pixel, of the pixels per unit in a tag of ImageJ."""
    if resolution is None:
        return None
    count, per = (Decimal(int(n)) for n in resolution.value)
    if not count or not per:
        return None
    if per >= _ROUNDED_PER:
        # ImageJ cuts the number: the size is the shortest that gives the same one.
        for digits in range(1, 12):
            size = Context(prec=digits).divide(per, count)
            if abs(per / size - count) <= 1:
                return size
    return per / count


def _file_of(page: Any) -> Path:
    handle = page.parent.filehandle
    return Path(handle.dirname) / handle.name
