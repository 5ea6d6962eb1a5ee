"""The volumes of a run lie in one world, whatever unit each of their sections names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from agq.blockwise.blocks.mask import mask_blocks
from agq.errors import InputError
from agq.pipeline.config.schema import VolumeSettings, load_config
from agq.pipeline.data.inputs import open_input
from agq.pipeline.folder import RunFolder
from agq.pipeline.run.prepare import Prepared, prepare
from tests.helpers.runs import blobs, make_config
from tests.helpers.volumes import put, voxels


def opened(tmp_path: Path, world: str, **section: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    settings = VolumeSettings(**section)
    volume = open_input(settings, RunFolder(tmp_path / "run"), "mask", "input.mask", world)
    assert volume.unit == world
    return tuple(volume.voxel_size), tuple(volume.offset)


@pytest.mark.parametrize("section", [{}, {"unit": "nm"}, {"unit": "pm"}])
def test_numbers_of_a_file_are_nanometres_in_any_run(tmp_path: Path, section: Any) -> None:
    put(tmp_path / "m.zarr", "mask", voxels(), voxel_size=[33.5, 4.2, 4.2], offset=[0, 42, 0])
    section |= {"path": str(tmp_path / "m.zarr"), "dataset": "mask"}
    assert opened(tmp_path, "pm", **section) == ((33500, 4200, 4200), (0, 42000, 0))
    assert opened(tmp_path, "angstrom", **section) == ((335, 42, 42), (0, 420, 0))
    with pytest.raises(InputError, match=r"^input\.mask: .* set unit: pm"):
        opened(tmp_path, "nm", **section)


def test_numbers_of_a_section_are_in_its_unit(tmp_path: Path) -> None:
    put(tmp_path / "m.zarr", "mask", voxels())
    tifffile.imwrite(tmp_path / "m.tif", np.ones((5, 8, 8), np.uint8))
    for path in ("m.zarr", "m.tif"):
        where = {"path": str(tmp_path / path)}
        numbers = {"voxel_size": (40, 8, 8), "offset": (0, 16, 0)}
        expected = ((40000, 8000, 8000), (0, 16000, 0))
        assert opened(tmp_path, "pm", **where, **numbers, unit="nm") == expected
        with pytest.raises(InputError, match=r"input\.mask: .* counts in pm: set unit to that of"):
            opened(tmp_path, "pm", **where, **numbers)
        numbers = {"voxel_size": (335, 42, 42)}
        assert opened(tmp_path, "pm", **where, **numbers, unit="angstrom")[0] == (33500, 4200, 4200)


@pytest.mark.parametrize("unit", ["pm", "angstrom"])
def test_the_advice_on_units_leads_to_a_run(tmp_path: Path, unit: str) -> None:
    """Raw, mask and truth of 4.2 nm: one line in nm, and one setting makes all three fit."""
    data = blobs((8, 20, 20))
    for name, array in (("raw", data), ("mask", data[::2, ::2, ::2]), ("truth", data)):
        size = [67, 8.4, 8.4] if name == "mask" else [33.5, 4.2, 4.2]
        put(tmp_path / "in.zarr", name, array, voxel_size=size, offset=[33.5, 0, 42])
    sections: dict[str, Any] = {
        name: {"path": str(tmp_path / "in.zarr"), "dataset": name}
        for name in ("raw", "mask", "truth")
    }

    def prepared() -> Prepared:
        truth = {"truth": sections["truth"]}
        volumes = {"raw": sections["raw"], "mask": sections["mask"]}
        return prepare(load_config(make_config(tmp_path, data, input=volumes, evaluate=truth)))

    with pytest.raises(InputError, match=r"input\.raw: .* set unit: pm"):
        prepared()
    sections["raw"]["unit"] = unit
    run = prepared()
    assert run.mask is not None
    assert mask_blocks(run.mask, run.grid, run.selected).all()
    assert tuple(run.mask.voxel_size) == tuple(2 * v for v in run.grid.voxel_size)
    truth = run.scored_truth()
    assert truth is not None
    assert truth.roi == run.grid.to_world((0, 0, 0), run.grid.volume_shape)
