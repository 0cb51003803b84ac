"""Graphs that are not well-formed lists of operator calls."""

from __future__ import annotations

import operator
from typing import Any

import torch

from graphopt.plan import Role, Signature, Slot
from tests.support.breaking import Broken, breaks, named, one_input
from tests.support.graphs import Builder, aten, linear_graph, output


@breaks("one-output")
def no_output() -> Broken:
    graph = linear_graph()
    graph.fx.erase_node(graph.output)
    return graph, "", "there is no output node"


@breaks("one-output")
def two_outputs() -> Broken:
    graph = linear_graph()
    graph.fx.output([])
    return graph, "output_1", "there are 2 output nodes"


@breaks("one-output")
def node_after_output() -> Broken:
    graph = linear_graph()
    with graph.fx.inserting_after(graph.output):
        graph.fx.call_function(aten.relu.default, (graph.inputs[0],))
    return graph, "output", "nodes follow the output"


@breaks("placeholders")
def late_placeholder() -> Broken:
    graph = linear_graph()
    with graph.fx.inserting_before(graph.output):
        graph.fx.placeholder("late")
    return graph, "late", "another node comes before this placeholder"


@breaks("placeholders")
def too_few_input_slots() -> Broken:
    graph = linear_graph()
    graph.signature = Signature(graph.signature.inputs[:2], graph.signature.outputs)
    return graph, "tangent_0", "3 placeholders, but 2 inputs in the signature"


@breaks("placeholders")
def too_many_input_slots() -> Broken:
    graph = linear_graph()
    inputs = (*graph.signature.inputs, Slot(Role.INPUT, "1"))
    graph.signature = Signature(inputs, graph.signature.outputs)
    return graph, "tangent_0", "3 placeholders, but 4 inputs in the signature"


@breaks("outputs")
def returns_a_node() -> Broken:
    graph = linear_graph()
    graph.output.args = (graph.outputs[0],)
    return graph, "output", "one argument, a flat list"


@breaks("outputs")
def returns_two_arguments() -> Broken:
    graph = linear_graph()
    graph.output.args = (list(graph.outputs), [])
    return graph, "output", "one argument, a flat list"


@breaks("outputs")
def returns_none() -> Broken:
    graph = linear_graph()
    graph.output.args = ([graph.outputs[0], None],)
    return graph, "output", "output grad 'w' is None, not a node"


@breaks("outputs")
def returns_nested() -> Broken:
    graph = linear_graph()
    graph.output.args = ([graph.outputs[0], [graph.outputs[1]]],)
    return graph, "output", "output grad 'w' is [mm_1], not a node"


@breaks("outputs")
def too_few_outputs() -> Broken:
    graph = linear_graph()
    graph.output.args = ([graph.outputs[0]],)
    return graph, "output", "1 values are returned, but the signature has 2"


@breaks("unique-names")
def two_nodes_one_name() -> Broken:
    graph = linear_graph()
    named(graph, "mm_1").name = "mm"
    return graph, "mm", "another node is called 'mm' too"


@breaks("unique-names")
def two_inputs_one_name() -> Broken:
    graph = linear_graph()
    w, _, tangent = graph.signature.inputs
    graph.signature = Signature((w, w, tangent), graph.signature.outputs)
    return graph, "param_w", "the signature has param 'w' more than once"


@breaks("unique-names")
def two_outputs_one_name() -> Broken:
    graph = linear_graph()
    graph.signature = Signature(graph.signature.inputs, (output(), output()))
    return graph, "mm", "the signature has output '0' more than once"


@breaks("defined-before-use")
def used_too_early() -> Broken:
    graph = linear_graph()
    named(graph, "mm_1").append(named(graph, "t"))
    return graph, "mm_1", "it uses 't', which comes later"


@breaks("defined-before-use")
def uses_itself() -> Broken:
    graph = linear_graph()
    node = named(graph, "mm")
    node.args = (node.args[0], node)
    return graph, "mm", "it uses 'mm', which comes later"


@breaks("defined-before-use")
def uses_another_graph() -> Broken:
    graph, other = linear_graph(), linear_graph()
    node = named(graph, "mm")
    node.args = (other.inputs[1], node.args[1])
    return graph, "mm", "it uses 'input_0', which is not in this graph"


def _with_target(target: Any, name: str) -> Broken:
    graph = linear_graph()
    named(graph, "t").target = target
    return graph, "t", f"it calls {name!r}, which is not an operator"


