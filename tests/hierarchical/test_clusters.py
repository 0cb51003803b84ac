"""Trees are complete, cover all positions once, and have tight boxes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import hierarchical as h
from graphopt.hierarchical.admissibility import first, partition, refined
from tests.hierarchical.oracles import GEOMETRIES, points


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    leaf=st.integers(2, 40),
    d=st.integers(1, 3),
    kind=st.sampled_from(GEOMETRIES),
    split=st.sampled_from(["box", "principal"]),
)
def test_a_tree_is_complete_and_tight(n: int, leaf: int, d: int, kind: str, split: str) -> None:
    x = points(kind, n, d)
    tree = h.by_points(x, leaf, split)  # type: ignore[arg-type]
    assert tree.order.sort()[0].tolist() == list(range(n))
    assert torch.equal(tree.points, x[tree.order])
    for number in range(tree.depth + 1):
        level = tree.level(number)
        sizes = [c.size for c in level]
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1
        assert [c.start for c in level] == tree.starts[number][:-1].tolist()
        for c, low, high, places in zip(
            level, *tree.boxes[number], tree.positions[number], strict=True
        ):
            own = x[tree.order[c.start : c.stop]]
            assert torch.equal(low, own.amin(0))
            assert torch.equal(high, own.amax(0))
            assert torch.equal(c.low, low)
            assert places[places < n].tolist() == list(range(c.start, c.stop))
    assert max(c.size for c in tree.level(tree.depth)) <= leaf
    values = torch.randn(n, 2)
    assert torch.equal(tree.to_original(tree.to_positions(values)), values)


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    d=st.integers(1, 3),
    rule=st.sampled_from([h.Strong(), h.Strong(2.0, "min"), h.Weak(), h.Flat(), h.Flat(1)]),
    symmetric=st.booleans(),
)
def test_blocks_cover_every_entry_once(
    m: int, n: int, d: int, rule: h.Strong | h.Weak | h.Flat, symmetric: bool
) -> None:
    rows = h.by_points(points("uniform", m, d), 10)
    columns = rows if symmetric else h.by_points(points("clusters", n, d), 16)
    covered = partition(rows, columns, rule, symmetric)
    count = torch.zeros(len(rows), len(columns))
    for pairs in (*covered.far, covered.near):
        for row, column in zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True):
            i = slice(*rows.starts[pairs.row_level][row : row + 2].tolist())
            j = slice(*columns.starts[pairs.column_level][column : column + 2].tolist())
            count[i, j] += 1
            if symmetric and row != column:
                count[j, i] += 1
    assert bool((count == 1).all())


def test_strong_blocks_are_as_far_apart_as_clusters_say() -> None:
    tree = h.by_points(points("uniform", 400, 2), 16)
    for rule in (h.Strong(1.0, "max"), h.Strong(1.5, "min")):
        pairs = first()
        for _ in range(tree.depth):
            pairs = refined(tree, tree, pairs, False) or pairs
        level = tree.level(tree.depth)
        expected = []
        for i, j in zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True):
            sizes = level[i].diameter, level[j].diameter
            size = max(sizes) if rule.diameter == "max" else min(sizes)
            away = level[i].distance(level[j])
            expected.append(size <= rule.eta * away and away > 0)
        assert rule(tree, tree, pairs).tolist() == expected


def test_clusters_by_index_have_no_geometry() -> None:
    tree = h.by_index(100, 20)
    assert [c.size for c in tree.level(1)] == [50, 50]
    with pytest.raises(ValueError, match="no geometry"):
        _ = tree.root.diameter
    with pytest.raises(ValueError, match="no geometry"):
        tree.root.distance(tree.root)
    with pytest.raises(ValueError, match="no geometry"):
        partition(tree, tree, h.Strong())
