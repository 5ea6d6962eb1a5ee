"""Cuts of segments, against sums over all pairs of fragments."""

import numpy as np
import pytest

from agq.pipeline.suspects.cuts import find_cuts
from agq.pipeline.suspects.evidence import CONTACT, NODE


@pytest.mark.parametrize("seed", range(5))
def test_a_cut_counts_all_contacts_between_its_sides(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = np.repeat([1, 2, 3], [1, 12, 25])
    nodes = np.zeros(len(groups), NODE)
    nodes["id"] = np.sort(random.choice(np.arange(1, 500), len(groups), replace=False))
    nodes["segment"], nodes["voxels"] = groups, random.integers(1, 100, len(groups))
    nodes["box"][:, :3] = random.integers(0, 50, (len(groups), 3))
    nodes["box"][:, 3:] = nodes["box"][:, :3] + random.integers(1, 9, (len(groups), 3))
    pairs = [
        (i, j)
        for i in range(len(groups))
        for j in range(i + 1, len(groups))
        if groups[i] == groups[j] and (j == i + 1 or random.random() < 0.2)
    ]
    inside = np.zeros(len(pairs), CONTACT)
    for row, (i, j) in zip(inside, pairs, strict=True):
        row["a"] = row["b"] = groups[i]
        row["u"], row["v"] = nodes["id"][i], nodes["id"][j]
        row["denominator"] = random.integers(1, 30)
        row["numerator"] = row["denominator"] * random.integers(1, 200)
    # Contacts that join no two trees count on no side.
    apart = np.zeros(2, CONTACT)
    ends = [np.flatnonzero(groups == g)[0] for g in sorted(set(groups.tolist()))[:2]]
    apart["a"] = apart["b"] = groups[ends[0]]
    apart["u"], apart["v"] = np.sort(nodes["id"][ends])
    apart["denominator"], apart["numerator"] = 1, -1
    inside = np.concatenate((inside, apart[:1]))
    random.shuffle(inside)
    cuts = find_cuts(nodes, inside)
    assert len(cuts.begin) == len(groups) - 3  # trees of three segments
    assert len({(int(b), int(e)) for b, e in zip(cuts.begin, cuts.end, strict=True)}) == len(
        cuts.begin
    )
    by_id = {int(node["id"]): node for node in nodes}
    for k in range(len(cuts.begin)):
        one = set(cuts.fragments[cuts.begin[k] : cuts.end[k]].tolist())
        whole = set(cuts.fragments[cuts.first[k] : cuts.last[k]].tolist())
        assert {int(by_id[n]["segment"]) for n in whole} == {int(by_id[min(one)]["segment"])}
        assert len(whole) == (groups == by_id[min(one)]["segment"]).sum()
        for side, ids in enumerate((one, whole - one)):
            members = np.array([by_id[n] for n in sorted(ids)])
            assert cuts.sides[k, side] == members["voxels"].sum()
            low, high = members["box"][:, :3].min(axis=0), members["box"][:, 3:].max(axis=0)
            assert cuts.boxes[k, side].tolist() == [*low, *high]
        crossing = inside[[(int(r["u"]) in one) != (int(r["v"]) in one) for r in inside]]
        crossing = crossing[crossing["a"] == by_id[min(one)]["segment"]]
        assert cuts.numerator[k] == crossing["numerator"].sum()
        assert cuts.denominator[k] == crossing["denominator"].sum()
        assert cuts.pairs[k] == len(crossing)
        contact = inside[cuts.contact[k]]
        assert (int(contact["u"]) in one) != (int(contact["v"]) in one)
