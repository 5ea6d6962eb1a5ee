"""Skeletons as others read them: neuroglancer's binary form, and SWC."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from agq.blockwise.export.skeletons.join import Skeleton

INFO: dict[str, Any] = {
    "@type": "neuroglancer_skeletons",
    "transform": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
    "vertex_attributes": [{"id": "radius", "data_type": "float32", "num_components": 1}],
}


def sharding_of(largest: int, segments: int) -> dict[str, Any] | None:
    """Return the specification of shards that hold consecutive ids, or None: a file for each.

    Parameters
    ----------
    largest, segments
        The largest id, and how many there are. Ids that are spread thin would leave most shards
        empty and some too full.
    """
    if largest > 64 * segments + 2**16:
        return None
    bits = int(largest).bit_length()
    inside = min(bits, 14)
    return {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": "identity",
        "preshift_bits": min(inside, 8),
        "minishard_bits": inside - min(inside, 8),
        "shard_bits": bits - inside,
        "minishard_index_encoding": "gzip",
        "data_encoding": "gzip",
    }


def ids_of_shard(sharding: dict[str, Any]) -> int:
    """Return how many consecutive ids a shard holds."""
    return 1 << int(sharding["preshift_bits"] + sharding["minishard_bits"])


def encoded(skeleton: Skeleton) -> bytes:
    """Return the file of a segment: vertices in nanometres (x, y, z), edges, radii."""
    return b"".join(
        [
            np.array([len(skeleton.nodes), len(skeleton.edges)], "<u4").tobytes(),
            np.ascontiguousarray(skeleton.nodes[:, ::-1], "<f4").tobytes(),
            skeleton.edges.astype("<u4").tobytes(),
            skeleton.radii.astype("<f4").tobytes(),
        ]
    )


def swc(skeleton: Skeleton, segment: int) -> str:
    """Return the text of an SWC file, in nanometres; parents come before their children."""
    count = len(skeleton.nodes)
    graph = sparse.coo_matrix((np.ones(len(skeleton.edges)), skeleton.edges.T), (count, count))
    parts, part = sparse.csgraph.connected_components(graph, directed=False)
    lines = [f"# segment {segment}, nanometres: number type x y z radius parent"]
    number = np.zeros(count, np.int64)
    done = 0
    graph = graph.tocsr()
    for root in np.unique(part, return_index=True)[1][:parts]:
        order, parents = sparse.csgraph.breadth_first_order(graph, int(root), directed=False)
        for node in order:
            done += 1
            number[node] = done
            parent = number[parents[node]] if parents[node] >= 0 else -1
            z, y, x = skeleton.nodes[node]
            lines.append(f"{done} 0 {x:.9g} {y:.9g} {z:.9g} {skeleton.radii[node]:.6g} {parent}")
    return "\n".join(lines) + "\n"
