"""Metadata of the groups and arrays in a container of zarr v2, zarr v3, N5 or precomputed.

A precomputed volume is a group, and each scale of its ``info`` an array in it, named by its key.

Only small JSON files are read here, so that finding an array, or listing the arrays when it is not
found, costs the same in a container of any size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

from agq.blockwise.storage.files import checksum
from agq.blockwise.volumes.location import Location
from agq.errors import InputError
from agq.reading import parse_json

Format = Literal["zarr3", "zarr2", "n5", "precomputed", "folder"]

_LISTED = 20
_DEPTH = 5
_LOOKED_AT = 5000
_HEIGHT = 8

_CONTAINERS = (".zarr", ".n5")

_USUAL = (
    *("s0", "0", "scale0", "raw", "image", "em", "labels", "fragments", "segmentation"),
    *("affinities", "affs", "mask", "data", "volumes"),
)


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
    axis_names
        ``dimension_names`` of zarr v3, as they stand there.
    digest
        Checksum of all the metadata.
    """

    path: str
    format: Format
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    axis_names: Any = None


def join(*parts: str) -> str:
    """Join keys, without empty parts and stray slashes."""
    return "/".join(part.strip("/") for part in parts if part.strip("/"))


def name_of(location: Location, metadata: Metadata) -> str:
    """Return the name of a group or array for messages."""
    return f"{location.text}:{metadata.path}" if metadata.path else location.text


def read_metadata(location: Location, path: str) -> Metadata | None:
    """Read the metadata of one key of a container; None if there is nothing.

    Raises
    ------
    InputError
        If a metadata file is damaged.
    """
    path = join(path)
    for reader in _READERS.values():
        metadata = reader(location, path)
        if metadata is not None:
            return metadata
    return Metadata(path, "folder") if location.folders(path) else None


def groups_above(location: Location, array: Metadata) -> Iterator[tuple[str, Metadata, str]]:
    """Yield the groups above an array, nearest first: name, metadata, the array's path inside.

    Groups above the container's path count too, up to a folder named like a container.
    """
    given, key, inside = location, array.path, ""
    for _ in range(_HEIGHT):
        if not key:
            name = location.name
            above = location.parent()
            if above is None or name.endswith(_CONTAINERS):
                return
            location, key = above, ""
        else:
            key, _, name = key.rpartition("/")
        inside = join(name, inside)
        try:
            group = _READERS[array.format](location, key)
        except InputError as error:
            if given is location or error.__cause__ is None:
                raise
            return  # What lies above the path given may be closed to this user; damage is not.
        if group is not None and group.shape is None:
            yield name_of(location, group), group, inside


def children(location: Location, group: Metadata) -> Iterator[Metadata]:
    """Yield the groups and arrays directly below a group, in order of their names.

    Where folders cannot be listed, as on web servers, the usual names are tried.
    """
    if group.format == "precomputed":
        yield from (scale_of(location, group, i) for i in range(scales_of(group)))
        return
    names = location.folders(group.path)
    reader = read_metadata if names is not None else _READERS.get(group.format, read_metadata)
    for name in _USUAL if names is None else names:
        if not name.startswith("."):
            metadata = reader(location, join(group.path, name))
            if metadata is not None:
                yield metadata


def find_arrays(
    location: Location, group: Metadata, depth: int = _DEPTH, looked: Iterator[int] | None = None
) -> Iterator[Metadata]:
    """Yield the arrays below a group, down to some depth of groups.

    Raises
    ------
    InputError
        If there are too many groups to look at, as where links lead back.
    """
    looked = looked or count(1)
    for child in children(location, group):
        if next(looked) > _LOOKED_AT:
            raise InputError(
                f"{location.text}: it holds more than {_LOOKED_AT} folders; name the dataset"
            )
        if child.shape is not None:
            yield child
        elif depth > 1:
            yield from find_arrays(location, child, depth - 1, looked)


def contents(location: Location) -> str:
    """Say in one line which arrays a container holds: ``raw (20, 1024, 1024) uint8, ...``."""
    arrays: list[str] = []
    root = read_metadata(location, "") or Metadata("", "folder")
    for array in [root] if root.shape is not None else find_arrays(location, root):
        if len(arrays) == _LISTED:
            arrays.append("...")
            break
        arrays.append(f"{array.path or '(the container itself)'} {array.shape} {array.dtype}")
    return ", ".join(arrays) or "no arrays that could be found"


def multiscales(group: Metadata) -> Sequence[Mapping[str, Any]]:
    """Return the multiscales of a group (OME-Zarr), or an empty list."""
    ome = group.attributes.get("ome")
    items = (ome if isinstance(ome, Mapping) else group.attributes).get("multiscales")
    if not isinstance(items, list):
        return []
    return [
        item
        for item in items
        if isinstance(item, Mapping) and isinstance(item.get("datasets"), list) and item["datasets"]
    ]


