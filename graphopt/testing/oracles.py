"""What a graph means, worked out independently of how graphopt runs it.

`run_graph` interprets the nodes one by one with torch's own operators and shares no code with the
engine, the backends or the generated code of the graph module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from graphopt.errors import ArgumentError
from graphopt.graph import Graph, value_of
from graphopt.ops.unrounded import unrounded
from graphopt.plan import Role
from graphopt.testing.sizes import At

Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


def run_graph(graph: Graph, inputs: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """The outputs of `graph` in order, with the random number generator set to `seed`.

    Inputs are not written to; the caller's random state is kept. Sizes are whole numbers.

    Raises:
        ArgumentError: an input is missing, superfluous, or of another shape or dtype.
    """
    slots = zip(graph.signature.inputs, _counted(graph, inputs), strict=True)
    at = At(graph, {slot.name: value for slot, value in slots if slot.role is Role.SIZE})
    for node, value in zip(graph.inputs, inputs, strict=True):
        fake = value_of(node)
        if not isinstance(fake, Tensor):
            continue
        shape = at.shape(fake.shape)
        if (shape, fake.dtype) != (value.shape, value.dtype):
            raise ArgumentError(
                f"an input has shape {tuple(value.shape)} and dtype {value.dtype}, the graph wants "
                f"{shape} and {fake.dtype}",
                where=str(graph.slot(node)),
            )
    return _interpret(graph, inputs, seed, _call)


def run_graph_fp64(graph: Graph, inputs: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """The outputs in double precision: what the graph would return without rounding.

    Casts to a shorter floating type have no effect, nor has what else operators round. Random
    operators draw in the type that the graph gives them, so that their numbers are those of
    `run_graph`.
    """

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if isinstance(target, str):
            return tree_map_only(Tensor, _widened, _call(node, args, kwargs))
        if without := unrounded(target):
            return without(*args, **kwargs)
        tags = getattr(target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            args, kwargs = _in_own_types(node, args, kwargs)
        else:
            args, kwargs = tree_map_only(torch.dtype, _widened_dtype, (args, kwargs))
        return tree_map_only(Tensor, _widened, target(*args, **kwargs))

    wide = tree_map_only(Tensor, _widened, list(_counted(graph, inputs)))
    return _interpret(graph, wide, seed, call)


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target: Any = node.target
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _interpret(graph: Graph, inputs: Sequence[Any], seed: int, call: Call) -> list[Tensor]:
    values: dict[fx.Node, Any] = {}
    pending = iter(inputs)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(pending)
            elif node.op == "get_attr":
                values[node] = _attribute(graph, str(node.target))
            elif node.op in ("call_function", "call_method"):
                args, kwargs = tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
                values[node] = call(node, tuple(args), kwargs)
            elif node.op != "output":
                raise ArgumentError(
                    f"the oracle runs functions and constants only, not {node.op}", where=node.name
                )
    return [values[node] for node in graph.outputs]


def _counted(graph: Graph, inputs: Sequence[Any]) -> Sequence[Any]:
    if len(inputs) != len(graph.inputs):
        raise ArgumentError(f"the graph has {len(graph.inputs)} inputs, {len(inputs)} were given")
    return inputs


def _attribute(graph: Graph, path: str) -> Any:
    value: Any = graph.module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _widened_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _widened(value: Tensor) -> Tensor:
    return value.to(_widened_dtype(value.dtype))


def _in_own_types(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def narrowed(own: Any, value: Any) -> Any:
        if isinstance(own, fx.Node) and isinstance(value, Tensor):
            return value.to(value_of(own).dtype)
        return value

    return (
        tuple(narrowed(own, value) for own, value in zip(node.args, args, strict=True)),
        {key: narrowed(node.kwargs[key], value) for key, value in kwargs.items()},
    )
