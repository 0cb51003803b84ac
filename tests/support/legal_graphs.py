"""Hand-made graphs that use what the invariants restrict, and use it rightly."""

from __future__ import annotations

import operator

import torch
import torch.distributed._functional_collectives
from torch import fx

import graphopt.ops
from graphopt.graph import Graph, Level
from graphopt.plan import Phase, Role
from tests.support.graphs import Builder, aten, grad, mutation, output

assert graphopt.ops  # registers torch.ops.graphopt
collective = torch.ops._c10d_functional
frozen = torch.ops.graphopt.frozen.default
cond = torch.ops.higher_order.cond


def branch(*targets: object) -> fx.GraphModule:
    """A subgraph of one input for `cond` that calls these functions after each other."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for target in targets:
        name, args = target if isinstance(target, tuple) else (target, ())
        node = graph.call_function(name, (node, *args))
    graph.output((node,))
    return fx.GraphModule(torch.nn.Module(), graph)


def batch_norm() -> Graph:
    """Several results, some of them unused or returned as mutations; a constant."""
    b = Builder()
    w = b.input(Role.PARAM, "w", (3,))
    mean = b.input(Role.BUFFER, "mean", (3,))
    var = b.input(Role.BUFFER, "var", (3,))
    x = b.input(Role.INPUT, "0", (2, 3, 4))
    shift = b.constant("shift", torch.ones(3))
    op = aten._native_batch_norm_legit_functional.default
    norm = b.call(op, x, w, shift, mean, var, True, 0.1, 1e-5)
    y, new_mean, new_var = (b.call(operator.getitem, norm, i) for i in (0, 3, 4))
    return b.build({mutation("mean"): new_mean, mutation("var"): new_var, output(): y})


def partial_convolution_backward() -> Graph:
    """An operator one of whose results is None."""
    b = Builder()
    w = b.input(Role.PARAM, "w", (4, 3, 1))
    x = b.input(Role.INPUT, "0", (2, 3, 5))
    tangent = b.input(Role.TANGENT, "0", (2, 4, 5))
    geometry = ([1], [0], [1], False, [0], 1)
    y = b.call(aten.convolution.default, x, w, None, *geometry)
    op = aten.convolution_backward.default
    grads = b.backward(op, tangent, x, w, [0], *geometry, [False, True, False])
    return b.build({output(): y, grad("w"): b.backward(operator.getitem, grads, 1)})


def branches() -> Graph:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    positive = b.call(aten.gt.Scalar, b.call(aten.sum.default, x), 0)
    yes = b.subgraph("yes", branch(aten.relu.default))
    no = b.subgraph("no", branch(aten.neg.default))
    chosen = b.call(cond, positive, yes, no, (x,))
    return b.build({output(): b.call(operator.getitem, chosen, 0)}, Level.INFERENCE)


def in_place_on_fresh_value() -> Graph:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    fresh = b.call(aten.neg.default, x)
    both = b.call(aten.split.Tensor, b.call(aten.add_.Tensor, fresh, 1), 2)
    return b.build({output(): b.call(operator.getitem, both, 0)})


def in_place_on_declared_state() -> Graph:
    b = Builder()
    state = b.input(Role.STATE, "count", (4,))
    x = b.input(Role.INPUT, "0", (4,))
    added = b.call(aten.add_.Tensor, state, x)
    return b.build({mutation("count"): added, output(): b.call(aten.neg.default, added)})


def in_place_on_one_of_two_results() -> Graph:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4,))
    sort = b.call(aten.sort.default, x)
    values, indices = (b.call(operator.getitem, sort, i) for i in (0, 1))
    added = b.call(aten.add_.Tensor, values, 1)
    return b.build({output(): added, output("1"): indices})


def frozen_weight() -> Graph:
    b = Builder()
    w = b.input(Role.PARAM, "w", (3, 3))
    x = b.input(Role.INPUT, "0", (3, 3))
    scale = b.constant("scale", torch.ones(3))
    folded = b.call(frozen, b.call(aten.mul.Tensor, w, scale))
    return b.build({output(): b.call(aten.mm.default, x, folded)}, Level.INFERENCE)


def all_reduce() -> Graph:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    mean = b.backward(aten.div.Scalar, tangent, 8.0)
    sent = b.backward(collective.all_reduce_.default, mean, "sum", "g")
    return b.build({output(): w, grad("w"): b.backward(collective.wait_tensor.default, sent)})


def all_reduce_coalesced() -> Graph:
    b = Builder()
    inputs = [b.input(Role.INPUT, str(i), (4,)) for i in range(2)]
    sent = b.call(collective.all_reduce_coalesced.default, inputs, "sum", "g")
    parts = [b.call(operator.getitem, sent, i) for i in range(2)]
    waited = [b.call(collective.wait_tensor.default, part) for part in parts]
    return b.build({output(str(i)): node for i, node in enumerate(waited)})


def backward_mutation() -> Graph:
    """A state that the backward half updates, and an input gradient."""
    b = Builder()
    state = b.input(Role.STATE, "norm", ())
    x = b.input(Role.INPUT, "0", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    y = b.call(aten.neg.default, x)
    g = b.backward(aten.neg.default, tangent)
    norm = b.backward(aten.add.Tensor, state, b.backward(aten.sum.default, g))
    outputs = {output(): y, mutation("norm", Phase.BACKWARD): norm, grad("0"): g}
    return b.build(outputs)


LEGAL = (
    batch_norm,
    partial_convolution_backward,
    branches,
    in_place_on_fresh_value,
    in_place_on_declared_state,
    in_place_on_one_of_two_results,
    frozen_weight,
    all_reduce,
    all_reduce_coalesced,
    backward_mutation,
)
