"""Every kind of file of a stitched folder: lost, changed or cut short, it is named and made again.

Blocks of the prediction are made again here by the test itself; `pipeline/run/test_verify.py` has
whole runs.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.blocks.packs import pack_path, pack_sidecars, sidecar_path
from agq.blockwise.journal.reader import Journal
from agq.blockwise.journal.records import BlockRecord, WorkerInfo
from agq.blockwise.journal.writer import JournalWriter
from agq.blockwise.stitch.run import StitchError, run_stitch
from agq.blockwise.storage.files import checksum, file_checksum, write_atomic
from agq.blockwise.verify.check import verify
from agq.blockwise.verify.repair import repair
from agq.blockwise.volumes.create import chunk_file, open_array
from agq.errors import InputError
from tests.helpers.fragments import GRID, box, folder_bytes, write_run
from tests.helpers.sidecars import unpack_sidecars

TABLES = ("contacts/", "agglomeration/", "lut/", "data.zarr/segmentation")

FILES = {
    "tables": [
        "contacts/present.npy", "contacts/layout.json", "contacts/0/0-0-0.npz",
        "agglomeration/0/1-0-0.npz", "agglomeration/1/0-0-0.npz", "lut/map/0-0-0.npz",
        "lut/smallest.npy", "lut/segments.parquet",
    ],
    "segmentation": ["data.zarr/segmentation/s0/c/0/0/1"],
    "pyramid": ["data.zarr/segmentation/s1/c/0/0/0"],
    "metadata": [
        "data.zarr/zarr.json", "data.zarr/segmentation/zarr.json",
        "data.zarr/segmentation/s0/zarr.json", "data.zarr/segmentation/s1/zarr.json",
    ],
}  # fmt: skip


def delete(file: Path) -> None:
    file.unlink()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = (delete, flip, cut)


def made(folder: Path) -> dict[str, bytes]:
    return {n: data for n, data in folder_bytes(folder).items() if n.startswith(TABLES)}


def check(folder: Path, **options):
    return verify(folder, GRID, affinities=False, **options)


@pytest.fixture(scope="module")
def stitched(run, client, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stitched") / "run"
    write_run(run, folder)
    run_stitch(run.spec(folder, superblock=(1, 2, 2)), client)
    unpack_sidecars(folder, run.sidecars)
    return folder


@pytest.fixture
def copy(stitched, tmp_path) -> Path:
    return shutil.copytree(stitched, tmp_path / "run")


def test_a_whole_run_has_nothing_wrong(stitched):
    seen = []
    report = check(stitched, on_progress=lambda done, total: seen.append((done, total)))
    assert report.problems == []
    assert not report.unrecorded
    assert not report.present
    assert seen[0][0] == 0
    assert seen[-1] == (len(seen) - 1, len(seen) - 1)
    blocks = Journal(stitched / "journal" / "predict").counts()["done"]
    assert report.checked["fragments"] == report.checked["sidecars"] == blocks
    files = [p for p in (stitched / "data.zarr/segmentation/s0/c").rglob("*") if p.is_file()]
    assert report.checked["segmentation"] == len(files) < blocks
    assert report.checked["pyramid"] > 0
    files = made(stitched)
    tables = [n for n in files if not n.startswith("data.zarr")]
    assert report.checked["tables"] == len(tables)
    assert "nothing" not in str(report.table())


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", FILES)
def test_what_the_stitch_made_is_named_and_made_again(copy, run, client, kind, damage):
    before = made(copy)
    for path in FILES[kind]:
        damage(copy / path)
    report = check(copy)
    assert {(p.kind, p.path) for p in report.problems} == {(kind, path) for path in FILES[kind]}
    for problem in report.problems:
        assert ("missing" in problem.what) == (damage is delete)
    assert repair(copy, GRID, report.problems)
    run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)
    assert made(copy) == before
    assert check(copy).problems == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_file_alone_takes_little_back(copy, run, client, damage):
    """Of a shard, only it and what lies above it; of a table, no voxel."""
    marks = {n: Journal(copy / "journal" / n) for n in ("relabel", "pyramid")}
    done = {name: journal.counts()["done"] for name, journal in marks.items()}
    damage(copy / "data.zarr/segmentation/s0/c/0/0/1")
    damage(copy / "agglomeration/0/0-0-0.npz")
    taken = repair(copy, GRID, check(copy).problems)
    levels = len(list((copy / "data.zarr/segmentation").glob("s*"))) - 1
    shard = 4  # blocks of the one at the end of an axis
    assert taken == {"segmentation": shard, "pyramid": levels, "files": 1}
    report = run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)
    assert {"contacts", "lut"} <= set(report.reused)
    for name, count in done.items():
        journal = Journal(copy / "journal" / name)
        assert journal.counts()["done"] == count
        again = [r.block for r in journal.records() if r.revision == 1]
        assert len(again) == (shard if name == "relabel" else levels)


@pytest.mark.parametrize("damage", DAMAGES)
def test_blocks_are_named_and_taken_back_with_what_was_made_of_them(copy, run, damage):
    first, second = sorted(run.sidecars)[:2]
    damage(copy / "data.zarr/fragments/c" / "/".join(map(str, GRID.index(first))))
    damage(sidecar_path(copy, second))
    report = check(copy)
    named = [(p.kind, p.block) for p in report.problems]
    assert named == [("fragments", first), ("sidecars", second)]
    taken = repair(copy, GRID, report.problems)
    assert (taken["blocks"], taken["segmentation"]) == (2, 8)  # both in one shard
    for stage in ("predict", "relabel"):
        assert Journal(copy / "journal" / stage).ranks(np.array([first, second])).tolist() == [0, 0]
    assert check(copy).problems == [], "what is not done cannot be damaged"


@pytest.mark.parametrize("damage", DAMAGES)
def test_packed_sidecars_are_checked_and_made_again(copy, run, client, damage):
    before, pack = made(copy), pack_path(copy, 0)
    assert pack_sidecars(sidecar_path(copy, 0).parent) == len(run.sidecars)
    assert not sidecar_path(copy, 0).parent.exists()
    report = check(copy)
    assert (report.problems, report.checked["sidecars"]) == ([], len(run.sidecars))
    damage(pack)
    problems = check(copy).problems
    assert {p.kind for p in problems} == {"sidecars"}
    assert len(problems) == (1 if damage is flip else len(run.sidecars))
    repair(copy, GRID, problems)
    with JournalWriter(copy / "journal/predict", WorkerInfo("again", "here", 1)) as journal:
        journal.revision = Journal(copy / "journal/predict").revision
        for number in (p.block for p in problems):
            data = run.sidecars[number].to_bytes()
            write_atomic(sidecar_path(copy, number), data)
            ids = open_array(copy / "data.zarr", "fragments")[box(*GRID.write_box(number))]
            sums = {"fragments": checksum(ids), "sidecar": checksum(data)}
            journal.finish(BlockRecord(number, "done", sums=sums))
    assert check(copy).problems == []
    run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)
    assert made(copy) == before
    assert check(copy).problems == []


def test_metadata_of_fragments_must_fit_the_grid(copy):
    file = copy / "data.zarr/fragments/zarr.json"
    text = file.read_text()
    for wrong in ("", "{}", text.replace('"uint64"', '"uint32"'), text[:100], "[]"):
        file.write_text(wrong)
        (problem,) = check(copy).problems
        assert problem.path == "data.zarr/fragments/zarr.json"
    file.unlink()
    (problem,) = check(copy).problems
    assert problem.what == "file is missing"


def test_a_damaged_marker_is_named_and_its_step_done_again(copy, run, client):
    before = made(copy)
    for step in ("contacts", "agglomerate", "lut", "relabel", "pyramid"):
        (copy / "stitch" / f"{step}.json").write_bytes(b"\0{")
    with pytest.raises(InputError, match="agq verify"):
        run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)
    report = check(copy)
    assert len(report.problems) == 5
    repair(copy, GRID, report.problems)
    run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)
    assert made(copy) == before


def test_a_sample_reads_some_and_looks_for_all(copy):
    flip(copy / "data.zarr/segmentation/s0/c/0/0/1")
    delete(copy / "data.zarr/segmentation/s0/c/0/0/0")
    report = check(copy, sample=1e-9)
    assert [p.what for p in report.problems] == ["file is missing"]
    assert not report.checked
    assert report.present["fragments"] > 0


def test_what_an_earlier_release_wrote_is_counted_and_still_looked_at(copy):
    """It recorded no checksums of what the stitch makes."""
    for file in (copy / "stitch").glob("*.sums"):
        file.unlink()
    report = check(copy)
    assert report.problems == []
    assert report.unrecorded["tables"] > 0
    cut(copy / "contacts/0/0-0-0.npz")
    flip(copy / "agglomeration/0/0-0-0.npz")
    assert len(check(copy).problems) == 2
    assert "recorded by an earlier release" in str(report.table())


LOST = {
    "data.zarr/fragments/c/0/0/1": "relabel",
    "sidecars/0000000/1.agqs": "contacts",
    "contacts/0/0-0-0.npz": "agglomerate",
    "agglomeration/1/0-0-0.npz": "lut",
    "lut/map/0-0-0.npz": "relabel",
    "data.zarr/segmentation/s0/c/0/0/1": "pyramid",
}
"""Files, and the step that reads them."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("path", LOST)
def test_the_stitch_checks_what_it_reads(copy, run, client, path, damage):
    """No hole, and no dead end: the error names the file and what to do."""
    steps = ["contacts", "agglomerate", "lut", "relabel", "pyramid"]
    for step in steps[steps.index(LOST[path]) :]:
        (copy / "stitch" / f"{step}.json").unlink()
    damage(copy / path)
    with pytest.raises((InputError, StitchError)) as caught:
        run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)
    assert f"agq verify {copy} --repair" in str(caught.value)
    assert "\n" not in str(caught.value)
    number = path.removesuffix(".agqs").rpartition("/")[2]
    assert path in str(caught.value) or f"block {number}" in str(caught.value)


