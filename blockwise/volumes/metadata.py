"""Metadata of the groups and arrays in a container of zarr v2, zarr v3 or N5.

Only small JSON files are read here, so that finding an array, or listing the arrays when it is not
found, costs the same in a container of any size.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agq.blockwise.storage.files import checksum
from agq.blockwise.volumes.location import Location
from agq.errors import InputError

Format = Literal["zarr3", "zarr2", "n5", "folder"]

_LISTED = 20
_DEPTH = 5


@dataclass(frozen=True)
class Metadata:
    """What the metadata of a group or an array say.

    Attributes
    ----------
    path
        Key inside the container, "" for its root.
    format
        Which metadata file described it; "folder" where there is none.
    shape
        Array shape in the order of the file; None for a group.
    dtype
        The file's own name of the data type, for messages.
    attributes
        User attributes.
    digest
        Checksum of all the metadata.
    """

    path: str
    format: Format
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""


def join(*parts: str) -> str:
    """Join keys, without empty parts and stray slashes."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def read_metadata(location: Location, path: str) -> Metadata | None:
    """Read the metadata of one key of a container; None if there is nothing.

    Raises
    ------
    InputError
        If a metadata file is damaged.
    """
    path = join(path)
    for reader in (_zarr3, _zarr2, _n5):
        metadata = reader(location, path)
        if metadata is not None:
            return metadata
    return Metadata(path, "folder") if location.folders(path) else None


def children(location: Location, path: str) -> Iterator[Metadata]:
    """Yield the groups and arrays directly below a group, in natural order of their names."""
    for name in location.folders(path):
        if not name.startswith("."):
            metadata = read_metadata(location, join(path, name))
            if metadata is not None:
                yield metadata


def find_arrays(location: Location, path: str = "", depth: int = _DEPTH) -> Iterator[Metadata]:
    """Yield the arrays at and below a key, down to some depth of groups."""
    metadata = read_metadata(location, path)
    if metadata is not None and metadata.shape is not None:
        yield metadata
    elif metadata is not None and depth > 0:
        for child in children(location, path):
            if child.shape is not None:
                yield child
            else:
                yield from find_arrays(location, child.path, depth - 1)


def contents(location: Location) -> str:
    """Say in one line which arrays a container holds: ``raw (20, 1024, 1024) uint8, ...``."""
    arrays: list[str] = []
    for array in find_arrays(location):
        if len(arrays) == _LISTED:
            arrays.append("...")
            break
        arrays.append(f"{array.path or '(the container itself)'} {array.shape} {array.dtype}")
    return ", ".join(arrays) or "no arrays that could be found"


def multiscales(group: Metadata) -> Sequence[Mapping[str, Any]]:
    """Return the OME-Zarr multiscales of a group (NGFF 0.5 or older), or an empty list."""
    ome = group.attributes.get("ome")
    items = (ome if isinstance(ome, Mapping) else group.attributes).get("multiscales")
    if not isinstance(items, list):
        return []
    return [item for item in items if isinstance(item, Mapping) and item.get("datasets")]


def _json(location: Location, key: str) -> tuple[dict[str, Any], bytes] | None:
    data = location.get(key)
    if data is None:
        return None
    try:
        document = json.loads(data)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise InputError(f"{location.text}: the metadata file {key} is damaged (not JSON)")
    return document, data


def _zarr3(location: Location, path: str) -> Metadata | None:
    file = _json(location, join(path, "zarr.json"))
    if file is None:
        return None
    document, data = file
    attributes = document.get("attributes") or {}
    if document.get("node_type") != "array":
        return Metadata(path, "zarr3", attributes=attributes, digest=checksum(data))
    return Metadata(
        path,
        "zarr3",
        tuple(document.get("shape", ())),
        str(document.get("data_type")),
        _with_dimension_names(attributes, document.get("dimension_names")),
        checksum(data),
    )


def _with_dimension_names(attributes: dict[str, Any], names: Any) -> dict[str, Any]:
    if "axis_names" not in attributes and isinstance(names, list):
        return {**attributes, "axis_names": names}
    return attributes


def _zarr2(location: Location, path: str) -> Metadata | None:
    array = _json(location, join(path, ".zarray"))
    user = _json(location, join(path, ".zattrs"))
    attributes, attribute_data = user or ({}, b"")
    if array is not None:
        document, data = array
        return Metadata(
            path,
            "zarr2",
            tuple(document.get("shape", ())),
            str(document.get("dtype")),
            attributes,
            checksum(data + attribute_data),
        )
    if user is not None or location.get(join(path, ".zgroup")) is not None:
        return Metadata(path, "zarr2", attributes=attributes, digest=checksum(attribute_data))
    return None


def _n5(location: Location, path: str) -> Metadata | None:
    file = _json(location, join(path, "attributes.json"))
    if file is None:
        return None
    document, data = file
    if "dimensions" not in document or "dataType" not in document:
        return Metadata(path, "n5", attributes=document, digest=checksum(data))
    shape = tuple(document["dimensions"])
    return Metadata(path, "n5", shape, str(document["dataType"]), document, checksum(data))