def _json(location: Location, key: str) -> tuple[dict[str, Any], bytes] | None:
    data = location.get(key)
    if data is None:
        return None
    try:
        document = parse_json(data)
    except ValueError as error:
        raise InputError(f"{location.text}: the metadata file {key} is damaged ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{location.text}: the metadata file {key} is damaged (not an object)")
    return document, data


def _zarr3(location: Location, path: str) -> Metadata | None:
    key = join(path, "zarr.json")
    file = _json(location, key)
    if file is None:
        return None
    document, data = file
    attributes = _attributes(document.get("attributes"), location, key)
    if document.get("node_type") != "array":
        return Metadata(path, "zarr3", attributes=attributes, digest=checksum(data))
    return Metadata(
        path,
        "zarr3",
        _shape(document.get("shape"), location, key),
        str(document.get("data_type")),
        attributes,
        checksum(data),
        document.get("dimension_names"),
    )


def _zarr2(location: Location, path: str) -> Metadata | None:
    key = join(path, ".zarray")
    array = _json(location, key)
    user = _json(location, join(path, ".zattrs"))
    attributes, attribute_data = user or ({}, b"")
    if array is not None:
        document, data = array
        return Metadata(
            path,
            "zarr2",
            _shape(document.get("shape"), location, key),
            str(document.get("dtype")),
            attributes,
            checksum(data + attribute_data),
        )
    if user is not None or location.get(join(path, ".zgroup")) is not None:
        return Metadata(path, "zarr2", attributes=attributes, digest=checksum(attribute_data))
    return None


def _n5(location: Location, path: str) -> Metadata | None:
    key = join(path, "attributes.json")
    file = _json(location, key)
    if file is None:
        return None
    document, data = file
    if "dimensions" not in document or "dataType" not in document:
        return Metadata(path, "n5", attributes=document, digest=checksum(data))
    shape = _shape(document["dimensions"], location, key)
    return Metadata(path, "n5", shape, str(document["dataType"]), document, checksum(data))


def _precomputed(location: Location, path: str) -> Metadata | None:
    """Read a volume, or a scale of the volume above."""
    group = _info(location, path)
    above = path
    while group is None and above:
        above = above.rpartition("/")[0]
        volume = _info(location, above)
        for i in range(scales_of(volume) if volume else 0):
            scale = volume and volume.attributes["scales"][i]
            if isinstance(scale, dict) and join(above, str(scale.get("key"))) == path:
                return volume and scale_of(location, volume, i)
    return group


def _info(location: Location, path: str) -> Metadata | None:
    file = _json(location, join(path, "info"))
    # Meshes and skeletons have such a file too.
    if file is None or not isinstance(file[0].get("scales"), list):
        return None
    return Metadata(path, "precomputed", attributes=file[0], digest=checksum(file[1]))


def scales_of(volume: Metadata) -> int:
    """Return the number of scales of a precomputed volume."""
    return len(volume.attributes["scales"])


def scale_of(location: Location, volume: Metadata, index: int) -> Metadata:
    """Return a scale of a precomputed volume as an array.

    Its attributes are those of the scale, with its ``index`` and the ``volume`` that it is of. The
    order of its axes is x, y, z, channel.

    Raises
    ------
    InputError
        If the volume has no such scale, or it is damaged.
    """
    info, count = volume.attributes, scales_of(volume)
    if not 0 <= index < count:
        where = name_of(location, volume)
        raise InputError(f"{where} has levels 0 to {count - 1}, not {index}")
    key = join(volume.path, "info")
    scale = info["scales"][index]
    if not isinstance(scale, dict) or not isinstance(scale.get("key"), str):
        raise InputError(f"{location.text}: scale {index} in {key} is damaged")
    channels = info.get("num_channels", 1)
    size = _shape(scale.get("size"), location, key)
    return Metadata(
        join(volume.path, scale["key"]),
        "precomputed",
        (*size, *_shape([channels], location, key)),
        str(info.get("data_type")),
        {**scale, "index": index, "volume": volume.path},
        volume.digest,
    )


def _attributes(values: Any, location: Location, key: str) -> Mapping[str, Any]:
    if not isinstance(values, dict | None):
        raise InputError(f"{location.text}: attributes in {key} are not an object")
    return values or {}


def _shape(values: Any, location: Location, key: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise InputError(f"{location.text}: the shape {values!r} in {key} is not that of an array")
    return tuple(values)


_READERS: dict[str, Callable[[Location, str], Metadata | None]] = {
    "zarr3": _zarr3,
    "zarr2": _zarr2,
    "n5": _n5,
    "precomputed": _precomputed,
}
