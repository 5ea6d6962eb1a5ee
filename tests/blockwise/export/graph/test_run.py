import itertools

import numpy as np
import pyarrow as pa
import pytest

from agq.blockwise.export.graph import run as graph_run
from agq.blockwise.export.graph.run import export_graph
from agq.blockwise.export.graph.tables import RECORD, read_graph
from agq.blockwise.stitch.contacts import ContactTable
from agq.blockwise.stitch.merge.agglomeration import agglomerate
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.stitch.settings import Thresholds
from agq.blockwise.stitch.workers import DaskWorkers
from agq.errors import InputError
from tests.helpers.fragments import GRID, folder_bytes, make_run, same_partition, write_run
from tests.helpers.stitch_runs import segmentation
from tests.helpers.whole_volume import contacts_from_volume


def tables(out) -> dict[str, pa.Table]:
    return {n: pa.concat_tables(read_graph(out, n)) for n in ("fragments", "edges", "merges")}


def rows(table: pa.Table) -> list[tuple]:
    return sorted(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))


@pytest.fixture(scope="module")
def made():
    return make_run(GRID, seed=5)


@pytest.fixture(scope="module")
def stitched(made, client, tmp_path_factory):
    """Return, for two sizes of superblocks, the run folder and its graph."""
    found = []
    for shape in ((1, 1, 1), (2, 1, 3)):
        folder = tmp_path_factory.mktemp("run")
        write_run(made, folder)
        spec = made.spec(folder, superblock=shape)
        run_stitch(spec, client)
        out = folder / "graph"
        report = export_graph(folder, out, GRID, spec.thresholds(), client)
        found.append((folder, out, report))
    return found


def test_merges_make_the_segmentation_and_scores_are_those_that_decided(made, stitched):
    evidence = contacts_from_volume(made.fragments, made.half_units, made.border)
    whole = agglomerate(evidence.nodes.ids, evidence.contacts, Thresholds())
    folder, out, report = stitched[0]
    found = tables(out)
    assert report.merges == len(found["merges"]) == len(whole.merges) > 100
    columns = [found["merges"][n].to_numpy() for n in ("u", "v", "numerator", "denominator")]
    expected = [getattr(whole.merges, n) for n in ("u", "v", "numerator", "denominator")]
    assert sorted(zip(*map(list, columns), strict=True)) == sorted(
        zip(*map(list, expected), strict=True)
    )
    # In the order of the tables, each merge joins two clusters by their smallest fragments.
    cluster = {i: i for i in found["fragments"]["id"].to_pylist()}
    for u, v in zip(columns[0].tolist(), columns[1].tolist(), strict=True):
        assert cluster[u] == u < v == cluster[v]
        cluster = {i: u if c == v else c for i, c in cluster.items()}
    united = np.vectorize({**cluster, 0: 0}.__getitem__, otypes=[np.uint64])(made.fragments)
    assert same_partition(united, segmentation(folder))


def test_fragments_and_edges_are_those_of_the_whole_volume(made, stitched):
    folder, out, _ = stitched[1]
    found = tables(out)
    labels, segments = made.fragments, segmentation(folder)
    ids, sizes = np.unique(labels[labels > 0], return_counts=True)
    by_id = {row["id"]: row for row in found["fragments"].to_pylist()}
    assert {i: by_id[i]["voxels"] for i in by_id} == dict(
        zip(ids.tolist(), sizes.tolist(), strict=True)
    )
    for i, row in by_id.items():
        point = tuple(row[f"point_{axis}"] for axis in "zyx")
        places = np.argwhere(labels == i)
        apart = ((places - places.mean(axis=0)) ** 2).sum(axis=1)
        assert labels[point] == i
        assert ((point - places.mean(axis=0)) ** 2).sum() == pytest.approx(apart.min())
        assert segments[point] == row["segment"]
    evidence = contacts_from_volume(labels, made.half_units, made.border).contacts
    counts = (evidence.across_count + evidence.within_count).tolist()
    pairs = zip(evidence.u.tolist(), evidence.v.tolist(), strict=True)
    edges = sorted(found["edges"].to_pylist(), key=lambda e: (e["u"], e["v"]))
    assert {(e["u"], e["v"]): e["contacts"] for e in edges} == dict(zip(pairs, counts, strict=True))
    sums = evidence.across_sum + evidence.within_sum
    expected = [
        (u, v, "across" if across else "within", total / 510 / count)
        for u, v, across, total, count in zip(
            evidence.u.tolist(), evidence.v.tolist(), evidence.across_count.tolist(),
            sums.tolist(), counts, strict=True,
        )
    ]  # fmt: skip
    assert [(e["u"], e["v"], e["class"]) for e in edges] == [e[:3] for e in sorted(expected)]
    assert [e["affinity"] for e in edges] == pytest.approx([e[3] for e in sorted(expected)])
    assert {e["class"] for e in edges} == {"across", "within"}
    for edge in edges:
        voxel = np.array([edge[f"voxel_{axis}"] for axis in "zyx"])
        beyond = [tuple(voxel + step) for step in np.eye(3, dtype=int)]
        ahead = [labels[p] for p in beyond if np.all(np.array(p) < labels.shape)]
        assert labels[tuple(voxel)] in (edge["u"], edge["v"])
        assert {edge["u"], edge["v"]} - {int(labels[tuple(voxel)])} <= set(map(int, ahead))
        world = [edge[f"world_{axis}"] for axis in "zyx"]
        assert world == (voxel * GRID.voxel_size + GRID.offset).tolist()
        assert 36 * edge["contacts"] <= edge["area"] <= 180 * edge["contacts"]


