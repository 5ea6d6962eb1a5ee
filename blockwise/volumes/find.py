"""Find the array that a path, a dataset and a level mean, and all that is said of its place."""

import os
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from agq.blockwise.volumes.conventions import (
    attribute_sources,
    dataset_paths,
    group_sources,
    level_of,
    multiscale_sources,
)
from agq.blockwise.volumes.location import Location, RemoteLocation, locate
from agq.blockwise.volumes.metadata import (
    Metadata,
    children,
    contents,
    find_arrays,
    groups_above,
    join,
    multiscales,
    name_of,
    read_metadata,
    scale_of,
)
from agq.blockwise.volumes.placement import Source
from agq.blockwise.volumes.precomputed import scale_source
from agq.credentials import has_secret
from agq.errors import InputError


def find_array(
    path: str | os.PathLike[str], dataset: str | None, level: int | None = None
) -> tuple[Location, Metadata]:
    """Find an array by the names that `open_volume` takes.

    Raises
    ------
    InputError
        If there is no such array, or more than one that could be meant; the message lists them.
    """
    location = locate(path)
    return location, find_in(location, dataset, level)


def find_in(location: Location, dataset: str | None, level: int | None = None) -> Metadata:
    """Find an array in a container; arguments and errors are those of `find_array`."""
    key = join(dataset or "")
    metadata = read_metadata(location, key)
    if metadata is None and location.folders(key) is None:
        # A group of N5 needs no file of its own, and this server does not list it either.
        folder = Metadata(key, "folder")
        metadata = folder if next(children(location, folder), None) else None
    if metadata is None:
        raise _nothing(location, key)
    if metadata.shape is not None:
        if level not in (None, 0):
            raise InputError(
                f"{location.text}: {key or 'the path'} is one array, so level {level} cannot be "
                "picked; name the multiscale group above it, or remove level"
            )
        return metadata
    if metadata.format == "precomputed":
        return scale_of(location, metadata, level or 0)
    for multiscale in multiscales(metadata)[:1]:
        return _multiscale_level(location, metadata, multiscale, level or 0)
    arrays = [child for child in children(location, metadata) if child.shape is not None]
    for name in (f"s{level or 0}", str(level or 0), f"scale{level or 0}"):
        for child in arrays:
            if child.path == join(key, name):
                return child
    if not dataset:
        everywhere = list(islice(find_arrays(location, metadata), 2))
        if len(everywhere) == 1:
            return everywhere[0]
        if not everywhere:
            raise InputError(
                f"{location.text}: no zarr, N5 or precomputed array there; correct the path"
            )
    what = f"dataset {key!r} is a group" if key else "dataset is not named"
    raise InputError(f"{location.text}: {what}; name one array of: {contents(location)}")


def _nothing(location: Location, key: str) -> InputError:
    if isinstance(location, RemoteLocation) and has_secret(location.url):
        # A server that refuses may say so, or that there is nothing.
        return InputError(
            f"{join(location.text, key)}: nothing there that can be read; its password may be "
            "wrong or its signature may have expired: give a fresh address, or correct the path"
        )
    if key:
        return InputError(f"{location.text} has no dataset {key!r}; it holds: {contents(location)}")
    remote = ", or the credentials if it is private" if "://" in location.text else ""
    return InputError(
        f"{location.text}: no zarr, N5 or precomputed metadata found; correct the path{remote}"
    )


def _multiscale_level(
    location: Location, group: Metadata, multiscale: Mapping[str, Any], level: int
) -> Metadata:
    where = name_of(location, group)
    paths = dataset_paths(multiscale, where)
    if not 0 <= level < len(paths):
        raise InputError(f"{where} has levels 0 to {len(paths) - 1}, not {level}")
    array = read_metadata(location, join(group.path, paths[level]))
    if array is None or array.shape is None:
        raise InputError(f"{where}: the array of level {level} is missing; it is incomplete")
    return array


def sources_of(location: Location, array: Metadata) -> list[Source]:
    """Return all that the array's own metadata and those of the groups above say of its place.

    Raises
    ------
    InputError
        If some of it makes no sense, or the array is of a kind that cannot be read.
    """
    where, ndim = name_of(location, array), len(array.shape or ())
    if array.format == "precomputed":
        return [scale_source(array.attributes, where)]
    if array.attributes.get("isLabelMultiset"):
        raise InputError(
            f"{where} is a label multiset (Paintera), which cannot be read; export its labels as "
            "plain uint64"
        )
    level = level_of(array.path.rpartition("/")[2] or location.name)
    groups = list(groups_above(location, array))
    sources: list[Source] = []
    for name, group, inside in groups:
        for multiscale in multiscales(group):
            for place, path in enumerate(dataset_paths(multiscale, name)):
                if path == inside:
                    sources += multiscale_sources(multiscale, place, ndim, name)
    if array.axis_names is not None:
        sources.append(Source(f"dimension_names of {where}", axis_names=array.axis_names))
    sources += attribute_sources(
        array.attributes,
        ndim,
        where,
        x_first=array.format == "n5",
        finest=_finest(location, array) if level and "transform" in array.attributes else None,
    )
    factors = array.attributes.get("downsamplingFactors")
    for _, group, _ in groups:
        scales = group.attributes.get("scales", group.attributes.get("downsamplingFactors"))
        if factors is None and level and isinstance(scales, list) and level < len(scales):
            factors = scales[level]
    if not level or factors is not None:
        for name, group, _ in groups:
            sources += group_sources(group.attributes, factors, name)
    return sources


def _finest(location: Location, array: Metadata) -> Mapping[str, Any] | None:
    """Return the attributes of level 0 beside a coarser level."""
    above, _, name = array.path.rpartition("/")
    folder = location if array.path else location.parent()
    if folder is None:
        return None
    first = re.sub(r"\d+$", "0", name or location.name)
    level = read_metadata(folder, join(above, first))
    return None if level is None else level.attributes
