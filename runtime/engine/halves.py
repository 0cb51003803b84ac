"""Cut one joint module into its forward and backward halves, by PyTorch's own partitioners.

The partitioner chooses which values the forward saves for the backward. graphopt adds one rule:
parameters and state that the backward reads are not saved but bound when it runs, so that a
schedule may give forward and backward different versions of a weight.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._functorch.config
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.ops import expect  # noqa: F401
from graphopt.ops.numbers import is_number
from graphopt.plan import Phase, Role, Signature, Slot

Partitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


@dataclass(frozen=True)
class Halves:
    """The two halves of a step.

    Attributes:
        forward: takes the primal inputs, in signature order; returns the forward outputs, then the
            saved values.
        backward: takes values in the order of `sources`; returns the backward outputs.
        sources: where each backward argument comes from: ``("saved", k)`` the k-th saved value,
            ``("input", i)`` the i-th input of the step (tangents not counted), ``("tangent", j)``
            the j-th tangent.
        written: buffers that the forward writes itself, so that it does not return them.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    sources: tuple[tuple[str, int], ...]
    written: frozenset[str] = frozenset()


def split(module: fx.GraphModule, signature: Signature, partitioner: Partitioner) -> Halves:
    """Partition a joint module.

    Args:
        module: one placeholder per input slot, one flat list of outputs. It is copied, not
            changed.
        signature: the roles of its inputs and outputs.
        partitioner: with the calling convention of `functorch.compile.default_partition`.
    """
    joint, primals, tangents = _prepared(module, signature)
    unread = _return_unread_draws(joint, signature.num_forward_outputs)
    kept = [s for s in signature.inputs if s.role is not Role.TANGENT]
    parameters = [i for i, slot in enumerate(kept) if slot.role is Role.PARAM]
    values = [node.meta["val"] for node in joint.graph.find_nodes(op="placeholder")]
    with (
        tracing(TracingContext.try_get() or TracingContext(detect_fake_mode(values))),
        torch._functorch.config.patch(graphsafe_rng_functionalization=False),
        # Backends write code of their own; what fx would write is read by nobody.
        _use_lazy_graph_module(True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        forward, backward = partitioner(
            joint,
            values,
            num_fwd_outputs=signature.num_forward_outputs + unread,
            static_lifetime_input_indices=parameters,
        )
    return _trimmed(forward, backward, signature, primals, tangents, unread)


def _return_unread_draws(joint: fx.GraphModule, count: int) -> int:
    """Make results of draws that nobody reads, behind the first `count`; gives how many.

    Partitioners leave out what is not read, and later draws would be other ones.
    """
    output = joint.graph.output_node()
    returned = list(cast("Sequence[Any]", output.args[0]))
    draws = [
        node
        for node in joint.graph.nodes
        if not node.users
        and isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    ]
    for index, draw in enumerate(draws):
        drawn, value = draw, draw.meta["val"]
        if isinstance(value, tuple | list):
            with joint.graph.inserting_after(draw):
                drawn = joint.graph.call_function(operator.getitem, (draw, 0))
            drawn.meta = {**draw.meta, "val": value[0]}
        returned.insert(count + index, drawn)
    output.args = (tuple(returned),)
    output.meta["desc"] = [None] * len(returned)
    joint.recompile()
    return len(draws)


def _prepared(
    module: fx.GraphModule, signature: Signature
) -> tuple[fx.GraphModule, dict[str, int], dict[str, int]]:
    """A copy whose inputs are named as torch's partitioners recognise them."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    primals: dict[str, int] = {}
    tangents: dict[str, int] = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, slot in zip(placeholders, signature.inputs, strict=True):
        kind, names = ("tangents", tangents) if slot.role is Role.TANGENT else ("primals", primals)
        env[node] = graph.placeholder(f"{kind}_{len(names) + 1}")
        env[node].meta = dict(node.meta)
        names[env[node].name] = len(names)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.target is torch.ops.graphopt.expect.default:
                # Of operators with side effects, a partitioner that recomputes takes only these.
                env[node].meta["recompute"] = CheckpointPolicy.MUST_SAVE
    parameters = {env[n] for n, s in zip(placeholders, signature.inputs, strict=True) if _late(s)}
    _repeat_views(graph, parameters)
    _forget_statistics(graph)
    output = graph.output_node()
    output.meta["desc"] = [None] * len(cast("list[Any]", output.args[0]))
    return _LazyGraphModule(module, graph), primals, tangents


def _forget_statistics(graph: fx.Graph) -> None:
    """A batch norm that has its batch's statistics does not read the running ones in backward."""
    norm = torch.ops.aten.native_batch_norm_backward.default
    for node in graph.find_nodes(op="call_function", target=norm):
        if len(node.args) > 7 and node.args[7] is True:
            node.update_arg(3, None)
            node.update_arg(4, None)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """An independent copy with its own nodes."""
    copy = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = copy.node_copy(node, lambda n: env[n])
    return copy


def _late(slot: Slot) -> bool:
    return slot.role in (Role.PARAM, Role.STATE)


def _repeat_views(graph: fx.Graph, roots: set[fx.Node]) -> None:
    """Let the backward take its own views of parameters, instead of saving the forward's."""
    views = set(roots)
    for node in graph.nodes:
        if is_view(node) and node.all_input_nodes and set(node.all_input_nodes) <= views:
            views.add(node)
    views -= roots
    copies: dict[fx.Node, fx.Node] = {}
    for user in list(graph.nodes):
        if user.meta.get("partitioner_tag") != "is_backward" or user.op == "output":
            continue
        for view in [n for n in user.all_input_nodes if n in views]:
            if view.meta.get("partitioner_tag") == "is_backward":
                continue
            user.replace_input_with(view, _backward_copy(graph, view, user, copies, roots))


def _backward_copy(
    graph: fx.Graph,
    view: fx.Node,
    before: fx.Node,
    copies: dict[fx.Node, fx.Node],
    roots: set[fx.Node],
) -> fx.Node:
    if view in roots:
        return view
    if view not in copies:
        source = _backward_copy(graph, view.all_input_nodes[0], before, copies, roots)
        with graph.inserting_before(before):
            copy = graph.node_copy(view, lambda _: source)
        copy.meta["partitioner_tag"] = "is_backward"
        copies[view] = copy
    return copies[view]


def is_view(node: fx.Node) -> bool:
    """Whether a node computes nothing and returns its first argument's storage."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return len(returns) == 1 and any(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


_KINDS = (False, True)


def _is_number(value: object) -> bool:
    return isinstance(value, fx.Node) and is_number(value.meta.get("val"))


def numbers_saved(halves: Halves) -> tuple[int, ...]:
    """Which of the saved values are numbers, by position among them."""
    arguments = halves.backward.graph.find_nodes(op="placeholder")
    return tuple(
        index
        for (kind, index), node in zip(halves.sources, arguments, strict=True)
        if kind == "saved" and _is_number(node)
    )


def sized_by_data(half: fx.GraphModule) -> bool:
    """Whether an argument of a half has a size that depends on data."""
    values = (node.meta.get("val") for node in half.graph.find_nodes(op="placeholder"))
    return any(
        type(size) is not int
        for value in values
        if isinstance(value, torch.Tensor)
        for size in value.shape
    )


def sharing_outputs(backward: fx.GraphModule, count: int) -> tuple[int, ...]:
    """Which of the first `count` outputs lie in memory that another of them is already."""
    returned = cast("Sequence[Any]", backward.graph.output_node().args[0])[:count]
    owners = [_owner(value) for value in returned]
    return tuple(
        index
        for index, (value, owner) in enumerate(zip(returned, owners, strict=True))
        if isinstance(value, fx.Node)
        and owners.count(owner) > 1
        and (is_view(value) or value in returned[:index])
    )


def _owner(value: Any) -> Any:
    while isinstance(value, fx.Node) and is_view(value) and value.all_input_nodes:
        value = value.all_input_nodes[0]
    return value


def _check_once(backward: fx.GraphModule) -> None:
    """Take what the forward has checked out of the backward, with all that only checks need.

    A partitioner has the checks in both halves, and draws random numbers again for them.
    """
    nodes = [n for n in backward.graph.nodes if n.op == "call_function"]
    forward = {n for n in nodes if n.meta.get("partitioner_tag") != "is_backward"}
    checks = [n for n in forward if n.target in _CHECKS and not n.users]
    if not checks:
        return
    for node in checks:
        backward.graph.erase_node(node)
    for node in reversed(nodes):
        if node in forward and node not in checks and not node.users:
            backward.graph.erase_node(node)
    backward.recompile()


_CHECKS = frozenset(
    (
        torch.ops.graphopt.expect.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
    )
)


def _trimmed(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    signature: Signature,
    primals: dict[str, int],
    tangents: dict[str, int],
    unread: int,
) -> Halves:
    """Saved values that are inputs of the step are read from the step, not saved again."""
    _check_once(backward)
    output = forward.graph.output_node()
    returned = list(cast("Sequence[Any]", output.args[0]))
    count = signature.num_forward_outputs
    saved = returned[count + unread :]
    arguments = backward.graph.find_nodes(op="placeholder")
    sources: list[tuple[str, int]] = []
    kept: list[fx.Node] = []
    # The forward returns saved numbers last, the backward takes them first.
    values = {number: iter([n for n in saved if _is_number(n) is number]) for number in _KINDS}
    for argument in arguments:
        if str(argument.target) in tangents:
            sources.append(("tangent", tangents[str(argument.target)]))
            continue
        value = next(values[_is_number(argument)])
        if isinstance(value, fx.Node) and value.op == "placeholder":
            sources.append(("input", primals[str(value.target)]))
        else:
            sources.append(("saved", len(kept)))
            kept.append(value)
    output.args = (tuple(returned[:count]) + tuple(kept),)
    forward.recompile()
    assert all(s.phase is Phase.BACKWARD for s in signature.outputs[count:])
    return Halves(forward, backward, tuple(sources))
