"""Files of arrays: read again where CPython's parser of literals takes offence at nothing."""

import numpy as np
import pytest

from agq.blockwise.storage.arrays import load_arrays, map_array, parsed, save_array, save_arrays
from agq.errors import InputError


def test_arrays_come_back_by_prefix(tmp_path):
    arrays = {"a.x": np.arange(3), "a.y": np.zeros((2, 0)), "b": np.array([True])}
    save_arrays(tmp_path / "t.npz", arrays)
    found = load_arrays(tmp_path / "t.npz", "a.")
    assert sorted(found) == ["a.x", "a.y"]
    assert all(np.array_equal(found[name], arrays[name]) for name in found)
    save_array(tmp_path / "t.npy", arrays["a.x"])
    assert np.array_equal(map_array(tmp_path / "t.npy"), arrays["a.x"])
    (tmp_path / "t.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match="file is damaged"):
        load_arrays(tmp_path / "t.npz")


def test_a_mismatch_that_another_thread_made_is_no_error():
    """CPython before 3.11.8 and 3.12.2: threads that parse literals share one counter."""
    errors = [SystemError("AST constructor recursion depth mismatch (before=63, after=54)")] * 2

    def read() -> str:
        if errors:
            raise errors.pop()
        return "read"

    assert parsed(read) == "read"

    def broken() -> None:
        raise SystemError("something else")

    with pytest.raises(SystemError, match="something else"):
        parsed(broken)
