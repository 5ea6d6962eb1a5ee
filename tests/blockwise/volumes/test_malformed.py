"""Malformed metadata of any format: a volume or one line, never a traceback."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agq.blockwise.volumes.find import find_in, sources_of
from agq.blockwise.volumes.open import open_levels, open_volume
from agq.blockwise.volumes.placement import place
from agq.errors import InputError
from tests.helpers.volumes import ome_group, put_n5, voxels

SHAPE = (4, 6, 5)
PLACE: dict[str, Any] = {
    "voxel_size": [30, 7, 6],
    "resolution": [30.0, 7.0, 6.0],
    "offset": [60, 14, -6],
    "units": ["nm", "nm", "nm"],
    "axis_names": ["z", "y", "x"],
}
TRANSFORM = {
    "axes": ["z", "y", "x"],
    "scale": [30, 7, 6],
    "translate": [60, 14, -6],
    "units": ["nm", "nm", "nm"],
}


def zarr3(folder: Path) -> None:
    ome_group(
        *(folder, "img", [voxels(SHAPE), voxels(SHAPE)], [[30, 7, 6], [30, 14, 12]]),
        shifts=[[60, 14, -6], [60, 17, -3]],
        version="0.5",
    )
    zarr.open_array(folder, path="img/0", mode="r+").attrs.update(PLACE)


def zarr2(folder: Path) -> None:
    ome_group(
        *(folder, "img", [voxels(SHAPE), voxels(SHAPE)], [[30, 7, 6], [30, 14, 12]]), version="0.4"
    )
    file = folder / "img" / ".zattrs"
    group = json.loads(file.read_text())
    group["multiscales"][0]["datasets"][0]["transform"] = TRANSFORM
    file.write_text(json.dumps(group | {"resolution": [30, 7, 6], "offset": [60, 14, -6]}))
    for level in range(2):
        place = {"transform": TRANSFORM, "_ARRAY_DIMENSIONS": ["z", "y", "x"]} if not level else {}
        (folder / "img" / str(level) / ".zattrs").write_text(json.dumps(place))


def n5(folder: Path) -> None:
    for level in range(2):
        attributes: dict[str, Any] = {"downsamplingFactors": [2, 2, 1]} if level else {}
        attributes |= {"axes": ["x", "y", "z"], "offset": [-6, 14, 60]}
        put_n5(folder / "img" / f"s{level}", voxels(SHAPE), **attributes)
    (folder / "img" / "attributes.json").write_text(
        json.dumps(
            {
                "pixelResolution": {"dimensions": [6.0, 7.0, 30.0], "unit": "nm"},
                "scales": [[1, 1, 1], [2, 2, 1]],
                "resolution": [6, 7, 30],
                "multiScale": True,
            }
        )
    )


FORMATS: dict[str, Callable[[Path], None]] = {"zarr3": zarr3, "zarr2": zarr2, "n5": n5}

JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1, 3.5, 1e-300, 1e300, float("nan"), float("inf"), 10**40, 2**63),
    *(
        "",
        "x",
        "z",
        "nm",
        "furlong",
        "µm",
        "scale",
        "1e999999",
        "sNaN",
        "\x00",
        "..",
        "/",
        "0" * 400,
    ),
    *([], {}, [0, 0, 0], [1, 2], [[1, 2, 3]], [None, None, None], ["z", "z", "x"], [{}], {"a": 1}),
    *([1, 2, 3, 4], ["1", "2", "3"], [1e30, 1, 1], {"type": "scale"}, {"path": 3}, [[], [2, 2, 1]]),
]
KEYS = (
    *("voxel_size", "resolution", "pixelResolution", "offset", "units", "unit", "axes", "ome"),
    *("axis_names", "_ARRAY_DIMENSIONS", "transform", "downsamplingFactors", "scales", "shape"),
    *("multiscales", "datasets", "coordinateTransformations", "coordinateSystems", "dimensions"),
    *("dimension_names", "element_size_um", "isLabelMultiset", "node_type", "attributes", "type"),
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every container of a document with each of its keys."""
    found = []
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        found.append((document, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def mutated(document: Any, chance: random.Random) -> bytes:
    """Return the bytes of a document with a few of its values replaced, removed or added."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        spots = places(document)
        if not spots:
            break
        where, key = chance.choice(spots)
        action = chance.random()
        if action < 0.6:
            where[key] = copy.deepcopy(chance.choice(JUNK))
        elif action < 0.75:
            del where[key]
        elif isinstance(where, list):
            where.append(copy.deepcopy(chance.choice([*JUNK, where[key]])))
        else:
            where[chance.choice(KEYS)] = copy.deepcopy(chance.choice(JUNK))
    data = json.dumps(document).encode()
    if chance.random() < 0.05:
        data = chance.choice((data[: len(data) // 2], b"\xff\xfe", b"[" * 100_000, b"3", b"null"))
    return data


class Files:
    """A container in memory."""

    name = "a.zarr"
    text = "a.zarr"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def get(self, key: str) -> bytes | None:
        return self.files.get(key)

    def folders(self, key: str) -> list[str]:
        start = f"{key}/" if key else ""
        inside = (name[len(start) :] for name in self.files if name.startswith(start))
        return sorted({rest.split("/")[0] for rest in inside if "/" in rest})

    def parent(self) -> None:
        return None


WAYS: list[tuple[str | None, int | None]] = [
    *((None, None), ("img", None), ("img", 1), ("img/0", None), ("img/s0", None)),
    *(("img/1", None), ("img/s1", None)),
]


def read(folder: Path) -> dict[str, Any]:
    return {
        file.relative_to(folder).as_posix(): json.loads(file.read_bytes())
        for file in folder.rglob("*")
        if file.name in ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json")
    }


@pytest.fixture(scope="module", params=FORMATS)
def container(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mutated") / "a.zarr"
    FORMATS[request.param](folder)
    return folder, read(folder)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
def test_mutated_metadata(container: Any, seed: int) -> None:
    _, documents = container
    chance = random.Random(seed)
    messages = set()
    for _ in range(25):
        files = {name: json.dumps(document).encode() for name, document in documents.items()}
        name = chance.choice(sorted(files))
        files[name] = mutated(documents[name], chance)
        location: Any = Files(files)
        for dataset, level in WAYS:
            size = chance.choice((None, (30, 7, 6)))
            try:
                array = find_in(location, dataset, level)
                place(
                    sources_of(location, array),
                    array.shape or (),
                    voxel_size=size,
                    unit=chance.choice((None, "nm", "pm")),
                    x_first=array.format == "n5",
                    where="a.zarr",
                )
            except InputError as error:
                messages.add(str(error))
    assert not [message for message in messages if "\n" in message]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=8, deadline=None, suppress_health_check=[*HealthCheck])
def test_mutated_files(container: Any, seed: int) -> None:
    """The same through all readers, which also open the array with zarr or tensorstore."""
    folder, documents = container
    chance = random.Random(seed)
    for _ in range(12):
        name = chance.choice(sorted(documents))
        (folder / name).write_bytes(mutated(documents[name], chance))
        for action in (
            lambda: open_volume(folder, chance.choice(WAYS)[0], kind="labels", unit=None),
            lambda: open_volume(folder / "img" / chance.choice("01"), voxel_size=(30, 7, 6)),
            lambda: open_levels(folder, "img"),
        ):
            try:
                opened = action()
                for volume in opened if isinstance(opened, list) else [opened]:
                    json.dumps(volume.describe())
                    volume.roi.intersect(volume.roi)
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017
        (folder / name).write_text(json.dumps(documents[name]))


@pytest.mark.parametrize("name", ["\x00", "a" * 300, "\ud800", "..", "/etc", "0/0"])
def test_names_that_no_array_can_have(tmp_path: Path, name: str) -> None:
    zarr2(tmp_path / "a.zarr")
    file = tmp_path / "a.zarr" / "img" / ".zattrs"
    group = json.loads(file.read_text())
    group["multiscales"][0]["datasets"][0]["path"] = name
    file.write_text(json.dumps(group))
    for dataset in ("img", name):
        with pytest.raises(InputError):
            open_volume(tmp_path / "a.zarr", dataset)
