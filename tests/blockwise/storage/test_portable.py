"""Records of a folder that is moved."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agq.blockwise.storage.portable import from_portable, to_portable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(values=VALUES)
def test_what_names_no_path_inside_stays(values):
    folder = Path("/data/run")
    assert from_portable(to_portable(values, folder), folder) == values


def test_paths_inside_move_with_the_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder)
    values = {
        "a": [str(folder / "imported" / "x.zarr"), str(folder)],
        "b": {"through a link": str(link / "x"), "beside": f"{folder}2/x", "n": 3},
    }
    kept = to_portable(values, link)
    assert kept == {
        "a": ["{run_dir}/imported/x.zarr", "{run_dir}"],
        "b": {"through a link": "{run_dir}/x", "beside": f"{folder}2/x", "n": 3},
    }
    assert from_portable(kept, Path("/new"))["a"] == ["/new/imported/x.zarr", "/new"]
