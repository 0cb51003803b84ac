"""Runs a graph operator by operator, and holds no more of it than is still read.

A step frees what it saves while its backward runs, and a loss has no more than one cotangent. A run
that kept inputs, tangents and results to its end would need more memory than any step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map, tree_map_only

from graphopt.analysis.effects import writes
from graphopt.analysis.hints import hints
from graphopt.ops.unrounded import unrounded


@dataclass(frozen=True)
class Late:
    """An input that is made anew for each operator that reads it, and by no operator written."""

    make: Callable[[], Tensor]


class Watched(fx.Interpreter):
    """Notes the first node whose recorded value has not the form of the real one.

    Args:
        module: owns the graph's constants.
        graph: what runs.
        take: takes results up where they are read no more, by their position.
    """

    untrue = ""

    def __init__(
        self, module: torch.nn.Module, graph: fx.Graph, take: Callable[[int, Any], None]
    ) -> None:
        super().__init__(module, graph=graph)
        self._take = take
        output = graph.output_node()
        returned: Any = output.args[0]
        self._ready = _last_reads(graph, returned)
        self._numbers = {i: v for i, v in enumerate(returned) if not isinstance(v, fx.Node)}
        last: dict[fx.Node, list[fx.Node]] = self.user_to_last_uses
        # A result goes where it is taken up, and not at the end.
        last[output] = []
        for node, ready in self._ready.items():
            last.setdefault(node, []).extend(result for result, _ in ready)

    def run_node(self, n: fx.Node) -> Any:
        """Run one, and hand over what it is the last to read."""
        if n.op == "output":
            for i, number in self._numbers.items():
                self._take(i, number)
            return None
        late = {node: v for node in n.all_input_nodes if isinstance(v := self.env[node], Late)}
        for node, value in late.items():
            self.env[node] = value.make()
        result = super().run_node(n)
        self.env.update(late)
        self._compare(n, result)
        for node, positions in self._ready.get(n, ()):
            value = result if node is n else self.env[node]
            for i in positions:
                self._take(i, value.make() if isinstance(value, Late) else value)
        return result

    def _compare(self, n: fx.Node, result: object) -> None:
        recorded = n.meta.get("val")
        if isinstance(recorded, Tensor) and isinstance(result, Tensor) and not self.untrue:
            shape = hints(recorded.shape)
            alike = shape == tuple(result.shape) and recorded.dtype == result.dtype
            known = shape is not None
            self.untrue = f"the recorded form of node {n.name!r}" if known and not alike else ""


def _last_reads(
    graph: fx.Graph, returned: Sequence[Any]
) -> dict[fx.Node, list[tuple[fx.Node, list[int]]]]:
    """By the node that reads them last, results and where they are returned."""
    positions: dict[fx.Node, list[int]] = {}
    for i, value in enumerate(returned):
        if isinstance(value, fx.Node):
            positions.setdefault(value, []).append(i)
    *nodes, output = graph.nodes
    order = {node: i for i, node in enumerate(nodes)}
    # In-place operators may still write to what nothing reads any more, through a view.
    is_written = any(writes(node) for node in nodes)
    found: dict[fx.Node, list[tuple[fx.Node, list[int]]]] = {}
    for node, where in positions.items():
        readers = [user for user in node.users if user is not output]
        last = max((node, *readers), key=order.__getitem__)
        found.setdefault(nodes[-1] if is_written else last, []).append((node, where))
    return found


class Widened(Watched):
    """Runs a graph in float32 where it computes in a shorter type, without what it rounds."""

    def run_node(self, n: fx.Node) -> Any:
        """See `Watched`."""
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """In float32, but with the random numbers, and only the kernels, that there are."""
        if without := unrounded(target):
            return without(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
            try:
                wide = tree_map_only(torch.dtype, _wide, (args, kwargs))
                return tree_map_only(Tensor, widened, target(*wide[0], **wide[1]))
            except (RuntimeError, NotImplementedError):
                pass  # a kernel that exists for short types only
        args, kwargs = tree_map(self._narrowed, (self._node.args, self._node.kwargs))
        return tree_map_only(Tensor, widened, target(*args, **kwargs))

    def _narrowed(self, own: Any) -> Any:
        if not isinstance(own, fx.Node):
            return own
        value, recorded = self.env[own], own.meta.get("val")
        if isinstance(value, Tensor) and isinstance(recorded, Tensor):
            return value.to(recorded.dtype)
        return value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(value: Tensor) -> Tensor:
    """In float32, if it is in a shorter type."""
    return value.to(_wide(value.dtype))
