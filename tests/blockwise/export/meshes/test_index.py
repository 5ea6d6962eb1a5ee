"""The index of fragments: each is found under its shard."""

import numpy as np

from agq.blockwise.export.meshes.encode import shard_of
from agq.blockwise.export.meshes.fragments import write_fragments
from agq.blockwise.export.meshes.index import read_index, segments_of, write_index


def test_every_fragment_is_found_under_its_shard(tmp_path):
    rng = np.random.default_rng(0)
    expected: dict[int, dict[int, list[tuple[int, ...]]]] = {shard: {} for shard in range(4)}
    for block in range(6):
        labels = np.unique(rng.integers(1, 2**63, 5).astype(np.uint64) % np.uint64(12) + 1)
        faces = rng.integers(1, 4, len(labels))
        write_fragments(
            tmp_path / f"{block}.npy",
            np.repeat(labels, faces),
            rng.integers(0, 99, (faces.sum(), 3)),
            {int(label): 10 * block for label in labels},
        )
        for row, label in enumerate(labels.tolist()):
            (shard,) = shard_of(labels[row : row + 1], 2).tolist()
            entry = (block, row, 10 * block, int(faces[row]))
            expected[shard].setdefault(label, []).append(entry)
    tables = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path, blocks in zip(tables, (range(4), range(4, 6)), strict=True):
        write_index(path, [(n, tmp_path / f"{n}.npy") for n in blocks], 2)
    for shards in ([0, 1, 2, 3], [2]):
        found = read_index(tables, shards)
        assert list(found) == shards
        for shard in shards:
            names = ["block", "row", "voxels", "faces"]
            assert {s: e[names].tolist() for s, e in segments_of(found[shard])} == expected[shard]


def test_nothing_in_a_shard(tmp_path):
    write_index(tmp_path / "a.npy", [], 3)
    assert list(segments_of(read_index([tmp_path / "a.npy"], [5])[5])) == []
