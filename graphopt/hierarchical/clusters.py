"""Binary trees of clusters: which rows (or columns) of a matrix belong together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import ArgumentError

Split = Literal["box", "principal"]
_NO_GEOMETRY = "clusters by index have no geometry"


@dataclass(frozen=True, eq=False)
class Cluster:
    """Consecutive positions of a `ClusterTree`.

    Attributes:
        start: first position.
        stop: behind the last position.
        level: 0 for the root.
        index: number among the clusters of its level, from the left.
        low: corner of the bounding box of its points, [d]; None without points.
        high: the opposite corner, [d].
        children: two, or none for a leaf.
    """

    start: int
    stop: int
    level: int
    index: int
    low: Tensor | None
    high: Tensor | None
    children: tuple[Cluster, ...] = ()

    @property
    def size(self) -> int:
        """How many positions it has."""
        return self.stop - self.start

    @property
    def diameter(self) -> float:
        """Of the bounding box, Euclidean."""
        if self.low is None or self.high is None:
            raise ArgumentError(_NO_GEOMETRY, hint="use weak admissibility")
        return float(torch.linalg.vector_norm(self.high - self.low))

    def distance(self, other: Cluster) -> float:
        """Between the two bounding boxes, Euclidean; 0 where they touch."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            raise ArgumentError(_NO_GEOMETRY, hint="use weak admissibility")
        gap = torch.maximum(self.low - other.high, other.low - self.high).clamp(min=0)
        return float(torch.linalg.vector_norm(gap))


@dataclass(frozen=True, eq=False)
class Indices:
    """Those of a `ClusterTree` on one device.

    Attributes:
        order: as there.
        positions: as there.
    """

    order: Tensor
    positions: list[Tensor]


@dataclass(frozen=True, eq=False)
class ClusterTree:
    """A complete binary tree: all leaves are on one level, sizes of a level differ by one at most.

    Attributes:
        order: [n] the original index of each position.
        root: the cluster of all positions.
        points: [n, d] in the order of positions; None for a tree by index.
    """

    order: Tensor
    root: Cluster
    points: Tensor | None

    def __len__(self) -> int:
        return self.root.size

    @property
    def depth(self) -> int:
        """The level of the leaves."""
        node, depth = self.root, 0
        while node.children:
            node, depth = node.children[0], depth + 1
        return depth

    def level(self, number: int) -> list[Cluster]:
        """The clusters of one level, from the left."""
        found = [self.root]
        for _ in range(number):
            found = [child for cluster in found for child in cluster.children]
        return found

    @cached_property
    def starts(self) -> list[Tensor]:
        """Of each level, [2**level + 1]: where its clusters start; the last is the length."""
        found = []
        for number in range(self.depth + 1):
            level = self.level(number)
            found.append(torch.tensor([*(c.start for c in level), len(self)]))
        return found

    @cached_property
    def positions(self) -> list[Tensor]:
        """Of each level, [2**level, m] the positions of its clusters.

        m is the size of the largest; in the place of what others lack stands the length.
        """
        found = []
        for starts in self.starts:
            own = starts[:-1].unsqueeze(1) + torch.arange(int((starts[1:] - starts[:-1]).max()))
            found.append(torch.where(own < starts[1:].unsqueeze(1), own, len(self)))
        return found

    def on(self, device: torch.device) -> Indices:
        """Order and positions on a device, copied there once."""
        if device not in self._indices:
            positions = [own.to(device) for own in self.positions]
            self._indices[device] = Indices(self.order.to(device), positions)
        return self._indices[device]

    @cached_property
    def _indices(self) -> dict[torch.device, Indices]:
        return {}

    @cached_property
    def boxes(self) -> list[tuple[Tensor, Tensor]]:
        """Of each level, the corners of the bounding boxes of its clusters: two of [2**level, d].

        Raises:
            ArgumentError: a tree by index.
        """
        if self.points is None:
            raise ArgumentError(_NO_GEOMETRY, hint="use weak admissibility")
        low, high = self._leaf_boxes(self.points)
        found = [(low, high)]
        while low.shape[0] > 1:
            low, high = torch.minimum(low[::2], low[1::2]), torch.maximum(high[::2], high[1::2])
            found.insert(0, (low, high))
        return found

    def _leaf_boxes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        parts = points.double().tensor_split(self.starts[-1][1:-1])
        return torch.stack([p.amin(0) for p in parts]), torch.stack([p.amax(0) for p in parts])

    def clusters(self) -> Iterator[Cluster]:
        """All of them, level by level."""
        found = [self.root]
        while found:
            yield from found
            found = [child for cluster in found for child in cluster.children]

    def to_positions(self, values: Tensor) -> Tensor:
        """Rows [n, ...] in the order of positions."""
        return values[self.on(values.device).order]

    def to_original(self, values: Tensor) -> Tensor:
        """Rows [n, ...] in the original order; the inverse of `to_positions`."""
        found = torch.empty_like(values)
        found[self.on(values.device).order] = values
        return found


