"""Put products with factors in the place of products with a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.graph import Graph, value_of
from graphopt.passes.low_rank.sites import Use, Weight, uses_of
from graphopt.plan import Role, Signature, Slot
from graphopt.rewrite import emit, parametrized_name
from graphopt.structured import Form

aten, ours = torch.ops.aten, torch.ops.graphopt


def multiply_in_factors(
    graph: Graph, weight: Weight, form: Form, factors: Sequence[fx.Node]
) -> None:
    """Rewrite all uses of a weight; what made the weight goes, unless it is an input."""
    # Looked up again each time: what one product is multiplied with may be another one.
    while (use := next((use for _, use in uses_of(weight.node)), None)) is not None:
        # Operators of many operators may make tensors of their own, which are to be fake too.
        with graph.fx.inserting_before(use.node), value_of(use.x).fake_mode:
            new = _product(graph, use, form, list(factors))
        use.node.replace_all_uses_with(new)
        graph.fx.erase_node(use.node)
    _erase_unused(graph, weight.node)
    graph.changed()


def _erase_unused(graph: Graph, node: fx.Node) -> None:
    """The transposes of a weight, and the weight where it is computed."""
    for user in tuple(node.users):
        _erase_unused(graph, user)
    if node.op != "placeholder" and not node.users:
        graph.fx.erase_node(node)


def _product(graph: Graph, use: Use, form: Form, factors: list[fx.Node]) -> fx.Node:
    said = (form.name, list(form.sizes))
    target = ours.structured_linear.default
    if use.left and value_of(use.x).dim() > 1:
        target = ours.structured_matmul.default
        rest = (True,) if use.transposed else ()
        made = emit(graph, target, factors, use.x, *said, *rest, like=use.node)
    else:
        # A bias that is added to each row is one of a linear layer.
        fits = use.bias is not None and value_of(use.bias).dim() == 1 and not use.left
        own = use.bias if fits else None
        flags = {"transposed": True} if use.transposed else {}
        bias = () if own is None else (own,)
        made = emit(graph, target, use.x, factors, *said, *bias, like=use.node, **flags)
        if fits:
            return made
    if use.bias is None:
        return made
    return emit(graph, aten.add.Tensor, made, use.bias, like=use.node)


def with_factors(graph: Graph, weight: Weight, form: Form) -> list[fx.Node]:
    """New inputs for the factors of a weight that is an input."""
    fake = weight.value
    found = []
    for number, shape in enumerate(form.shapes):
        value = fake.new_empty(shape).detach().requires_grad_(fake.requires_grad)
        found.append(
            graph.add_input(Slot(Role.PARAM, parametrized_name(weight.name, number)), value)
        )
    return found


def without_input(graph: Graph, node: fx.Node) -> None:
    """Take an input that nobody reads off the graph."""
    index = graph.inputs.index(node)
    inputs = graph.signature.inputs
    graph.fx.erase_node(node)
    graph.signature = Signature(inputs[:index] + inputs[index + 1 :], graph.signature.outputs)