@breaks("allowed-targets")
def calls_torch() -> Broken:
    return _with_target(torch.t, "t")


@breaks("allowed-targets")
def calls_packet() -> Broken:
    return _with_target(aten.t, "t")


@breaks("allowed-targets")
def calls_python_operator() -> Broken:
    graph, node, _ = _with_target(operator.neg, "neg")
    return graph, node, "it calls 'operator.neg', which is for numbers only"


@breaks("allowed-targets")
def calls_method() -> Broken:
    graph = linear_graph()
    with graph.fx.inserting_before(graph.output):
        graph.fx.call_method("t", (graph.inputs[0],))
    return graph, "t_1", "nodes of kind 'call_method' are not allowed"


@breaks("attributes")
def missing_attribute() -> Broken:
    b = Builder()
    constant = b.constant("c", torch.ones(2))
    graph = b.build({output(): constant})
    constant.target = "gone.c"
    return graph, "c", "the module has no attribute 'gone.c'"


def _with_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], sentence: str) -> Broken:
    b, x = one_input()
    node = b.call(aten.sum.dim_IntList, x, [0])
    node.args, node.kwargs = (x, *args), kwargs
    return b.build({output(): node}), "sum_1", sentence


@breaks("arguments")
def too_many_arguments() -> Broken:
    sentence = "4 positional arguments for aten.sum.dim_IntList, which takes at most 3"
    return _with_arguments(([0], False, None), {}, sentence)


@breaks("arguments")
def too_few_arguments() -> Broken:
    return _with_arguments((), {}, "aten.sum.dim_IntList needs the argument 'dim'")


@breaks("arguments")
def unknown_keyword() -> Broken:
    sentence = "aten.sum.dim_IntList has no argument 'axis'"
    return _with_arguments(([0],), {"axis": 0}, sentence)


@breaks("arguments")
def argument_twice() -> Broken:
    sentence = "aten.sum.dim_IntList gets its argument 'dim' twice"
    return _with_arguments(([0],), {"dim": [0]}, sentence)


def _with_value(name: str, value: object) -> Broken:
    graph = linear_graph()
    named(graph, name).meta["val"] = value
    kind = "a real tensor" if isinstance(value, torch.Tensor) else "no `val`"
    return graph, name, kind


@breaks("values")
def call_without_value() -> Broken:
    return _with_value("mm", None)


@breaks("values")
def placeholder_without_value() -> Broken:
    return _with_value("input_0", None)


@breaks("values")
def real_value() -> Broken:
    return _with_value("mm", torch.ones(4, 2))


@breaks("values")
def constant_without_value() -> Broken:
    b = Builder()
    constant = b.constant("c", torch.ones(2))
    del constant.meta["val"]
    return b.build({output(): constant}), "c", "it has no `val` in its meta"


@breaks("values")
def element_without_value() -> Broken:
    b, x = one_input()
    element = b.call(operator.getitem, b.call(aten.sort.default, x), 0)
    del element.meta["val"]
    return b.build({output(): element}), "getitem", "it has no `val` in its meta"


def _with_index(index: object, sentence: str) -> Broken:
    b, x = one_input()
    source = b.call(aten.sort.default, x)
    element = b.call(operator.getitem, source, 0)
    element.args = (source, index)
    return b.build({output(): element}), "getitem", sentence


@breaks("elements")
def element_beyond_the_end() -> Broken:
    return _with_index(2, "sort has 2 elements and no element 2")


@breaks("elements")
def element_before_the_start() -> Broken:
    return _with_index(-1, "sort has 2 elements and no element -1")


@breaks("elements")
def element_slice() -> Broken:
    return _with_index(slice(0, 1), "sort has 2 elements and no element slice")


@breaks("elements")
def element_without_index() -> Broken:
    graph, node, _ = _with_index(0, "")
    named(graph, node).args = named(graph, node).args[:1]
    return graph, node, "getitem takes a node and an index"


@breaks("elements")
def element_with_keyword() -> Broken:
    graph, node, _ = _with_index(0, "")
    named(graph, node).kwargs = {"default": 0}
    return graph, node, "getitem takes a node and an index"


@breaks("elements")
def element_of_a_tensor() -> Broken:
    b, x = one_input()
    element = b.call(operator.getitem, x, 0)
    return b.build({output(): element}), "getitem", "input_0 has no elements"