def by_index(n: int, leaf: int = 64) -> ClusterTree:
    """Halves of halves of ``range(n)``.

    Args:
        n: number of rows, at least 1.
        leaf: the most positions of a leaf, at least 2.
    """
    _checked(n, leaf)
    return ClusterTree(torch.arange(n), _halved(None, 0, n, leaf), None)


def by_points(points: Tensor, leaf: int = 64, split: Split = "box") -> ClusterTree:
    """Halves of halves, cut where points lie apart.

    Args:
        points: [n, d], finite; duplicates are allowed.
        leaf: the most points of a leaf, at least 2.
        split: ``box`` halves at the median of the longest side of the bounding box,
            ``principal`` at that of the direction in which the points vary most.
    """
    if not isinstance(points, Tensor):
        raise ArgumentError(
            f"points are a {type(points).__name__}", hint="pass a float tensor of [n, d]"
        )
    if points.dim() != 2 or not points.dtype.is_floating_point:
        raise ArgumentError(
            f"points are {tuple(points.shape)} {points.dtype}", hint="pass a float tensor of [n, d]"
        )
    _checked(points.shape[0], leaf)
    if points.shape[1] < 1:
        raise ArgumentError(
            "points have no coordinates", hint="pass a tensor of [n, d] with d >= 1"
        )
    finite = points.isfinite().all(1)
    if not finite.all():
        raise ArgumentError(
            f"point {int((~finite).nonzero()[0])} is not finite", hint="remove or mend it"
        )
    points = points.detach().cpu()
    order = torch.arange(points.shape[0])
    parts = [order]
    while max(part.numel() for part in parts) > leaf:
        parts = [half for part in parts for half in _cut(points, part, split)]
    order = torch.cat(parts)
    sorted_points = points[order].contiguous()
    return ClusterTree(order, _halved(sorted_points, 0, len(order), leaf), sorted_points)


def _checked(n: int, leaf: int) -> None:
    if n < 1:
        raise ArgumentError("a cluster tree of no rows", hint="pass at least one")
    if leaf < 2:
        # Halves of leaves of one would be empty where others still have two.
        raise ArgumentError(f"leaf={leaf} is too small", hint="pass at least 2, such as 64")


def _cut(points: Tensor, part: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """The two halves; the first is the larger one by a point where the number is odd."""
    own = points[part]
    if split == "box":
        side = int((own.amax(0) - own.amin(0)).argmax())
        along = own[:, side]
    else:
        centred = own - own.mean(0)
        along = centred @ torch.linalg.eigh(centred.T @ centred)[1][:, -1]
    found = part[along.argsort(stable=True)]
    half = (len(found) + 1) // 2
    return found[:half], found[half:]


def _halved(points: Tensor | None, start: int, stop: int, leaf: int) -> Cluster:
    """The tree over consecutive positions, as deep everywhere as its largest part needs."""
    depth, size = 0, stop - start
    while size > leaf:
        depth, size = depth + 1, (size + 1) // 2
    return _cluster(points, start, stop, 0, 0, depth)


def _cluster(
    points: Tensor | None, start: int, stop: int, level: int, index: int, depth: int
) -> Cluster:
    children: tuple[Cluster, ...] = ()
    if level < depth:
        middle = start + (stop - start + 1) // 2
        children = (
            _cluster(points, start, middle, level + 1, 2 * index, depth),
            _cluster(points, middle, stop, level + 1, 2 * index + 1, depth),
        )
    low = high = None
    if points is not None:
        own = points[start:stop]
        low, high = own.amin(0), own.amax(0)
    return Cluster(start, stop, level, index, low, high, children)
