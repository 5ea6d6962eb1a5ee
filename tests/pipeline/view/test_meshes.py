"""Which meshes belong to a run as it is stitched now."""

import json

from agq.pipeline.view.meshes import meshes_of


def test_meshes_of_an_older_stitch_are_not_shown(tmp_path):
    for file, content in (
        ("stitch/pyramid.json", {"done": True, "key": "b"}),
        ("precomputed/.agq-export/export.json", {"version": "b"}),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    assert meshes_of(tmp_path) is None
    info = tmp_path / "precomputed" / "mesh" / "info"
    info.parent.mkdir()
    info.write_text("{}")
    assert meshes_of(tmp_path) == info.parent
    (tmp_path / "stitch" / "pyramid.json").write_text(json.dumps({"done": True, "key": "c"}))
    assert meshes_of(tmp_path) is None
