"""A run on a precomputed volume, from the command line."""

from tests.helpers.runs import blobs, make_config, results
from tests.helpers.volumes import put_precomputed


def test_fragments_are_those_of_the_same_voxels_in_zarr(main, tmp_path):
    data = blobs((12, 20, 30))
    put_precomputed(tmp_path / "raw", [data], [[6, 6, 30]])
    put_precomputed(tmp_path / "mask", [(data > 60).astype("uint8")], [[6, 6, 30]])
    mask = {"path": f"precomputed://{tmp_path}/mask"}
    configs = [
        make_config(tmp_path, data, run_dir=str(tmp_path / "run"), input={"mask": mask}),
        tmp_path / "precomputed.yaml",
    ]
    text = configs[0].read_text().replace(str(tmp_path / "run"), str(tmp_path / "other"))
    text = text.replace(str(tmp_path / "in.zarr"), f"precomputed://{tmp_path}/raw")
    configs[1].write_text(text.replace("dataset: raw", "dataset: null"))
    code, out, _ = main("plan", configs[1], "--no-time")
    assert code == 0
    assert f"precomputed://{tmp_path}/raw" in out.replace("\n", "")
    for config in configs:
        code, _, error = main("predict", config)
        assert code == 0, error
    assert results(tmp_path / "run") == results(tmp_path / "other")
    assert results(tmp_path / "run")
