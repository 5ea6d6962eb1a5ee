"""Sections of a dataset in an HDF5 file, with links followed and nothing read that is not there.

HDF5 reads data that were never found as fill values: sources of a virtual dataset and external
files are therefore looked for before.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from agq.blockwise.volumes.conventions import attribute_sources, group_sources
from agq.blockwise.volumes.placement import AXES, Source, axes_of
from agq.blockwise.volumes.triples import Triple, triple
from agq.errors import InputError
from agq.pipeline.data.section_stack import (
    Section,
    Sections,
    choose,
    native,
    stack_shape,
    unreadable,
)
from agq.reading import NotAFileError, require_file

# HDF5 decodes whole chunks: sections that share one are read together, up to this many bytes.
_READ_BYTES = 2**28
_ENDS = ("Min", "Max")
_OWN_FILTERS = 256
"""Filters below this number are HDF5's own; others are plugins."""


def open_hdf5(file: Path, key: str | None) -> Sections:
    """Open a dataset of an HDF5 file.

    Parameters
    ----------
    file
        The file.
    key
        Path of the dataset, which may lead through links; may be left out where only one is 3-D.

    Raises
    ------
    InputError
        If it holds no stack of sections, or data of it are in files that are not there. Other
        errors mean that the file is damaged.
    """
    with h5py.File(file, "r") as store:
        chosen = _choose(store, key, file)
        dataset = store[chosen]
        where = f"{file}:{chosen}"
        files = _files(dataset, where)
        _require_filters(dataset, where)
        dtype = native(dataset.dtype)
        array_shape = dataset.shape or ()
        padded_from, sources = _imaris(dataset, where)
        sources += _said(dataset, where)
        z, y, x = axes = axes_of(sources, array_shape, where)
        shape = padded_from or triple(array_shape[axis] for axis in axes)
        if any(n != 1 for axis, n in enumerate(array_shape) if axis not in axes):
            stack_shape(array_shape, where)
        stack_shape(shape, where)
        together = (dataset.chunks or (1,) * dataset.ndim)[z]
    step = max(1, min(together, _READ_BYTES // (shape[1] * shape[2] * dtype.itemsize)))

    def read(start: int) -> Iterator[Section]:
        with h5py.File(file, "r") as store:
            for low in range(start, shape[0], step):
                window: list[Any] = [0] * len(store[chosen].shape)
                window[z] = slice(low, min(low + step, shape[0]))
                window[y], window[x] = slice(shape[1]), slice(shape[2])
                try:
                    group = store[chosen][tuple(window)]
                except Exception as error:
                    raise unreadable(where, error, low) from error
                ranks = sorted(axes)
                yield from group.transpose([ranks.index(axis) for axis in axes])

    return Sections(
        where,
        (file, *(other for other in files if other != file)),
        shape,
        dtype,
        read,
        sources=tuple(sources),
        array_shape=array_shape,
    )


def _choose(store: h5py.File, key: str | None, file: Path) -> str:
    if key is not None:
        _require_links(store, key, file)
        named = store.get(key)
        if isinstance(named, h5py.Dataset):
            return key.strip("/")
    found: dict[h5py.Dataset, str] = {}
    for name, item in _datasets(store, "", set()):
        found.setdefault(item, name)  # a link is only another name
    for ranks in ((3,), range(4, 33)):
        choices = {
            name: f"{item.shape} {item.dtype}"
            for item, name in found.items()
            if len(item.shape or ()) in ranks
        }
        if choices:
            break
    return choose(key, choices, str(file))


def _datasets(group: h5py.Group, prefix: str, seen: set[Any]) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield the datasets below a group, those behind links last; each group is looked at once."""
    seen.add(group.id)
    for name in sorted(
        group, key=lambda n: not isinstance(group.get(n, getlink=True), h5py.HardLink)
    ):
        try:
            _require_target(group, name)
            item = group[name]
        except (KeyError, OSError, RuntimeError, NotAFileError):
            continue  # a link to nowhere is named when it is asked for
        if isinstance(item, h5py.Dataset):
            yield f"{prefix}{name}", item
        elif isinstance(item, h5py.Group) and item.id not in seen:
            yield from _datasets(item, f"{prefix}{name}/", seen)


def _require_target(group: h5py.Group, name: str) -> None:
    """Check that a link to another file leads to one: HDF5 would wait at a FIFO."""
    link = group.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        require_file(Path(group.file.filename).parent / link.filename)


def _require_links(store: h5py.File, key: str, file: Path) -> None:
    """Check every link on the way to a dataset."""
    group: Any = store
    for name in filter(None, key.split("/")):
        if not isinstance(group, h5py.Group):
            return
        link = group.get(name, getlink=True)
        if link is None:
            return
        try:
            _require_target(group, name)
            group = group[name]
        except Exception as error:
            if isinstance(link, h5py.ExternalLink):
                target = f"{link.filename}:{link.path}, and that cannot be opened"
            elif isinstance(link, h5py.SoftLink):
                target = f"{link.path}, which is not there"
            else:
                raise unreadable(f"{file}:{key}", error) from error
            raise InputError(
                f"{file}: {name} in {key!r} is a link to {target}; restore it, or name another "
                "dataset"
            ) from error


def _files(dataset: h5py.Dataset, where: str) -> list[Path]:
    """Return the other files that hold data of a dataset."""
    own = Path(dataset.file.filename)
    folder, found = own.parent, []
    for name, offset, size in dataset.external or ():
        source = folder / (name.decode() if isinstance(name, bytes) else name)
        have = source.stat().st_size if source.is_file() else 0
        if have < offset + (size if size != h5py.h5f.UNLIMITED else 1):
            raise InputError(
                f"{where} keeps its data in {source}, which is missing or too short; restore it"
            )
        found.append(source)
    if dataset.is_virtual:
        for source in dataset.virtual_sources():
            if source.file_name == ".":
                continue
            place = folder / source.file_name
            try:
                require_file(place)
                with h5py.File(place, "r") as store:
                    store[source.dset_name]
            except Exception as error:
                raise InputError(
                    f"{where} is a virtual dataset with data in {place}:{source.dset_name}, which "
                    "cannot be opened; restore it"
                ) from error
            found.append(place)
    # A link may have led into another file.
    return sorted({own, *found})


def _require_filters(dataset: h5py.Dataset, where: str) -> None:
    plist = dataset.id.get_create_plist()
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if h5py.h5z.filter_avail(code):
            continue
        with suppress(ImportError):
            importlib.import_module("hdf5plugin")  # makes its filters known
        if not h5py.h5z.filter_avail(code):
            title = name.decode(errors="replace") or "unknown"
            way = "pip install hdf5plugin, " if code >= _OWN_FILTERS else ""
            raise InputError(
                f"{where} is compressed by the filter {title} ({code}), which this installation "
                f"cannot decode; {way}or save it with gzip"
            )


def _said(dataset: h5py.Dataset, where: str) -> list[Source]:
    """Return what the attributes of a dataset and of the groups above it say of its place."""
    attributes = _attributes(dataset)
    sources = attribute_sources(attributes, dataset.ndim, where)
    labels = [dim.label for dim in dataset.dims]
    if all(labels):
        sources.append(Source(f"dimension labels of {where}", axis_names=labels))
    tags = attributes.get("axistags")  # of vigra and ilastik
    if isinstance(tags, str):
        try:
            names = [str(axis["key"]) for axis in json.loads(tags)["axes"]]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{where}: its axistags {tags!r} name no axes") from None
        sources.append(Source(f"axistags of {where}", axis_names=names))
    long = [axis for axis, size in enumerate(dataset.shape or ()) if size != 1]
    if not any(source.axis_names for source in sources) and dataset.ndim > len(long) == 3:
        names = [f"d{axis}" for axis in range(dataset.ndim)]
        for axis, name in zip(long, AXES, strict=True):
            names[axis] = name
        sources.append(Source(f"shape of {where}", axis_names=names))
    for group in _above(dataset):
        sources += group_sources(_attributes(group), None, f"{dataset.file.filename}:{group.name}")
    return sources


def _imaris(dataset: h5py.Dataset, where: str) -> tuple[Triple | None, list[Source]]:
    """Return size and voxel size of an Imaris channel, whose dataset is padded to whole chunks."""
    channel = _attributes(dataset.parent)
    image = dataset.file.get("DataSetInfo/Image")
    if "ImageSizeZ" not in channel or image is None:
        return None, []
    about = _attributes(image)
    try:
        shape = triple("".join(channel[f"ImageSize{axis}"]) for axis in "ZYX")
        # Extents are numbered x, y, z.
        ends = [[Decimal("".join(about[f"Ext{end}{n}"])) for n in (2, 1, 0)] for end in _ENDS]
        size = [(high - low) / n for low, high, n in zip(*ends, shape, strict=True)]
        unit = "".join(about.get("Unit", "um"))
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"{where}: size or extent of its Imaris image is malformed") from error
    return shape, [Source(f"extent of {where}", voxel_size=size, units=unit)]


def _above(item: Any) -> Iterator[h5py.Group]:
    """Yield the groups above a dataset, the nearest first."""
    while item.name not in (None, "/"):
        item = item.parent
        yield item


def _attributes(item: Any) -> dict[str, Any]:
    """Return the attributes of an object as plain values; those of other types are left out."""
    plain: dict[str, Any] = {}
    for name in item.attrs:
        with suppress(OSError, TypeError, ValueError, RuntimeError):
            plain[name] = _plain(item.attrs[name])
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else str(value)
