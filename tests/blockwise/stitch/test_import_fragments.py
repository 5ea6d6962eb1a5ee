"""Fragments and affinities of another model: formats, layouts, and what does not fit."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from rich.console import Console

from agq.blockwise.stitch.cluster import dask_client
from agq.blockwise.stitch.import_fragments import import_fragments, local_labels
from agq.blockwise.stitch.merge.agglomeration import agglomerate
from agq.blockwise.stitch.run import StitchReport, run_stitch
from agq.blockwise.stitch.settings import DaskSettings, Thresholds
from agq.errors import InputError
from tests.helpers.foreign import make_spec, open_arrays, put
from tests.helpers.fragments import same_partition
from tests.helpers.runs import agq, make_config
from tests.helpers.stitch_runs import segmentation
from tests.helpers.whole_volume import contacts_from_volume


@pytest.fixture(scope="module")
def client():
    with dask_client(DaskSettings(workers=2), processes=False) as made:
        yield made


def test_local_labels():
    ids = np.array([[[0, 0, 2**63 + 5], [9, 9, 0]]], np.uint64)
    labels, names = local_labels(ids)
    assert labels.dtype == np.uint32
    assert names.tolist() == [0, 9, 2**63 + 5]
    assert np.array_equal(names[labels], ids)
    with pytest.raises(InputError, match="id -1 is below 0"):
        local_labels(ids.astype(np.int64).clip(0, 1) - 1)
    labels, names = local_labels(ids + np.uint64(1))
    assert names[0] == 0
    assert np.array_equal(names[labels], ids + np.uint64(1))


def foreign_volumes(folder, dtype):
    """Supervoxels that run across blocks, with affinities, as another model leaves them."""
    rng = np.random.default_rng(3)
    shape = (20, 300, 270)
    cells = rng.choice(2**40, (2, 10, 9), replace=False) + 1
    coarse = np.kron(cells, np.ones((10, 30, 30), np.int64))
    fragments = np.where(rng.random(shape) < 0.02, 0, coarse).astype(np.uint64)
    # Noise, so that no two contacts have equal scores: ties follow the ids of the pieces.
    means = np.kron(rng.integers(40, 215, (3, 2, 10, 9)), np.ones((1, 10, 30, 30), np.int64))
    affinities = (means + rng.integers(-40, 41, (3, *shape))).astype(np.uint8)
    attributes = {"voxel_size": [30, 6, 6], "offset": [0, 0, 0], "units": ["nm"] * 3}
    stored = affinities if dtype == np.uint8 else (affinities / 255).astype(dtype)
    for name, data in (("fragments", fragments), ("affinities", stored)):
        array = zarr.create_array(str(folder / "in.zarr" / name), data=data, chunks=data.shape)
        array.attrs.update(attributes)
    return fragments, affinities


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_fragments_of_another_model(tmp_path, client, dtype):
    fragments, affinities = foreign_volumes(tmp_path, dtype)
    paths = [str(tmp_path / "in.zarr" / name) for name in ("fragments", "affinities")]
    source = open_arrays(*paths)
    out = tmp_path / "out"
    blocks = import_fragments(source, out, client)
    assert blocks.n_blocks == 8
    evidence = contacts_from_volume(fragments, affinities, np.zeros(affinities.shape, bool))
    thresholds = Thresholds(across=0.6, within=0.6)
    result = agglomerate(evidence.nodes.ids, evidence.contacts, thresholds)
    names = dict(zip(result.ids.tolist(), result.representatives.tolist(), strict=True)) | {0: 0}
    expected = np.vectorize(names.__getitem__, otypes=[np.uint64])(fragments)
    spec = make_spec(out, blocks, across=0.6, within=0.6)
    run_stitch(spec, client)
    assert same_partition(segmentation(out), expected)
    assert len(np.unique(expected)) < len(np.unique(fragments)) - 40
    # Again: nothing is imported twice, and other volumes are refused.
    before = sorted((out / "sidecars").rglob("*.agq*"), key=str)
    assert before
    times = [path.stat().st_mtime_ns for path in before]
    import_fragments(source, out, client)
    assert [path.stat().st_mtime_ns for path in before] == times
    # They may lie elsewhere, but must hold the same.
    (tmp_path / "in.zarr").rename(tmp_path / "moved.zarr")
    moved = [str(tmp_path / "moved.zarr" / name) for name in ("fragments", "affinities")]
    import_fragments(open_arrays(*moved), out, client)
    assert [path.stat().st_mtime_ns for path in before] == times
    array = zarr.open_array(moved[1], mode="r+")
    array[2, 1, 2, 3] = 1 - array[2, 1, 2, 3]
    with pytest.raises(InputError, match=r"made from other volumes \(.*affinities: its voxels"):
        import_fragments(open_arrays(*moved), out, client)


def small_volumes():
    rng = np.random.default_rng(5)
    cells = rng.choice(2**30, (2, 3, 3), replace=False) + 1
    fragments = np.kron(cells, np.ones((9, 90, 90), np.int64)).astype(np.uint64)
    means = np.kron(rng.integers(90, 165, (3, 2, 3, 3)), np.ones((1, 9, 90, 90), np.int64))
    return fragments, (means + rng.integers(-40, 41, (3, *fragments.shape))).astype(np.uint8)


@pytest.mark.parametrize("kind", [2, 3, "n5"])
def test_formats_and_channels(tmp_path, client, kind):
    """Every format and order of channels gives the segmentation of the plain one."""
    fragments, affinities = small_volumes()
    more = np.concatenate((np.zeros_like(affinities[:1]), affinities[::-1]))  # -, x, y, z
    for name, data in (("fragments", fragments), ("affinities", affinities), ("more", more)):
        put(tmp_path / "in", name, data, kind)
    evidence = contacts_from_volume(fragments, affinities, np.zeros(affinities.shape, bool))
    result = agglomerate(evidence.nodes.ids, evidence.contacts, Thresholds(across=0.5, within=0.5))
    names = dict(zip(result.ids.tolist(), result.representatives.tolist(), strict=True)) | {0: 0}
    expected = np.vectorize(names.__getitem__, otypes=[np.uint64])(fragments)
    assert 1 < len(np.unique(expected)) < 18
    for name, channels in (("affinities", (0, 1, 2)), ("more", (3, 2, 1))):
        source = open_arrays(
            f"{tmp_path / 'in'}::fragments",
            f"{tmp_path / 'in'}::{name}" if kind != "n5" else f"{tmp_path / 'in'}/{name}",
            voxel_size=(30, 6, 6),
            channels=channels,
        )
        blocks = import_fragments(source, tmp_path / name, client)
        run_stitch(make_spec(tmp_path / name, blocks, across=0.5, within=0.5), client)
        assert same_partition(segmentation(tmp_path / name), expected)


def test_foreign_volumes_that_do_not_fit_are_refused(tmp_path, client):
    fragments, affinities = small_volumes()
    size = {"voxel_size": [30, 6, 6], "offset": [0, 0, 0]}
    folder = tmp_path / "in"
    put(folder, "fragments", fragments, 3, **size)
    put(folder, "floats", fragments.astype(np.float32), 3, **size)
    put(folder, "affinities", affinities, 3, **size)
    put(folder, "last", np.moveaxis(affinities, 0, -1), 3)
    put(folder, "shorter", affinities[:, :-1], 3)
    put(folder, "two", affinities[:2], 3)
    put(folder, "uint16", affinities.astype(np.uint16), 3)
    put(folder, "finer", affinities, 3, voxel_size=[30, 3, 3])
    put(folder, "moved", affinities, 3, voxel_size=[30, 6, 6], offset=[30, 0, 0])

    def refused(affinities, message, fragments="fragments", **options):
        with pytest.raises(InputError, match=message):
            open_arrays(str(folder / fragments), str(folder / affinities), **options)

    refused("fragments", r"is not \(3, z, y, x\)")
    refused("last", "channels come last: move them to the front")
    refused("shorter", r"shape \(3, 17, 270, 270\) is not")
    refused("two", r"channels \(0, 1, 2\) are not three of its 2 \(--channels\)")
    refused("affinities", "not three of its 3", channels=(0, 1, 1))
    refused("uint16", r"uint16 is neither uint8 \(255 is 1.0\) nor float")
    refused("finer", r"voxel size \(30, 3, 3\) .* not those of the fragments")
    refused("moved", r"offset \(30, 0, 0\) are not those of the fragments")
    refused("none", "none: no such file or folder")
    refused("affinities/c", "no zarr, N5 or precomputed array there")
    refused("affinities", "labels of type float32", fragments="floats")
    refused("affinities", "declares the voxel size", voxel_size=(40, 6, 6))

    for name, bad, message in (
        ("low", -0.5, r"block 0 has values from -0.5 to .* between 0 and 1"),
        ("nan", np.nan, "block 0 holds NaN"),
    ):
        data = affinities / np.float32(255)
        data[1, 3, 4, 5] = bad
        put(folder, name, data, 3)
        source = open_arrays(str(folder / "fragments"), str(folder / name))
        with pytest.raises(InputError, match=message):
            import_fragments(source, tmp_path / name, client)


@pytest.mark.slow
def test_command_line(tmp_path):
    foreign_volumes(tmp_path, np.float32)
    fragments, affinities = (str(tmp_path / "in.zarr" / n) for n in ("fragments", "affinities"))
    done = agq(
        "stitch", "--fragments", fragments, "--affinities", affinities,
        "--output", tmp_path / "out", "--threshold", "0.6", "--set", "stitch.dask.workers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "lut" / "segments.parquet").exists()
    assert segmentation(tmp_path / "out").any()
    assert "segments" in done.stdout
    table = pq.read_table(tmp_path / "out" / "lut" / "segments.parquet").to_pydict()
    largest = sorted(
        zip(table["voxels"], table["segment"], strict=True), key=lambda e: (-e[0], e[1])
    )
    for voxels, segment in largest[:10]:
        assert f"{segment}: {voxels:,} voxels" in done.stdout
    # Other settings later: the volumes are remembered, and only merges are cut again.
    again = agq("stitch", tmp_path / "out", "--margin", "0.2")
    assert again.returncode == 0, again.stderr
    assert "merges are cut again" in again.stderr
    assert "import: " not in again.stderr
    assert agq("export", "precomputed", tmp_path / "out", tmp_path / "pc").returncode == 0
    levels = list((tmp_path / "out" / "data.zarr" / "segmentation").glob("s*"))
    assert len(json.loads((tmp_path / "pc" / "info").read_text())["scales"]) == len(levels) > 1


def test_an_output_folder_takes_other_settings(tmp_path, main):
    """Nothing that is said is ignored, and the arrays are not needed again."""
    fragments, affinities = small_volumes()
    for name, data in (("fragments", fragments), ("affinities", affinities)):
        put(tmp_path / "in", name, data, 3)
    output = tmp_path / "o[v2]"
    code, said, err = main(
        "stitch", "--fragments", f"{tmp_path / 'in'}::fragments", "--affinities",
        f"{tmp_path / 'in'}::affinities", "--voxel-size", "30,6,6", "--output", output,
    )  # fmt: skip
    assert code == 0, err
    assert "Stitch of o[v2]" in said

    def thresholds():
        section = json.loads((output / "run.json").read_text())["config"]["stitch"]
        return section["across"], section["within"]

    assert thresholds() == (0.5, 0.5)
    half = segmentation(output)
    for name in ("in", "gone"):
        if name == "gone":
            (tmp_path / "in").rename(tmp_path / name)
        for arguments, expected in (
            (("--threshold", "0.6"), (0.6, 0.6)),
            (("--threshold", "0.7", "--set", "stitch.within=1"), (0.7, 1)),
        ):
            code, _, err = main("stitch", output, *arguments)
            assert code == 0, err
            assert "import: " not in err
            assert thresholds() == expected
            assert not same_partition(segmentation(output), half)
    for option, value in (("--voxel-size", "9,9,9"), ("--unit", "pm"), ("--channels", "2,1,0")):
        code, _, err = main("stitch", output, option, value)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"{option} goes with --fragments" in err
    code, _, err = main("stitch", output, "--allow-missing")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--allow-missing is for runs" in err
    # A folder of an earlier release becomes a run.
    earlier = {
        "source": {
            "fragments": f"{tmp_path / 'in'}::fragments",
            "affinities": f"{tmp_path / 'in'}::affinities",
            "voxel_size": [30, 6, 6],
            "unit": "nm",
            "channels": [0, 1, 2],
        },
        "settings": {"input": {}, "stitch": {"across": 0.7, "within": 1.0}, "pyramid": {}},
    }
    (output / "settings.json").write_text(json.dumps(earlier))
    (output / "run.json").unlink()
    code, _, err = main("status", output)
    assert (code, len(err.splitlines())) == (2, 1)
    assert f"agq stitch {output} makes it a run" in err
    (tmp_path / "gone").rename(tmp_path / "in")
    code, _, err = main("stitch", output)
    assert code == 0, err
    assert "import: " not in err
    assert thresholds() == (0.7, 1)
    (tmp_path / "in").rename(tmp_path / "gone")
    # What is not imported yet needs them.
    for file in (output / "journal" / "predict").iterdir():
        file.unlink()
    code, _, err = main("stitch", output)
    assert code == 2
    assert "no such file or folder" in err


def test_names_in_the_table_are_no_markup():
    console = Console(file=io.StringIO(), width=200)
    console.print(StitchReport().table(Path("/r [/x]/[v2]/data.zarr/segmentation")))
    said = console.file.getvalue()
    assert "Stitch of [v2]" in said
    assert "/r [/x]/[v2]/data.zarr/segmentation" in said


def test_arguments_are_checked(tmp_path, main):
    arrays = ("--fragments", tmp_path / "f", "--affinities", tmp_path / "a")
    config = make_config(tmp_path)
    for arguments, message in (
        ((), "name a run folder, or --fragments"),
        (("--fragments", tmp_path / "f"), "go together"),
        ((tmp_path, *arrays, "--output", tmp_path / "o"), "without a run folder"),
        ((*arrays, "--output", tmp_path / "o"), "f: no such file or folder"),
        ((*arrays, "--output", tmp_path / "o", "--channels", "0,1"), "--channels 0,1: expected"),
        (
            (*arrays, "--output", tmp_path / "o", "--set", "stitch.evidence=both"),
            "fragments of another model do not have",
        ),
        ((*arrays, "--output", tmp_path / "o", "--allow-missing"), "--allow-missing is for runs"),
        ((config, "--threshold", "0.5"), "--threshold is for fragments of another model"),
        ((tmp_path, "--unit", "nm"), "--unit goes with --fragments"),
        ((tmp_path, "--voxel-size", "4,4,4"), "--voxel-size goes with --fragments"),
    ):
        code, _, err = main("stitch", *arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1), err
        assert message in err
    assert not (tmp_path / "o").exists()
