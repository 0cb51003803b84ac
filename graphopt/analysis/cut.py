"""An exact minimum cut of a network whose nodes are any objects."""

from __future__ import annotations

import numpy as np

SOURCE, SINK = "source", "sink"

# Capacities are 32-bit integers, and so is the flow: all finite ones together stay below this.
_LARGEST = 2**30


class Network:
    """Directed edges with a capacity of any unit, or without a limit.

    Capacities are rounded to 2**-30 of their sum.
    """

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {SOURCE: 0, SINK: 1}
        self._edges: dict[tuple[int, int], float] = {}
        self._free: set[tuple[int, int]] = set()

    def edge(self, start: object, end: object, capacity: float | None) -> None:
        """Add to the capacity from one node to another; ``None`` is without a limit."""
        key = (self._number(start), self._number(end))
        if capacity is None:
            self._free.add(key)
        self._edges[key] = self._edges.get(key, 0.0) + (capacity or 0.0)

    def source_side(self) -> set[object]:
        """What the source still reaches once the largest flow is subtracted."""
        if not self._edges:
            return {SOURCE}
        # Half a second to import, and few models have a cut to find.
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        count, keys = len(self._numbers), list(self._edges)
        total = sum(self._edges.values())
        scale = _LARGEST / total if total > 0 else 1.0
        capacities = [
            _LARGEST if key in self._free else round(capacity * scale)
            for key, capacity in self._edges.items()
        ]
        rows, columns = np.array(keys, dtype=np.int32).T
        shape = (count, count)
        graph = csr_array((np.array(capacities, dtype=np.int32), (rows, columns)), shape=shape)
        flow = maximum_flow(graph, 0, 1).flow
        residual = (graph - flow).tocsr()
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, 0, return_predecessors=False)
        names = list(self._numbers)
        return {names[i] for i in reached}

    def _number(self, name: object) -> int:
        return self._numbers.setdefault(name, len(self._numbers))
