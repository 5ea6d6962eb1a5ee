import json

import numpy as np
import pyarrow as pa
import pytest

from agq.blockwise.export.graph.run import export_graph
from agq.blockwise.export.graph.tables import read_graph
from agq.blockwise.export.graph.webknossos import write_dataset
from agq.blockwise.stitch.run import run_stitch
from agq.blockwise.volumes.create import open_array
from tests.helpers.fragments import GRID, folder_bytes, make_run, write_run
from tests.helpers.readers import read_with
from tests.helpers.stitch_runs import segmentation

READ = """
import webknossos as wk
layer = wk.Dataset.open(arguments["folder"]).get_layer("fragments")
(attachment,) = layer.attachments.agglomerates
graph = attachment.to_graph()
result = {
    "name": attachment.name,
    "voxel_size": list(layer.dataset.voxel_size),
    "largest": layer.largest_segment_id,
    "volume": layer.get_finest_mag().read()[0].tolist(),
    "box": layer.get_finest_mag().read(
        absolute_bounding_box=wk.BoundingBox((3, 5, 2), (4, 6, 7))
    )[0].tolist(),
    "positions": [[n, *graph.nodes[n]["position"]] for n in graph.nodes],
    "edges": [[*sorted((u, v)), data["affinity"]] for u, v, data in graph.edges(data=True)],
}
"""


@pytest.fixture(scope="module")
def made():
    return make_run(GRID, seed=5)


@pytest.mark.parametrize("segment_ids", ["consecutive", "fragment"])
def test_webknossos_libs_read_what_is_written(made, client, tmp_path, segment_ids):
    folder, out = tmp_path / "run", tmp_path / "graph"
    write_run(made, folder)
    ids = np.unique(made.fragments)[1:].tolist()
    edits = tmp_path / "edits.csv"
    edits.write_text(f"kind,a,b\nmerge,{ids[0]},{ids[-1]}\nmerge,{ids[3]},{ids[0]}\n")
    spec = made.spec(folder, edits=edits, min_size=20, segment_ids=segment_ids, levels=1)
    run_stitch(spec, client)
    export_graph(folder, out, GRID, spec.thresholds(), client)
    count = write_dataset(folder, out, GRID, client)
    written = folder_bytes(out / "webknossos")
    assert write_dataset(folder, out, GRID, client) == count
    assert folder_bytes(out / "webknossos") == written

    found = read_with(READ, {"folder": str(out / "webknossos")})
    assert (found["name"], found["largest"]) == ("segmentation", len(ids))
    assert found["voxel_size"] == [6, 6, 30]
    number = {fragment: i for i, fragment in enumerate(ids, 1)} | {0: 0}
    numbers = np.vectorize(number.__getitem__)(made.fragments)
    assert np.array_equal(np.array(found["volume"]).T, numbers)
    assert np.array_equal(np.array(found["box"]).T, numbers[2:9, 5:11, 3:7])
    segments = segmentation(folder)
    of = dict(zip(numbers.ravel().tolist(), segments.ravel().tolist(), strict=True))
    kept = {n for n, segment in of.items() if segment}
    assert len(ids) - len(kept) > 0
    assert {row[0] for row in found["positions"]} == kept
    for n, x, y, z in found["positions"]:
        assert numbers[z, y, x] == n
    # Every edge is a contact inside a segment, or an edit; and they connect all of it.
    rows = pa.concat_tables(read_graph(out, "edges")).to_pylist()
    contacts = {(number[r["u"]], number[r["v"]]): r["affinity"] for r in rows}
    expected = {pair: a for pair, a in contacts.items() if of[pair[0]] == of[pair[1]] != 0}
    far = {(1, len(ids)), (1, 4)} - set(contacts)
    expected |= dict.fromkeys(far, 1.0)
    assert far
    assert {(u, v): a for u, v, a in found["edges"]} == pytest.approx(expected)
    assert count == len(expected)
    root = {n: n for n in kept}
    for u, v, _ in found["edges"]:
        a, b = sorted((root[u], root[v]))
        root = {n: a if r == b else r for n, r in root.items()}
    assert (
        len({(root[n], of[n]) for n in kept})
        == len(set(root.values()))
        == len({of[n] for n in kept})
    )
    attachment = out / "webknossos" / "fragments" / "agglomerates" / "segmentation"
    table = open_array(attachment, "segment_to_agglomerate", "r")[:]
    order = sorted({of[n] for n in kept})
    named = of if segment_ids == "consecutive" else {n: order.index(of[n]) + 1 for n in kept}
    assert table.tolist() == [0, *(named.get(n, 0) for n in range(1, len(ids) + 1))]
    meta = json.loads((attachment / "zarr.json").read_text())
    assert meta["attributes"]["voxelytics"]["artifact_schema_version"] == 4
