"""Meshes cut into cells: the pieces fit together, and none crosses a border."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.export.meshes.octree import STEPS, pieces, z_order
from agq.blockwise.export.meshes.surface import Mesh, enclosed, is_closed, merge
from tests.helpers.meshes import fragments_of


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_pieces_of_any_closed_mesh_fit_together(data):
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    cells, halves = data.draw(st.sampled_from([1, 2, 4, 16])), data.draw(st.booleans())
    labels = rng.integers(0, 2, shape)
    labels[0, 0, 0] = 1
    mesh = merge([fragments_of(labels, 1)], shape)
    size = cells * STEPS
    places = mesh.vertices / max(shape) * size
    # Some vertices lie in borders, others anywhere.
    if data.draw(st.booleans()):
        places = places * 0.7 + rng.random(3) * 0.2 * size
    steps = np.rint(places).astype(np.int64).clip(0, size)
    cut = pieces(steps, mesh.faces, cells, halves=halves, near=3)
    assert cut is not None

    order = z_order(np.array([piece.cell for piece in cut]))
    assert (np.diff(order) > 0).all()
    for piece in cut:
        assert piece.vertices.min() >= 0
        assert piece.vertices.max() <= STEPS
        if halves:
            corners = piece.vertices[piece.faces]
            middle = 2**15
            assert not ((corners < middle).any(1) & (corners > middle).any(1)).any()
    places = np.concatenate([piece.vertices + np.array(piece.cell) * STEPS for piece in cut])
    before = np.cumsum([0, *(len(piece.vertices) for piece in cut)])
    faces = np.concatenate([piece.faces + n for piece, n in zip(cut, before, strict=False)])
    known, at = np.unique(places, axis=0, return_inverse=True)
    joined = Mesh(known / size, at.reshape(-1)[faces])
    assert is_closed(joined.faces)
    whole = enclosed(Mesh(steps / size, mesh.faces))
    assert abs(enclosed(joined) - whole) < 1e-3 * whole


def test_the_z_curve_turns_x_fastest():
    cells = np.array([(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)])
    assert z_order(cells).tolist() == list(range(8))
    assert z_order(np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2]])).tolist() == [8, 16, 32]
