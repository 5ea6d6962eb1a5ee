"""Surfaces: closed for all labels, the same for all blocks, simplified within bounds."""

from itertools import pairwise

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from agq.blockwise.export.meshes import surface
from agq.blockwise.export.meshes.cells import places_of
from agq.blockwise.export.meshes.surface import enclosed, is_closed, merge, simplify
from tests.helpers.meshes import cells, fragments_of, surface_distance, surface_distances


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_label_of_any_volume_has_a_closed_surface(data):
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3))
    seed, most = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(1, 4))
    labels = np.random.default_rng(seed).integers(0, most + 1, shape)
    for label in np.unique(labels[labels > 0]):
        part = fragments_of(labels, label)
        mesh = merge([part], shape)
        assert is_closed(mesh.faces)
        checked = trimesh.Trimesh(*mesh, process=False)
        assert checked.is_watertight
        assert checked.is_winding_consistent
        assert 0 < checked.volume <= part.voxels
        # No vertex is off the surface of the voxels: each lies in the middle of one's face.
        inside = np.pad(labels == label, 1)
        low = np.floor(mesh.vertices - 0.25).astype(int)[:, ::-1] + 1
        high = np.floor(mesh.vertices + 0.25).astype(int)[:, ::-1] + 1
        assert (inside[tuple(low.T)] != inside[tuple(high.T)]).all()


def test_a_simplified_mesh_is_closed_and_holds_the_volume():
    labels, size = cells((40, 60, 60), 20, 0), (8.0, 8.0, 20.0)
    before = after = 0
    for label in range(1, 21):
        part = fragments_of(labels, label)
        if not part.voxels:
            continue
        full = merge([part], labels.shape)
        (mesh,) = simplify(full, part.voxels, size, 0.1)
        before, after = before + len(full.faces), after + len(mesh.faces)
        assert is_closed(mesh.faces)
        assert enclosed(mesh) == pytest.approx(part.voxels, rel=0.02)
        assert surface_distance(mesh, labels == label).max() <= 1
    assert after < 0.2 * before


def test_levels_are_coarser_and_coarser_within_bounds(monkeypatch):
    monkeypatch.setattr(surface, "ROOT_FACES", 150)
    labels = cells((30, 40, 40), 6, 0)
    part = fragments_of(labels, 1)
    levels = simplify(merge([part], labels.shape), part.voxels, (8.0, 8.0, 20.0), 0.1)
    assert len(levels) > 2
    off = surface_distances(labels == 1, most=8)
    for level, (mesh, coarser) in enumerate(pairwise(levels)):
        assert len(coarser.faces) < 0.5 * len(mesh.faces)
        assert is_closed(coarser.faces)
        assert enclosed(coarser) == pytest.approx(part.voxels, rel=0.04 * 2**level)
        assert off(coarser).max() <= 2 ** (level + 1)


def test_a_single_voxel_keeps_its_volume():
    labels = np.zeros((3, 3, 3), int)
    labels[1, 1, 1] = 1
    (mesh,) = simplify(merge([fragments_of(labels, 1)], labels.shape), 1, (8, 8, 40), 0.1)
    assert enclosed(mesh) == pytest.approx(1, rel=0.02)
    assert is_closed(mesh.faces)


def test_sheets_that_meet_at_an_edge_are_parted():
    """Two cubes that share an edge: four faces at it."""
    one = trimesh.creation.box((1, 1, 1))
    other = one.copy()
    other.apply_translation((1, 1, 0))
    corners = np.concatenate([one.vertices, other.vertices])
    vertices, places = np.unique(corners, axis=0, return_inverse=True)
    faces = places.reshape(-1)[np.concatenate([one.faces, other.faces + 8])]
    assert not is_closed(faces)
    mesh = surface._separated(vertices, faces)
    assert is_closed(mesh.faces)
    # Each cube has a vertex of its own in the middle of the edge.
    assert len(mesh.vertices) == 18
    assert len(np.unique(mesh.vertices, axis=0)) == 18
    assert enclosed(mesh) == pytest.approx(2, abs=0.2)
    assert trimesh.Trimesh(*mesh, process=False).body_count == 2


def test_places_are_half_voxels():
    assert places_of(np.array([0, 5 * 7 * 3 - 1]), (1, 2, 3)).tolist() == [[0, 0, 0], [3, 2, 1]]
