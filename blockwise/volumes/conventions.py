"""The ways in which files say where an array lies: OME-Zarr, funlib, xarray, N5 and COSEM.

Each function turns the metadata of one group or array into `Source`; nothing is read here.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from agq.blockwise.volumes.placement import AXES, Numbers, Source, numbers_of
from agq.errors import InputError

_RELATIVE_ERROR = Decimal("1e-6")


def attribute_sources(
    attributes: Mapping[str, Any],
    ndim: int,
    where: str,
    *,
    x_first: bool = False,
    finest: Mapping[str, Any] | None = None,
) -> list[Source]:
    """Read the attributes of an array.

    Understood are ``voxel_size`` or ``resolution``, ``offset``, ``units`` and ``axis_names``
    (funlib.persistence, CREMI), ``_ARRAY_DIMENSIONS`` (xarray), ``axes``, ``pixelResolution`` and
    ``downsamplingFactors`` (N5 viewers), ``element_size_um``, and ``transform`` (COSEM).

    Parameters
    ----------
    attributes
        Of the array.
    ndim
        Number of its axes.
    where
        Its name, for messages.
    x_first
        Whether the format stores the x axis first, as N5; lists are in the same order.
    finest
        Attributes of level 0 of the array's pyramid, if it is a coarser level: COSEM places the
        centres of voxels.

    Raises
    ------
    InputError
        If an attribute makes no sense.
    """
    sources = [
        _names(attributes[key], f"{key} of {where}", x_first and key != "axes")
        for key in ("axis_names", "_ARRAY_DIMENSIONS", "axes")
        if attributes.get(key) is not None
    ]
    sources += _plain_sources(attributes, attributes.get("downsamplingFactors"), where)
    transform = attributes.get("transform")
    if isinstance(transform, Mapping):
        first = (finest or {}).get("transform")
        sources.append(_transform_source(transform, first, ndim, f"transform of {where}", x_first))
    return sources


def group_sources(attributes: Mapping[str, Any], factors: Any, where: str) -> list[Source]:
    """Read what the attributes of a group say of an array below it.

    Parameters
    ----------
    attributes
        Of the group; less than three numbers mean something else.
    factors
        Voxels of the group's resolution in a voxel of the array, per axis; None: one.
    where
        Name of the group, for messages.
    """
    placed = {
        key: value
        for key, value in attributes.items()
        if key in ("unit", "units", "pixelResolution") or (isinstance(value, list) and value[2:])
    }
    return _plain_sources(placed, factors, where)


def _names(names: Any, name: str, is_ambiguous: bool) -> Source:
    """Return axis names as a source; on N5, Python writes them in the order of its own arrays."""
    lower = [str(n).lower() for n in names] if isinstance(names, Sequence) else []
    if is_ambiguous and [n for n in lower if n in AXES] == [*AXES]:
        raise InputError(
            f"{name} says {list(names)}, but N5 stores x first; list the axes as N5 does, or "
            "remove it"
        )
    return Source(name, axis_names=names)


def _plain_sources(attributes: Mapping[str, Any], factors: Any, where: str) -> list[Source]:
    units = attributes.get("units", attributes.get("unit"))
    sources = []
    pixel = attributes.get("pixelResolution")
    if isinstance(pixel, Mapping):
        pixel = {"voxel_size": pixel.get("dimensions"), "units": pixel.get("unit", units)}
    else:
        pixel = {"voxel_size": pixel, "units": units}
    for key, values in {
        "voxel_size": {"voxel_size": attributes.get("voxel_size"), "units": units},
        "resolution": {"voxel_size": attributes.get("resolution"), "units": units},
        "pixelResolution": pixel,
        "element_size_um": {"voxel_size": attributes.get("element_size_um"), "units": "um"},
        "offset": {"offset": attributes.get("offset"), "units": units},
    }.items():
        size = values.get("voxel_size")
        if size is not None and factors is not None:
            values["voxel_size"] = _times(size, factors, f"downsamplingFactors of {where}")
        if size is not None or values.get("offset") is not None:
            sources.append(Source(f"{key} of {where}", **values))
    return sources


def _times(size: Any, factors: Any, name: str) -> Numbers:
    sizes, times = numbers_of(size, name), numbers_of(factors, name)
    if len(sizes) != len(times):
        raise InputError(f"{name}: {factors!r} does not fit the {len(sizes)} numbers {size!r}")
    return tuple(a * b for a, b in zip(sizes, times, strict=True))


def _transform_source(
    transform: Mapping[str, Any], finest: Any, ndim: int, name: str, x_first: bool
) -> Source:
    """Read the transform of COSEM: in the order of Python's arrays, on N5 too."""
    axes = transform.get("axes")
    if axes is None and x_first:
        axes = AXES
    elif axes is not None and not isinstance(axes, Sequence):
        raise InputError(f"{name}: axes {axes!r} are not a list of names")
    size, shift = transform.get("scale"), transform.get("translate")
    if size is not None and shift is not None and isinstance(finest, Mapping):
        first_size, first_shift = finest.get("scale"), finest.get("translate", [0] * len(shift))
        if first_size is not None:
            lists = [numbers_of(v, name) for v in (shift, size, first_shift, first_size)]
            if len({len(v) for v in lists}) == 1:
                shift = _corner(*lists)
    return Source(
        name,
        axis_names=axes if axes is not None and len(axes) == ndim and not x_first else None,
        voxel_size=size,
        offset=shift,
        units=transform.get("units"),
        order=axes,
    )


