"""Malformed metadata of any format: a volume or one line, never a traceback."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from agq.blockwise.volumes.find import find_in, sources_of
from agq.blockwise.volumes.open import open_levels, open_volume
from agq.blockwise.volumes.placement import place
from agq.errors import InputError
from tests.helpers.fuzz import attack, odd_bytes, odd_json, require_one_line
from tests.helpers.volumes import ome_group, put, put_n5, put_precomputed, voxels

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


def precomputed(folder: Path) -> None:
    half = voxels(SHAPE)[:, ::2, ::2]
    put_precomputed(folder / "img", [voxels(SHAPE), half], [[6, 7, 30], [12, 14, 30]])


METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", "attributes.json", "info")

FORMATS: dict[str, Callable[[Path], None]] = {
    "zarr3": zarr3,
    "zarr2": zarr2,
    "n5": n5,
    "precomputed": precomputed,
}


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
        if file.name in METADATA
    }


@pytest.fixture(scope="module", params=FORMATS)
def container(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mutated") / "a.zarr"
    FORMATS[request.param](folder)
    return folder, read(folder)


@pytest.mark.fuzz
def test_mutated_metadata(container: Any) -> None:
    _, documents = container
    files = {name: json.dumps(document).encode() for name, document in documents.items()}

    def case(rng: random.Random) -> dict[str, Any]:
        name = rng.choice(sorted(files))
        return {
            "files": files | {name: odd_json(rng, documents[name])},
            "way": rng.choice(WAYS),
            "voxel_size": rng.choice((None, (30, 7, 6))),
            "unit": rng.choice((None, "nm", "pm")),
        }

    def look(case: dict[str, Any]) -> None:
        location: Any = Files(case["files"])
        array = find_in(location, *case["way"])
        place(
            sources_of(location, array),
            array.shape or (),
            voxel_size=case["voxel_size"],
            unit=case["unit"],
            x_first=array.format == "n5",
            where="a.zarr",
        )

    assert attack(look, case, 1000)


@pytest.mark.fuzz
def test_mutated_files(container: Any) -> None:
    """The same through all readers, which also open the array with zarr or tensorstore."""
    folder, documents = container

    def case(rng: random.Random) -> dict[str, Any]:
        name = rng.choice(sorted(documents))
        return {
            "file": folder / name,
            "data": odd_json(rng, documents[name]),
            "dataset": rng.choice(WAYS)[0],
            "voxel_size": rng.choice((None, (30, 7, 6))),
        }

    def look(case: dict[str, Any]) -> None:
        before = case["file"].read_bytes()
        case["file"].write_bytes(case["data"])
        options: dict[str, Any] = {"voxel_size": case["voxel_size"], "unit": "pm", "kind": "labels"}
        try:
            for volume in open_levels(folder, case["dataset"], **options):
                json.dumps(volume.describe())
                volume.roi.intersect(volume.roi)
                volume.read((0, 0, 0), [min(n, 8) for n in volume.shape])
        finally:
            case["file"].write_bytes(before)

    assert attack(look, case, 150)


def chunks(folder: Path) -> list[Path]:
    """Return the files that hold voxels."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in METADATA)


@pytest.mark.fuzz
def test_damaged_chunks(container: Any) -> None:
    folder, _ = container
    level = next((folder / "img").glob("*0"))
    volume = open_volume(folder, f"img/{level.name}", kind="labels", unit="pm")
    chunk = chunks(level)[0]
    whole = chunk.read_bytes()

    def look(data: bytes) -> None:
        chunk.write_bytes(data)
        volume.read((0, 0, 0), volume.shape)

    try:
        assert attack(look, lambda rng: odd_bytes(rng, whole), 100)
    finally:
        chunk.write_bytes(whole)


