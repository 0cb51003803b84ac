"""Compute what depends only on weights once, and again when a weight changes.

`hoist` cuts a module at its ``graphopt.frozen`` nodes into a prologue, which runs on weights alone,
and a main module, which takes the prologue's results as further inputs. `WhileUnchanged` runs the
prologue when it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

import graphopt.ops  # noqa: F401  (registers graphopt::frozen)
from graphopt.runtime.frozen.convolutions import pack_convolutions

# Elements compared per weight. Code that keeps moving averages updates ``.data``, which does not
# bump the version counter; such an update changes every element.
SAMPLE = 16


@dataclass(frozen=True)
class Hoisted:
    """A module in two parts.

    Attributes:
        prologue: takes the inputs at `sources`; returns the frozen values.
        main: takes all inputs of the original module, then the frozen values.
        sources: positions of the inputs that the prologue reads.
    """

    prologue: fx.GraphModule
    main: fx.GraphModule
    sources: tuple[int, ...]


def hoist(module: fx.GraphModule) -> Hoisted | None:
    """Cut a module at its frozen values; ``None`` when it has none. The module is not changed."""
    frozen = module.graph.find_nodes(op="call_function", target=torch.ops.graphopt.frozen.default)
    if not frozen:
        return None
    hoisted = Hoisted(*_prologue(module, frozen))
    values = hoisted.main.graph.find_nodes(op="placeholder")[-len(frozen) :]
    pack_convolutions(hoisted.main, {node.name for node in values})
    return hoisted


def _prologue(
    module: fx.GraphModule, frozen: Sequence[fx.Node]
) -> tuple[fx.GraphModule, fx.GraphModule, tuple[int, ...]]:
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
    return fx.GraphModule(module, before), fx.GraphModule(module, after), sources


class WhileUnchanged:
    """An executable whose prologue runs again when one of its weights has changed.

    Args:
        prologue: from weights to frozen values; both executables empty their argument list.
        main: takes the inputs of the call followed by the frozen values.
        sources: positions of the weights among the inputs.
    """

    def __init__(self, prologue: Any, main: Any, sources: Sequence[int]) -> None:
        self.prologue = prologue
        self.main = main
        self.sources = tuple(sources)
        self.values: list[Tensor] = []
        self._seen: tuple[tuple[int, int, int], ...] = ()
        self._samples: list[Tensor] = []
        self._sampled: list[float] = []

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        """Outputs of the main module; empties the list."""
        weights = [arguments[i] for i in self.sources]
        if self._changed(weights):
            self.values = list(self.prologue(list(weights)))
        arguments.extend(self.values)
        return cast("Sequence[Any]", self.main(arguments))

    def _changed(self, weights: Sequence[Tensor]) -> bool:
        seen = tuple((id(t), t.data_ptr(), t._version) for t in weights)
        if seen == self._seen and self._read() == self._sampled:
            return False
        self._seen = seen
        self._samples = [_sample(t) for t in weights]
        self._sampled = self._read()
        return True

    def _read(self) -> list[float]:
        # One concatenation promotes all dtypes to one, and one transfer reads it.
        return cast("list[float]", torch.cat(self._samples).tolist())


def _sample(tensor: Tensor) -> Tensor:
    """A view of some elements, spread over the storage."""
    detached = tensor.detach()
    step = max(1, tensor.numel() // SAMPLE)
    return detached.as_strided((-(-tensor.numel() // step),), (step,))