@pytest.mark.parametrize("background", [True, False])
def test_one_wrong_voxel_of_the_fragments_stops_the_stitch(copy, run, client, background):
    (copy / "stitch" / "relabel.json").unlink()
    array = open_array(copy / "data.zarr", "fragments")
    chunk = tuple(slice(0, n) for n in GRID.write_shape)
    ids = array[chunk]
    labels = np.unique(ids[ids > 0])
    voxel = tuple(np.argwhere(ids == labels[0])[0])
    ids[voxel] = 0 if background else labels[1]
    array[chunk] = ids
    with pytest.raises(StitchError, match=r"block 0: label \d+ has \d+ voxels"):
        run_stitch(run.spec(copy, superblock=(1, 2, 2)), client)


def test_checksums_of_voxels_as_earlier_releases_wrote_them_count(copy):
    """A block may have checksums of stored bytes or of voxels; both are held against its files."""
    fragments = open_array(copy / "data.zarr", "fragments")
    with JournalWriter(copy / "journal/predict", WorkerInfo("again", "here", 1)) as journal:
        for record in list(Journal(copy / "journal/predict").records()):
            if record.state == "done":
                file = chunk_file(fragments, GRID.index(record.block))
                sums = record.sums | {"fragments": file_checksum(file)}
                journal.finish(replace(record, sums=sums, finished=record.finished + 1))
    assert check(copy).problems == []
    flip(chunk_file(fragments, (0, 0, 0)))
    assert [p.kind for p in check(copy).problems] == ["fragments"]
