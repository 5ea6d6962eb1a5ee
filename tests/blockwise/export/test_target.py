"""Exports to a bucket: the same objects as files of a local export, stopped and gone on with."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.export.target import FOLDER, MARK, Target
from agq.blockwise.export.volume import export_precomputed, plan_export
from agq.blockwise.volumes.create import create_array
from agq.blockwise.volumes.open import open_levels
from agq.errors import InputError
from tests.helpers.fragments import folder_bytes

CHUNK = (8, 16, 8)


def planned(folder: Path, value: int = 0):
    data = np.random.default_rng(value).integers(0, 9, (9, 20, 11)).astype(np.uint64)
    create_array(
        folder, "a", shape=data.shape, chunks=(8, 16, 8), dtype="uint64", voxel_size=(30, 6, 6)
    )[:] = data
    levels = open_levels(folder, "a", kind="labels")
    return levels, plan_export(levels, chunk=CHUNK)


def test_a_bucket_holds_what_a_folder_does_and_is_gone_on_with(tmp_path, client, s3):
    levels, scales = planned(tmp_path / "in")
    target = Target.of("s3://em-data/deep/out", tmp_path / "work")
    written = export_precomputed(levels, scales, target, client)
    export_precomputed(levels, scales, tmp_path / "out", client)
    local = {k: v for k, v in folder_bytes(tmp_path / "out").items() if FOLDER not in k}
    keys = {key.removeprefix("deep/out/") for key in s3.listed()} - {MARK}
    assert keys == {key for key in local if ".lock" not in key}
    for key in keys:
        assert target.read(key) == local[key]
    assert export_precomputed(levels, scales, target, client) == 0
    # Without the one or the other half of what is known, all is done again.
    shutil.rmtree(tmp_path / "work")
    assert export_precomputed(levels, scales, target, client) == written
    s3.remove(f"deep/out/{MARK}")
    with pytest.raises(InputError, match="s3://em-data/deep/out is not empty"):
        export_precomputed(levels, scales, target, client)
    assert export_precomputed(levels, scales, target, client, overwrite=True) == written

    levels, scales = planned(tmp_path / "other", 1)
    with pytest.raises(InputError, match="s3://em-data/deep/out is an export of another volume"):
        export_precomputed(levels, scales, target, client)
    s3.put("deep/outer/kept", b"")
    assert export_precomputed(levels, scales, target, client, overwrite=True) == written
    assert "deep/outer/kept" in s3.listed()


def test_targets_that_cannot_be_written_to(tmp_path, client, s3):
    for address in ("https://example.org/x", "http://u:secret@h/x", "file:///x", "precomputed://x"):
        with pytest.raises(InputError, match=r"cannot be written to") as caught:
            Target.of(address)
        assert "secret" not in str(caught.value)
    levels, scales = planned(tmp_path / "in")
    missing = Target.of("s3://no-such-bucket/x", tmp_path / "work")
    with pytest.raises(InputError, match="s3://no-such-bucket/x: ") as caught:
        export_precomputed(levels, scales, missing, client)
    assert "\n" not in str(caught.value)
    assert Target.of("gs://bucket/x", tmp_path).store("a") == {
        "driver": "gcs", "bucket": "bucket", "path": "x/a/",
    }  # fmt: skip