def test_superblocks_do_not_matter(stitched):
    one, other = (tables(out) for _, out, _ in stitched)
    for name in one:
        assert rows(one[name]) == rows(other[name]), name


def test_part_of_the_volume(made, stitched, client, tmp_path):
    folder, out, _ = stitched[1]
    roi = (0, 0, 0), (4, 24, 10)
    export_graph(folder, tmp_path / "part", GRID, Thresholds(), client, roi=roi)
    found, whole = tables(tmp_path / "part"), tables(out)
    inside = set(np.unique(made.fragments[:4, :24, :10]).tolist()) - {0}
    assert set(found["fragments"]["id"].to_pylist()) == inside
    kept = [r for r in rows(whole["edges"]) if r[0] in inside and r[1] in inside]
    assert rows(found["edges"]) == kept
    assert 0 < len(kept) < len(whole["edges"])


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(stitched, client, tmp_path, monkeypatch):
    folder, out, report = stitched[0]
    left = itertools.count()
    real = graph_run._Work.write

    def stopped(*arguments):
        if next(left) >= 9:
            raise ValueError("stopped")
        return real(*arguments)

    monkeypatch.setattr(graph_run._Work, "write", stopped)
    with pytest.raises(ValueError, match="stopped"):
        export_graph(folder, tmp_path / "again", GRID, Thresholds(), client)
    with pytest.raises(InputError, match="not complete"):
        tables(tmp_path / "again")
    monkeypatch.undo()
    assert export_graph(folder, tmp_path / "again", GRID, Thresholds(), client) == report
    assert folder_bytes(tmp_path / "again") == folder_bytes(out)


def test_a_roi_without_blocks_is_refused_before_anything_is_written(stitched, client, tmp_path):
    folder = stitched[0][0]
    for roi in (((900, 0, 0), (950, 4, 4)), ((4, 0, 0), (4, 4, 4))):
        with pytest.raises(InputError, match="the ROI holds no block of the volume"):
            export_graph(folder, tmp_path / "none", GRID, Thresholds(), client, roi=roi)
    assert not (tmp_path / "none").exists()


def test_another_export_is_not_written_over(stitched, client, tmp_path):
    folder, out, _ = stitched[0]
    with pytest.raises(InputError, match="another stitch or ROI"):
        export_graph(folder, out, GRID, Thresholds(), client, roi=((0, 0, 0), (4, 4, 4)))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="other files"):
        export_graph(folder, tmp_path, GRID, Thresholds(), client)
    assert (out / RECORD).exists()
    with pytest.raises(InputError, match="no graph"):
        tables(tmp_path)


def test_a_run_that_is_stitched_anew_meanwhile_is_noticed(made, client, tmp_path, monkeypatch):
    write_run(made, tmp_path / "run")
    run_stitch(made.spec(tmp_path / "run", levels=1), client)
    real = DaskWorkers.run

    def again(workers, name, *arguments):
        done = real(workers, name, *arguments)
        if name == "graph":
            run_stitch(made.spec(tmp_path / "run", levels=1, margin=0.05), client)
        return done

    monkeypatch.setattr(DaskWorkers, "run", again)
    with pytest.raises(InputError, match="was stitched anew during the export; remove"):
        export_graph(tmp_path / "run", tmp_path / "out", GRID, Thresholds(), client)
    with pytest.raises(InputError, match="not complete"):
        tables(tmp_path / "out")


def test_classes_of_edges():
    contacts = ContactTable.concatenate(
        [
            ContactTable.across(*np.array([[1], [5]], np.uint64), *np.array([[510], [2]])),
            ContactTable.within(*np.array([[1], [7]], np.uint64), *np.array([[255], [1]])),
            ContactTable.within(*np.array([[1], [8]], np.uint64), *np.array([[0], [0]])),
        ]
    )
    kinds, affinity = graph_run._evidence(contacts)
    assert kinds.to_pylist() == ["across", "within", "overlap"]
    assert affinity.to_pylist() == [0.5, 0.5, None]
