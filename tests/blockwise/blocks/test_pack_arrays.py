"""Arrays of a finished run in shards and back: the same bytes, cut off anywhere; few files."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from agq.blockwise.blocks import pack_arrays
from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.blocks.pack_arrays import is_packed, pack_array
from agq.blockwise.blocks.writer import BlockWriter
from agq.blockwise.journal.pack import pack_journal
from agq.blockwise.journal.tail import PACKED
from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.output.pyramid import Pyramid
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import DaskSettings
from agq.blockwise.verify.check import verify
from agq.blockwise.volumes.create import open_array
from agq.errors import InputError
from tests.helpers.fragments import GRID, folder_bytes, make_run, write_run

BOX = (2, 2, 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_run(make_run(GRID, absent=(5, 13)), tmp_path)
    return tmp_path


def read(folder: Path) -> np.ndarray:
    """Read it with tensorstore and with zarr."""
    path = folder / "data.zarr/fragments"
    spec = {"driver": "zarr3", "kvstore": f"file://{path}"}
    values = tensorstore.open(spec, open=True).result()[:].read().result()
    assert np.array_equal(values, zarr.open_array(path, mode="r")[:])
    return values


def test_packed_and_unpacked_again(folder):
    before, values = folder_bytes(folder), read(folder)
    pack_array(folder, "fragments", BOX)
    assert is_packed(folder)
    files = [p for p in (folder / "data.zarr/fragments").rglob("*") if p.is_file()]
    assert len(files) == 1 + 8
    assert np.array_equal(read(folder), values)
    report = verify(folder, GRID, affinities=False)
    assert (report.problems, report.checked["fragments"]) == ([], 25)
    with pytest.raises(InputError, match="--undo"):
        BlockWriter.open(folder, GRID)
    pack_array(folder, "fragments", BOX, undo=True)
    assert folder_bytes(folder) == before
    BlockWriter.open(folder, GRID)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("at", [0, 3, "write_atomic", "rmtree", "fsync_path"])
def test_cut_off_anywhere_it_is_whole(folder, monkeypatch, undo, at):
    values = read(folder)
    if undo:
        pack_array(folder, "fragments", BOX)

    def stop(*_args, **_options):
        raise Stopped

    if isinstance(at, int):

        def tell(done: int, total: int) -> None:
            if done == at:
                raise Stopped
    else:
        tell = None
        where = pack_arrays.shutil if at == "rmtree" else pack_arrays
        monkeypatch.setattr(where, at, stop)
    with pytest.raises(Stopped):
        pack_array(folder, "fragments", BOX, undo=undo, on_progress=tell)
    monkeypatch.undo()
    assert np.array_equal(read(folder), values)
    pack_array(folder, "fragments", BOX, undo=undo)
    assert is_packed(folder) != undo
    assert np.array_equal(read(folder), values)
    names = {p.name for p in (folder / "data.zarr/fragments").iterdir()}
    assert names == ({"c", "zarr.json"} if undo else {"0", "1", "zarr.json"})


def test_a_whole_packed_run_has_few_files(tmp_path):
    """At 512 blocks 0.3 a block; with more, a shard of 64 blocks an array: 0.04."""
    grid = BlockGrid(
        volume_shape=(24, 48, 48), write_shape=(3, 6, 6), voxel_size=(30, 6, 6), after=(1, 1, 1)
    )
    assert grid.n_blocks == 512
    run = make_run(grid, seed=1)
    write_run(run, tmp_path)
    with dask_client(DaskSettings(workers=2), processes=False) as client:
        run_stitch(run.spec(tmp_path), client)
    segments = open_array(tmp_path / "data.zarr", "segmentation/s0", "r")[:]
    pack_array(tmp_path, "fragments", Pyramid.planned(tmp_path, "", grid).passes[0].box)
    assert np.array_equal(read(tmp_path), run.fragments)
    for journal in (tmp_path / "journal").iterdir():
        pack_journal(journal)
        assert [p.suffix for p in journal.iterdir() if p.name != PACKED] == [".npz"]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) <= 0.35 * grid.n_blocks
    assert verify(tmp_path, grid, affinities=False).problems == []
    # The packed run stitches to the same.
    (tmp_path / "stitch/contacts.json").unlink()
    (tmp_path / "stitch/relabel.json").unlink()
    with dask_client(DaskSettings(workers=2), processes=False) as client:
        run_stitch(run.spec(tmp_path), client)
    assert np.array_equal(open_array(tmp_path / "data.zarr", "segmentation/s0", "r")[:], segments)
