"""Packs of sidecars: read as before, packed again after any end, and no damage is made good."""

from pathlib import Path

import pytest

from agq.blockwise.blocks import packs
from agq.blockwise.blocks.packs import (
    pack_path,
    pack_sidecars,
    sidecar_bytes,
    sidecar_file,
    sidecar_path,
)
from agq.blockwise.storage.files import write_atomic
from agq.errors import DamagedError


def write(folder: Path, number: int, data: bytes) -> None:
    write_atomic(sidecar_path(folder, number), data)


def contents(folder: Path, numbers) -> dict[int, bytes]:
    return {number: sidecar_bytes(folder, number) for number in numbers}


def test_packed_ones_are_read_and_newer_ones_taken_in(tmp_path):
    expected = {number: bytes([number % 251]) * (number % 7 + 1) for number in range(990, 1010)}
    for number, data in expected.items():
        write(tmp_path, number, data)
    folder = sidecar_path(tmp_path, 990).parent
    assert pack_sidecars(folder) == 10
    assert not folder.exists()
    assert sidecar_file(tmp_path, 990) == pack_path(tmp_path, 990)
    assert sidecar_file(tmp_path, 1001) == sidecar_path(tmp_path, 1001)
    assert contents(tmp_path, expected) == expected
    with pytest.raises(FileNotFoundError):
        sidecar_bytes(tmp_path, 3)

    expected |= {995: b"predicted again", 3: b"late"}
    for number in (995, 3):
        write(tmp_path, number, expected[number])
    assert contents(tmp_path, expected) == expected
    assert pack_sidecars(folder) == 2
    assert contents(tmp_path, expected) == expected
    whole = pack_path(tmp_path, 0).read_bytes()
    for number in expected:
        if number < 1000:
            write(tmp_path, number, expected[number])
    pack_path(tmp_path, 0).unlink()
    pack_sidecars(folder)
    assert pack_path(tmp_path, 0).read_bytes() == whole


@pytest.mark.parametrize("moment", ["_write", "unlink"])
def test_cut_off_packing_loses_nothing(tmp_path, monkeypatch, moment):
    expected = {number: b"%d" % number for number in range(5)}
    for number, data in expected.items():
        write(tmp_path, number, data)

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    if moment == "_write":
        monkeypatch.setattr(packs, "_piece", stop)
        monkeypatch.setattr(packs, "read_file", stop)
    else:
        monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_sidecars(sidecar_path(tmp_path, 0).parent)
    monkeypatch.undo()
    assert contents(tmp_path, expected) == expected
    assert pack_sidecars(sidecar_path(tmp_path, 0).parent) == 5
    assert contents(tmp_path, expected) == expected
    assert [p.name for p in (tmp_path / "sidecars").iterdir()] == ["0000000.agqp"]


def test_damage_is_told_and_not_packed_away(tmp_path):
    for number in range(4):
        write(tmp_path, number, bytes(10) + b"%d" % number)
    folder, pack = sidecar_path(tmp_path, 0).parent, pack_path(tmp_path, 0)
    pack_sidecars(folder)
    whole = pack.read_bytes()
    pack.write_bytes(whole[:10] + b"!" + whole[11:])
    write(tmp_path, 3, b"new")
    assert pack_sidecars(folder) == 1
    with pytest.raises(DamagedError, match=r"0000000\.agqp: .*block 0 differs"):
        sidecar_bytes(tmp_path, 0)
    assert contents(tmp_path, (1, 3)) == {1: bytes(10) + b"1", 3: b"new"}

    write(tmp_path, 3, b"newer")
    for damaged in (b"", whole[:-3], b"AGQX" + whole[4:], whole[:-40] + bytes(40)):
        pack.write_bytes(damaged)
        with pytest.raises(DamagedError, match="damaged"):
            sidecar_bytes(tmp_path, 1)
        assert pack_sidecars(folder) == 0
        assert sidecar_bytes(tmp_path, 3) == b"newer"
