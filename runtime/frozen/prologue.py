"""Compute what depends only on weights once, and again when a weight changes.

`hoist` cuts a module at its ``graphopt.frozen`` nodes into a prologue, which runs on weights alone,
and a main module, which takes the prologue's results as further inputs. `WhileUnchanged`, in
`unchanged`, runs the prologue when it must.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, fx

import graphopt.ops  # noqa: F401  (registers graphopt::frozen)


@dataclass
class Hoisted:
    """A module in two parts.

    Attributes:
        prologue: takes the inputs at `sources`; returns the kept values.
        main: takes all inputs of the original module, then the kept values.
        sources: positions of the inputs that the prologue reads.
        inputs: how many inputs the original module has.
    """

    prologue: fx.GraphModule
    main: fx.GraphModule
    sources: tuple[int, ...]
    inputs: int

    @property
    def kept(self) -> list[fx.Node]:
        """The placeholders of the kept values, in the order of the prologue's results."""
        return list(self.main.graph.find_nodes(op="placeholder"))[self.inputs :]

    def keep(
        self, make: Callable[[fx.Graph, fx.Node], fx.Node], value: fx.Node, like: Tensor
    ) -> fx.Node:
        """Have the prologue compute something more from a kept value.

        Args:
            make: adds nodes to the prologue, whose node of the value it is given.
            value: the placeholder of a kept value.
            like: a fake value of the size of the new one.

        Returns:
            The placeholder of the new value.
        """
        results = _results(self.prologue)
        with self.prologue.graph.inserting_before(self.prologue.graph.output_node()):
            made = make(self.prologue.graph, results[self.kept.index(value)])
        made.meta["val"] = like
        self.prologue.graph.output_node().args = ([*results, made],)
        *_, last = self.main.graph.find_nodes(op="placeholder")
        with self.main.graph.inserting_after(last):
            placeholder = self.main.graph.placeholder(f"frozen_{len(results)}")
        placeholder.meta["val"] = like
        return placeholder

    def put_last(self, values: Collection[fx.Node]) -> None:
        """Have some kept values come after all others."""
        kept = dict(zip(self.kept, _results(self.prologue), strict=True))
        order = [*(n for n in kept if n not in values), *(n for n in kept if n in values)]
        for before, after in pairwise(order):
            before.append(after)
        self.prologue.graph.output_node().args = ([kept[n] for n in order],)

    def prune(self) -> None:
        """Forget kept values that nobody reads, and read bare weights where they are."""
        results, kept = _results(self.prologue), self.kept
        given = self.prologue.graph.find_nodes(op="placeholder")
        outer = self.main.graph.find_nodes(op="placeholder")
        staying = []
        for result, placeholder in zip(results, kept, strict=True):
            weight = result.args[0] if result.target is FROZEN else None
            if weight in given:
                read = outer[self.sources[given.index(weight)]]
                placeholder.replace_all_uses_with(read)
            if placeholder.users:
                staying.append(result)
            else:
                self.main.graph.erase_node(placeholder)
        self.prologue.graph.output_node().args = (staying,)
        self.prologue.graph.eliminate_dead_code()
        used = [bool(node.users) for node in given]
        for node in given:
            if not node.users:
                self.prologue.graph.erase_node(node)
        self.sources = tuple(s for s, is_used in zip(self.sources, used, strict=True) if is_used)
        self.prologue.recompile()
        self.main.recompile()


FROZEN = torch.ops.graphopt.frozen.default
aten = torch.ops.aten
_VIEWS = frozenset({aten.t.default, aten.permute.default, aten.view.default, aten.alias.default})


def reads_constant(
    weight: Any, kept: Collection[fx.Node]
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The kept value that a weight is, with the views between; ``None`` where it is none."""
    views: list[fx.Node] = []
    while isinstance(weight, fx.Node) and weight not in kept:
        if weight.target not in _VIEWS:
            return None
        views.append(weight)
        weight = weight.args[0]
    return (weight, tuple(reversed(views))) if isinstance(weight, fx.Node) else None


def is_marked(module: fx.GraphModule) -> bool:
    """Whether a module has values that may be kept."""
    return bool(module.graph.find_nodes(op="call_function", target=FROZEN))


def hoist(module: fx.GraphModule) -> Hoisted:
    """Cut a module at its frozen values. The module is not changed."""
    frozen = module.graph.find_nodes(op="call_function", target=FROZEN)
    needed: set[fx.Node] = set()
    pending = list(frozen)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    placeholders = module.graph.find_nodes(op="placeholder")
    sources = tuple(i for i, node in enumerate(placeholders) if node in needed)

    before = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in needed:
            env[node] = before.node_copy(node, lambda n: env[n])
    before.output([env[node] for node in frozen])

    after = fx.Graph()
    kept: dict[fx.Node, fx.Node] = {n: after.node_copy(n) for n in placeholders}
    for index, node in enumerate(frozen):
        kept[node] = after.placeholder(f"frozen_{index}")
        kept[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node not in kept:
            kept[node] = after.node_copy(node, lambda n: kept[n])
    after.eliminate_dead_code()
    prologue, main = fx.GraphModule(module, before), fx.GraphModule(module, after)
    return Hoisted(prologue, main, sources, len(placeholders))


def _results(prologue: fx.GraphModule) -> list[fx.Node]:
    return list(cast("Sequence[fx.Node]", prologue.graph.output_node().args[0]))
