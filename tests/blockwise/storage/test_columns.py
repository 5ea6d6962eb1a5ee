"""Tables by columns: rows stay together, and files keep names, types and order."""

from dataclasses import dataclass

import numpy as np
import pytest

from agq.blockwise.storage.arrays import Boxes, Columns, Ids, Numbers, load_arrays, save_arrays


@dataclass(frozen=True)
class Objects(Columns):
    ids: Ids
    sizes: Numbers
    boxes: Boxes


def objects(*ids: int) -> Objects:
    values = np.array(ids, np.int64)
    return Objects(values.astype(np.uint64), 10 * values, np.tile(values[:, None], (1, 6)))


def equal(one: Objects, other: Objects) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in Objects.names()]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_rows_are_taken_and_put_together():
    table = objects(3, 5, 7, 9)
    assert len(table) == 4
    assert equal(table.take([2, 0]), objects(7, 3))
    assert equal(table.take(table.sizes > 40), objects(5, 7, 9))
    assert equal(Objects.concatenate([objects(3), objects(5, 7), objects(9)]), table)
    assert Objects.concatenate([table]) is table


def test_an_empty_table_has_the_types_of_its_columns():
    empty = Objects.empty()
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 6)
    assert equal(empty, objects(1).take([]))
    assert equal(Objects.concatenate([]), empty)
    assert equal(Objects.concatenate([empty, objects(1)]), objects(1))


def test_columns_of_different_lengths_are_refused():
    table = objects(1, 2)
    with pytest.raises(ValueError, match=r"Objects: columns differ in length: .*'sizes': 1"):
        Objects(table.ids, table.sizes[:1], table.boxes)


def test_files_hold_the_columns_in_order(tmp_path):
    table, path = objects(1, 2), tmp_path / "t.npz"
    save_arrays(path, {"other": table.ids} | table.arrays("objects"))
    assert list(load_arrays(path)) == ["other", "objects.ids", "objects.sizes", "objects.boxes"]
    assert equal(Objects.load(path, "objects"), table)
    assert equal(Objects.of_arrays("objects", load_arrays(path)), table)
