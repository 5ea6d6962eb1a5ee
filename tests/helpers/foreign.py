"""Fragments and affinities of another model, and their stitch."""

import tensorstore as ts
import zarr

from agq.blockwise.stitch.import_fragments import Fragments
from agq.blockwise.stitch.run import StitchSpec
from agq.blockwise.volumes.affinities import Affinities
from agq.blockwise.volumes.open import open_volume


def open_arrays(fragments, affinities, channels=(0, 1, 2), **options):
    path, _, dataset = fragments.partition("::")
    volume = open_volume(path, dataset or None, kind="labels", **options)
    return Fragments(volume, Affinities.open(affinities, volume, channels))


def make_spec(run_dir, blocks, **options):
    return StitchSpec(run_dir=run_dir, grid=blocks.to_dict(), **options)


def put(folder, name, data, kind, **attributes):
    """Write an array as zarr v3, zarr v2 or N5 (as zarr-python wrote N5: axes reversed)."""
    if kind == "n5":
        file = {"driver": "file", "path": str(folder / name)}
        blocks = [min(64, n) for n in data.shape[::-1]]
        spec = {
            "driver": "n5",
            "kvstore": file,
            "metadata": {
                "dataType": data.dtype.name,
                "dimensions": data.shape[::-1],
                "blockSize": blocks,
                "compression": {"type": "gzip"},
            },
        }
        ts.open(spec, create=True).result()[...] = data.transpose()
        return
    group = zarr.open_group(folder, mode="a", zarr_format=kind)
    group.create_array(name, data=data).attrs.update(attributes)
