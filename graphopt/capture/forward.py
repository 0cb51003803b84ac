"""The forward graph: what `forward` calls, function by function, in front of autograd.

Passes may rewrite it before the joint graph is derived; autograd then derives the backward of what
they have left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from graphopt.capture.flat import FlatForward
from graphopt.graph import KEPT_META, Graph, Level
from graphopt.plan import Role, Signature, Slot


@dataclass(frozen=True)
class Rewritten:
    """What rewriting a forward graph in place has left.

    Attributes:
        earlier: copies of the graph before each change, oldest first.
        initial: values of inputs that were added, by the name of their slot.
    """

    earlier: tuple[Graph, ...] = ()
    initial: Mapping[str, Tensor] = field(default_factory=dict)


Rewriter = Callable[[Graph], Rewritten]


def forward_graph(flat: FlatForward) -> Graph:
    """The forward of a call as a graph of its own, with the form of each value in ``meta["val"]``.

    Outputs are named by their position among what Dynamo returns.
    """
    copied = fx.Graph()
    returned = copied.graph_copy(flat.module.graph, {})
    outputs = list(returned if isinstance(returned, tuple | list) else (returned,))
    copied.output(outputs)
    module = fx.GraphModule(flat.module, copied)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            _with_values(part.graph)
    for node in copied.nodes:
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    for index, node in enumerate(copied.find_nodes(op="placeholder")):
        node._rename(f"graphopt_input_{index}")
    for node, slot in zip(copied.find_nodes(op="placeholder"), flat.slots, strict=True):
        node._rename(slot.name.replace(".", "_"))
        node.target = node.name
    slots = tuple(Slot(Role.OUTPUT, str(position)) for position in range(len(outputs)))
    graph = Graph(module, Signature(flat.slots, slots), Level.FORWARD)
    graph.changed()
    return graph


def _with_values(graph: fx.Graph) -> None:
    """Give nodes the values that Dynamo has recorded; those of sub-graphs stay Dynamo's own."""
    for node in graph.nodes:
        example = node.meta.get("example_value")
        if example is not None:
            node.meta["val"] = example


def with_graph(flat: FlatForward, graph: Graph, initial: Mapping[str, Tensor]) -> FlatForward:
    """A flat forward that runs another graph, whose inputs are those it had or have values here."""
    values: dict[Slot, Tensor] = dict(zip(flat.slots, flat.inputs, strict=True))
    inputs: Sequence[Tensor] = [
        values[slot] if slot in values else initial[slot.name] for slot in graph.signature.inputs
    ]
    return replace(flat, module=graph.module, slots=graph.signature.inputs, inputs=tuple(inputs))
