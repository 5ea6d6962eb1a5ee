"""Edits: what a file may say, and whole stitches with them against the oracle."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from agq.blockwise.stitch.contacts import read_evidence
from agq.blockwise.stitch.edits import constrain, find_fragments, read_edits
from agq.blockwise.stitch.merge.agglomeration import agglomerate, score_contacts
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.volumes.create import create_array
from agq.errors import InputError
from tests.helpers.agglomeration import greedy
from tests.helpers.fragments import GRID, make_run, write_run
from tests.helpers.stitch_runs import results, segmentation
from tests.helpers.whole_volume import contacts_from_volume

BLOCKS = np.arange(GRID.n_blocks)


@pytest.fixture(scope="module")
def noisy():
    return make_run(GRID, seed=5, noise=0.6)


@pytest.fixture(scope="module")
def noisy_dir(noisy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy") / "run"
    write_run(noisy, folder)
    return folder


def write(folder: Path, text: str) -> Path:
    (folder / "edits.csv").write_text(text)
    return folder / "edits.csv"


def point_in(fragments, fragment) -> str:
    """Return the middle of the last voxel of a fragment, in world units."""
    voxel = np.argwhere(fragments == fragment)[-1]
    at = (voxel + 0.5) * GRID.voxel_size + GRID.offset
    return " ".join(f"{value:.1f}" for value in at)


def rows_of(run, thresholds=None):
    evidence = contacts_from_volume(run.fragments, run.half_units, run.border)
    table = score_contacts(evidence.contacts, thresholds or Thresholds())
    columns = (table.u, table.v, table.numerator, table.denominator)
    return evidence.nodes.ids.tolist(), list(zip(*(c.tolist() for c in columns), strict=True))


def expected(run, together, apart, thresholds=None):
    cluster, _ = greedy(*rows_of(run, thresholds), together=together, apart=apart)
    number = {root: i + 1 for i, root in enumerate(sorted(set(cluster.values())))}
    names = {node: number[root] for node, root in cluster.items()} | {0: 0}
    return np.vectorize(names.__getitem__, otypes=[np.uint64])(run.fragments)


def chosen_edits(run):
    """Return far merges and splits of what merges without them."""
    ids, rows = rows_of(run)
    _, merges = greedy(ids, rows)
    apart = [(u, v) for u, v, *_ in rows if (u, v) in {m[:2] for m in merges}][:6]
    assert len(apart) > 3
    return [(ids[0], ids[-1]), (ids[-1], ids[len(ids) // 2])], apart


def test_a_stitch_with_edits_equals_the_oracle_for_any_superblocks(noisy, client, tmp_path):
    together, apart = chosen_edits(noisy)
    segments = expected(noisy, together, apart)
    assert not np.array_equal(segments, expected(noisy, together, []))
    assert not np.array_equal(segments, expected(noisy, [], apart))
    lines = ["kind,a,b,comment"]
    lines += [f"merge,{u},{point_in(noisy.fragments, v)},far" for u, v in together]
    lines += [f'Split,"{point_in(noisy.fragments, u).replace(" ", ",")}",{v},' for u, v in apart]
    edits = write(tmp_path, "\ufeff" + "\r\n".join(lines) + "\r\n")
    made = []
    for superblock in ((1, 1, 1), (2, 1, 3)):
        folder = tmp_path / str(superblock)
        write_run(noisy, folder)
        spec = noisy.spec(folder, superblock=superblock, edits=edits, levels=1)
        report = run_stitch(spec, client)
        assert np.array_equal(segmentation(folder), segments), superblock
        sha256 = hashlib.sha256(edits.read_bytes()).hexdigest()
        assert report.edits == {"sha256": sha256, "merges": 2, "splits": len(apart)}
        made.append(results(folder))
    assert made[0] == made[1]

    # Other words and another order change nothing; another edit does.
    write(tmp_path, "kind,b,a\n" + "\n".join(f"split,{v},{u}" for u, v in reversed(apart)))
    with edits.open("a") as file:
        file.writelines(f"\nmerge,{v},{u}" for u, v in reversed(together))
    assert run_stitch(spec, client).reused == list(report.seconds)
    margin = run_stitch(noisy.spec(folder, edits=edits, margin=0.05, levels=1), client)
    assert "agglomerate" in margin.reused
    raised = expected(noisy, together, apart, Thresholds(margin=0.05))
    assert np.array_equal(segmentation(folder), raised)
    write(tmp_path, "kind,a,b\n")
    run_stitch(spec, client)
    assert np.array_equal(segmentation(folder), expected(noisy, [], []))
    without = results(folder)
    assert "pyramid" in run_stitch(spec.model_copy(update={"edits": None}), client).reused
    assert results(folder) == without


def test_edits_in_memory(noisy, noisy_dir, client, tmp_path):
    together, apart = chosen_edits(noisy)
    text = [f"merge,{u},{v}" for u, v in together] + [f"split,{u},{v}" for u, v in apart]
    path = write(tmp_path, "\n".join(["kind,a,b", *text]))
    found = find_fragments(path, read_edits(path), noisy_dir / "data.zarr", GRID, BLOCKS, "nm")
    run_stitch(noisy.spec(noisy_dir), client)
    evidence = read_evidence(noisy_dir)
    edits = constrain(path, found)
    result = agglomerate(evidence.nodes.ids, evidence.contacts, Thresholds(), edits=edits)
    cluster, _ = greedy(*rows_of(noisy), together=together, apart=apart)
    assert result.representatives.tolist() == [cluster[n] for n in result.ids.tolist()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name the columns kind, a, b"),
        ("kind,a,c\n", "the first line must name the columns"),
        ("kind,a,b,a\n", "the first line must name the columns"),
        ("kind,a,b,who\n", "the first line must name the columns"),
        ("kind,a,b\nmerge,1\n", "line 2: 2 values for 3 columns"),
        ("kind,a,b\n\nmerge,1,2,3,4,5,6\n", "line 3: 7 values for 3 columns .*in quotes"),
        ("kind,a,b\njoin,1,2\n", "line 2: kind 'join' is not merge or split"),
        ("kind,a,b\nmerge,1,-2\n", "line 2: b '-2' is neither a fragment id nor a point"),
        ("kind,a,b\nsplit,1 2 nan,4\n", "line 2: a '1 2 nan' is neither"),
        ("kind,a,b\nsplit,1e999 2 3,4\n", "is neither a fragment id nor a point"),
        ('kind,a,b\nmerge,"1,2\n', "line 2: unexpected end of data"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, text, message):
    with pytest.raises(InputError, match=f"edits.csv.*{message}"):
        read_edits(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "edits.csv").write_bytes(b"kind,a,b\nmerge,\xff,2")
    with pytest.raises(InputError, match=r"edits.csv: not a CSV file in UTF-8"):
        read_edits(tmp_path / "edits.csv")
    with pytest.raises(InputError, match=r"stitch.edits: .*none.csv: no such file"):
        read_edits(tmp_path / "none.csv")


def test_ends_that_are_no_fragment(noisy, noisy_dir, tmp_path):
    first = int(noisy.fragments[noisy.fragments > 0][0])
    background = np.argwhere(noisy.fragments == 0)[0] * GRID.voxel_size + GRID.offset
    nowhere = [
        (f"{first},{' '.join(map(str, background))}", "lies on background"),
        (f"{first},59 100 100", "point 59, 100, 100 nm is not in the volume"),
        (f"{first},60 11.9 100", "is not in the volume"),
        (f"{first},60 {12 + 33 * 6} 100", "is not in the volume"),
        (f"0,{first}", "fragment 0 lies on background"),
        (f"{first},{first + 2**20}", f"fragment {first + 2**20} does not exist"),
        (f"{2**64 - 1},{first}", "is not in the volume"),
        (f"{10**20 - 1},{first}", "is not in the volume"),
    ]
    for ends, message in nowhere:
        path = write(tmp_path, f"kind,a,b\nmerge,{first},{first}\nsplit,{ends}\n")
        with pytest.raises(InputError, match=f"edits.csv, line 3: .*{message}"):
            find_fragments(path, read_edits(path), noisy_dir / "data.zarr", GRID, BLOCKS, "nm")
    with pytest.raises(InputError, match=r"line 2: fragment .* lies in block 0, which takes no"):
        find_fragments(path, read_edits(path), noisy_dir / "data.zarr", GRID, BLOCKS[1:], "nm")


def test_edits_that_contradict_each_other(noisy, noisy_dir, client, tmp_path):
    a, b, c, d = np.unique(noisy.fragments)[[1, 5, 40, -1]].tolist()

    def run(*lines, **options):
        path = write(tmp_path, "\n".join(["kind,a,b", *lines]))
        return run_stitch(noisy.spec(noisy_dir, edits=path, levels=1, **options), client)

    with pytest.raises(InputError, match=f"line 3: both ends of the split lie in fragment {a},"):
        run(f"merge,{a},{a}", f"split,{a},{a}")
    chain = [f"merge,{a},{b}", f"split,{d},{a}", f"merge,{c},{b}", f"merge,{c},{d}"]
    with pytest.raises(InputError, match=r"line 3: the split .* \(line 2, 4, 5\); remove one"):
        run(*chain)
    run(*chain[:3])
    # Classes that may not merge.
    placed = {"voxel_size": GRID.voxel_size, "offset": GRID.offset}
    array = create_array(
        tmp_path / "c.zarr", "classes", shape=GRID.volume_shape, chunks=GRID.write_shape,
        dtype="uint8", **placed,
    )  # fmt: skip
    array[:] = np.where(noisy.fragments == a, 1, 0) + np.where(noisy.fragments == c, 2, 0)
    classes = {"path": str(tmp_path / "c.zarr"), "dataset": "classes"}
    with pytest.raises(InputError, match=r"line 4: the merge .* joins classes that may not merge"):
        run(*chain[:3], classes=classes)
    run(*chain[:3], classes=classes, classes_may_merge=((1, 2),))