def level_of(name: str) -> int | None:
    """Return the level that the usual names of pyramids mean: s0, 0, scale0; else None."""
    match = re.fullmatch(r"(?:s|scale|scale_|level_?)?(\d{1,3})", name)
    return int(match[1]) if match else None


def dataset_paths(multiscale: Mapping[str, Any], where: str) -> list[str]:
    """Return the paths of the levels of a multiscale, finest first."""
    paths: list[str] = []
    for entry in multiscale["datasets"]:
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if not isinstance(path, str):
            raise InputError(f"{where}: a dataset of its multiscales is not named by a path")
        paths.append(path.strip("/").removeprefix("./"))
    return paths


def multiscale_sources(
    multiscale: Mapping[str, Any], level: int, ndim: int, where: str
) -> list[Source]:
    """Read what a multiscale says of one level (OME-Zarr 0.1 to 0.5, and COSEM's older form).

    NGFF translations place the centre of the first voxel, so a coarser level that covers the same
    space is translated by half the growth of its voxel; many writers leave that out. Offsets here
    are corners, and the corner of level 0 is taken to be its own translation: both ways of
    writing then give all levels of one pyramid the same offset.

    Parameters
    ----------
    multiscale
        One entry of ``multiscales``.
    level
        Which of its datasets.
    ndim
        Number of axes of the array.
    where
        Name of the group, for messages.

    Raises
    ------
    InputError
        If the axes are not z, y, x (and size-1 others), or the transformations are not scale and
        translation.

    Notes
    -----
    https://ngff.openmicroscopy.org/0.5/#multiscale-md : the transformations of the level come
    first, those of the whole multiscale are applied to the result.
    """
    name = f"multiscales of {where}"
    if "coordinateSystems" in multiscale:
        raise InputError(
            f"{where}: OME-Zarr with coordinateSystems (version 0.6) cannot be read yet; "
            "write its metadata as OME-Zarr 0.5 (axes, scale and translation)"
        )
    entries = [e if isinstance(e, Mapping) else {} for e in multiscale["datasets"]]
    sources = []
    transform, first = entries[level].get("transform"), entries[0].get("transform")
    if isinstance(transform, Mapping):
        sources.append(_transform_source(transform, level and first, ndim, name, x_first=False))
    declared = multiscale.get("axes")
    if declared is None:
        return sources
    if not isinstance(declared, list) or not declared:
        raise InputError(f"{name}: axes {declared!r} are not a list")
    axes = [axis if isinstance(axis, Mapping) else {"name": axis} for axis in declared]
    whole = multiscale.get("coordinateTransformations")
    first_size, first_shift = _transformed(
        [entries[0].get("coordinateTransformations"), whole], len(axes), name
    )
    size, shift = _transformed(
        [entries[level].get("coordinateTransformations"), whole], len(axes), name
    )
    corner = None
    if shift or first_shift:
        ones, zeros = (Decimal(1),) * len(axes), (Decimal(0),) * len(axes)
        corner = _corner(shift or zeros, size or ones, first_shift or zeros, first_size or ones)
    sources.append(
        Source(
            name,
            axis_names=[str(axis.get("name", "")) for axis in axes],
            voxel_size=size,
            offset=corner,
            units=[axis.get("unit") for axis in axes],
            needs_unit=True,
        )
    )
    return sources


def _transformed(
    steps: Sequence[Any], ndim: int, name: str
) -> tuple[Numbers | None, Numbers | None]:
    """Return the scale and the translation that lists of transformations make; None without any."""
    scale: Numbers | None = None
    shift: Numbers | None = None
    for transforms in steps:
        if not isinstance(transforms, list | None):
            raise InputError(f"{name}: coordinateTransformations {transforms!r} are not a list")
        for transform in transforms or []:
            if not isinstance(transform, Mapping):
                raise InputError(f"{name}: {transform!r} is not a coordinate transformation")
            kind = transform.get("type")
            if kind == "identity":
                continue
            if kind not in ("scale", "translation") or kind not in transform:
                raise InputError(
                    f"{name}: OME coordinate transformation {kind!r} cannot be used; only scale "
                    "and translation given in the metadata can"
                )
            values = numbers_of(transform[kind], f"{name}: {kind}")
            if len(values) != ndim:
                raise InputError(f"{name}: {kind} {transform[kind]} does not fit {ndim} axes")
            if kind == "translation":
                before = shift or (Decimal(0),) * ndim
                shift = tuple(a + b for a, b in zip(before, values, strict=True))
                continue
            scale = tuple(a * b for a, b in zip(scale or (Decimal(1),) * ndim, values, strict=True))
            shift = shift and tuple(a * b for a, b in zip(shift, values, strict=True))
    return scale, shift


def _corner(shift: Numbers, size: Numbers, first_shift: Numbers, first_size: Numbers) -> Numbers:
    """Return the corner of a level, whether its translation means centres or corners."""
    return tuple(
        start if abs(place - start) <= _RELATIVE_ERROR * step else place - (step - first) / 2
        for place, start, step, first in zip(shift, first_shift, size, first_size, strict=True)
    )