@pytest.mark.fuzz
def test_damaged_shards(tmp_path: Path) -> None:
    put(tmp_path / "a", "img", voxels((8, 8, 8)), chunks=(2, 4, 4), shards=(8, 8, 8), **PLACE)
    volume = open_volume(tmp_path / "a", "img")
    (shard,) = chunks(tmp_path / "a")
    whole = shard.read_bytes()

    def look(data: bytes) -> None:
        shard.write_bytes(data)
        volume.read((0, 0, 0), (2, 2, 2))  # through the index

    def case(rng: random.Random) -> bytes:
        # The index is at the end.
        return (
            odd_bytes(rng, whole[::-1], 300)[::-1] if rng.random() < 0.8 else odd_bytes(rng, whole)
        )

    assert attack(look, case, 150)


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "huge"])
def test_what_is_no_file_among_the_files_of_a_volume(container: Any, kind: str) -> None:
    folder, documents = container
    level = next((folder / "img").glob("*0"))
    volume = open_volume(folder, f"img/{level.name}", kind="labels", unit="pm")
    metadata = sorted(folder / name for name in documents)
    for file in (*metadata, chunks(level)[0]):
        kept = file.rename(folder.parent / "kept")
        if kind == "fifo":
            os.mkfifo(file)
        elif kind == "huge":
            file.touch()
            os.truncate(file, 2**42)
        else:
            file.symlink_to("/dev/zero" if kind == "device" else file.name)
        if file in metadata:
            line = require_one_line(lambda: open_levels(folder, "img", unit="pm", kind="labels"))
            assert line or file.name == ".zgroup"  # not read where there are attributes
        else:
            line = require_one_line(lambda: volume.read((0, 0, 0), volume.shape))
            assert str(file) in line or "cannot be read" in line
        file.unlink()
        kept.rename(file)


@pytest.mark.parametrize("levels", [80, 900, 200_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_metadata_too_deep(container: Any, levels: int, brackets: str) -> None:
    folder, documents = container
    opening, closing = brackets if brackets == "[]" else ('{"a":', "}")
    for name, document in documents.items():
        file = folder / name
        before = file.read_bytes()
        text = json.dumps(document | {"odd": 0})
        file.write_text(text.replace('"odd": 0', f'"odd": {opening * levels}0{closing * levels}'))
        line = require_one_line(lambda: open_levels(folder, "img", unit="pm", kind="labels"))
        assert "levels" in line or file.name == ".zgroup"
        file.write_bytes(before)


def regular(shape: list[int]) -> dict[str, Any]:
    """Return the chunk grid of zarr v3."""
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("zarr3", {"chunk_grid": regular([2**11, 2**10, 2**10])}, "2147483648 bytes"),
        ("zarr3", {"chunk_grid": regular([0, 1, 1])}, ""),
        ("zarr2", {"chunks": [2**9, 2**11, 2**11]}, "2147483648 bytes"),
        ("zarr2", {"chunks": [10**12] * 3}, f"{10**36} bytes"),
        ("zarr2", {"chunks": [2**62, 2, 2]}, "bytes"),
        ("n5", {"blockSize": [2**11, 2**10, 2**10]}, "2147483648 bytes"),
    ],
)
def test_chunks_larger_than_a_worker_may_hold(
    tmp_path: Path, name: str, change: dict[str, Any], said: str
) -> None:
    FORMATS[name](tmp_path / "a.zarr")
    level = next((tmp_path / "a.zarr" / "img").glob("*0"))
    file = next(level / f for f in METADATA if (level / f).exists())
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    line = require_one_line(lambda: open_volume(level, kind="labels", unit="pm"))
    assert str(level) in line
    assert said in line


def test_shards_with_too_many_chunks(tmp_path: Path) -> None:
    put(tmp_path / "a", "img", voxels((8, 8, 8)), chunks=(2, 4, 4), shards=(8, 8, 8), **PLACE)
    file = tmp_path / "a" / "img" / "zarr.json"
    document = json.loads(file.read_text())
    document["chunk_grid"]["configuration"]["chunk_shape"] = [2**20, 2**20, 2**20]
    file.write_text(json.dumps(document))
    line = require_one_line(lambda: open_volume(tmp_path / "a", "img"))
    assert "shards with an index" in line


def test_folders_that_lead_back_to_themselves(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}").symlink_to(tmp_path)
    assert "name the dataset" in require_one_line(lambda: open_volume(tmp_path))


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
