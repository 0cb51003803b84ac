"""Where a forward graph multiplies with a weight, and what it computes there."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.hints import hints
from graphopt.graph import Graph, operator_name, value_of
from graphopt.ops import structured  # noqa: F401, registers the operators
from graphopt.plan import Role
from graphopt.structured import Form, form_of

aten, ours = torch.ops.aten, torch.ops.graphopt

LINEAR = frozenset({torch.nn.functional.linear, torch._C._nn.linear, aten.linear.default})
MATMUL = frozenset(
    {
        *(torch.matmul, torch.mm, torch.mv, operator.matmul),
        *(aten.matmul.default, aten.mm.default, aten.mv.default),
        *("matmul", "mm", "mv", "__matmul__"),
    }
)
ADDMM = frozenset({torch.addmm, aten.addmm.default, "addmm"})
DENSE = ours.structured_dense.default
_OURS = frozenset({DENSE, ours.structured_linear.default, ours.structured_matmul.default})
_FLIPS = frozenset({torch.t, "t", aten.t.default, torch.adjoint})
_EXCHANGES = frozenset({torch.transpose, "transpose", aten.transpose.int})
_ATTRIBUTES = frozenset({"T", "mT"})


@dataclass(frozen=True)
class Use:
    """One product with a weight W.

    Attributes:
        node: the product.
        x: what W is multiplied with.
        bias: what is added, if anything.
        left: whether it is W x and not x Wᵀ.
        transposed: whether Wᵀ takes the place of W in that.
    """

    node: fx.Node
    x: fx.Node
    bias: fx.Node | None = None
    left: bool = False
    transposed: bool = False

    @property
    def columns(self) -> int:
        """How many vectors W is multiplied with, in the captured call."""
        shape = hints(value_of(self.x).shape)
        if shape is None:  # it depends on data
            return 1
        size = shape[-2] if self.left and len(shape) > 1 else shape[-1]
        return prod(shape) // max(size, 1)


@dataclass(frozen=True)
class Weight:
    """A matrix that the graph multiplies with.

    Attributes:
        name: qualified name of the parameter.
        node: the parameter, or the call that makes it of its factors.
        uses: all of them, unless `other` says why not.
        other: the first use that is no such product.
    """

    name: str
    node: fx.Node
    uses: tuple[Use, ...]
    other: fx.Node | None = None

    @property
    def value(self) -> Tensor:
        """Its fake value."""
        value: Tensor = value_of(self.node)
        return value

    @property
    def structure(self) -> Form | None:
        """The form of one that is made of factors."""
        if self.node.target is not DENSE:
            return None
        _, name, sizes = self.node.args
        assert isinstance(name, str)
        assert isinstance(sizes, list | tuple)
        return form_of(name, [int(size) for size in sizes])  # type: ignore[arg-type]


def find_weights(graph: Graph) -> tuple[list[Weight], list[fx.Node]]:
    """Weights in order of appearance, and products whose weight is computed otherwise."""
    weights = []
    for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True):
        if slot.role is Role.PARAM and value_of(node).dim() == 2 and not _is_factor(node):
            weights.append(_weight(slot.name, node))
    for node in graph.operators:
        if node.target is DENSE:
            weights.append(_weight(_of_factors(graph, node), node))
    known = {use.node for weight in weights for use in weight.uses}
    known |= {user for weight in weights for _, user, _ in _users(weight.node)}
    computed = [n for n in graph.operators if n.target in LINEAR and n not in known]
    return weights, computed


def _is_factor(node: fx.Node) -> bool:
    """Whether nothing but our own operators reads a parameter."""
    return all(user.target in _OURS for user in node.users)


def _of_factors(graph: Graph, node: fx.Node) -> str:
    """``mix.weight`` of ``mix.parametrizations.weight.original0``."""
    first = node.all_input_nodes[0]
    if first.op != "placeholder":
        return node.name
    path, _, tensor = graph.slot(first).name.rpartition("parametrizations.")
    return path + tensor.rpartition(".")[0]


def _weight(name: str, node: fx.Node) -> Weight:
    uses = []
    for user, use in uses_of(node):
        if use is None:
            return Weight(name, node, (), user)
        uses.append(use)
    return Weight(name, node, tuple(uses))


def uses_of(node: fx.Node) -> Iterator[tuple[fx.Node, Use | None]]:
    """What reads a matrix or its transpose, and which product it is, if it is one."""
    for value, user, flipped in _users(node):
        yield user, _use(value, user, flipped)


def _users(node: fx.Node, flipped: bool = False) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """What reads a matrix or its transpose: the value that it reads, itself, which of the two."""
    for user in node.users:
        if _transposes(user, node):
            yield from _users(user, not flipped)
        else:
            yield node, user, flipped


def _transposes(user: fx.Node, of: fx.Node) -> bool:
    if user.args[:1] != (of,):
        return False
    if user.target in _FLIPS:
        return len(user.args) == 1
    if user.target is getattr:
        return user.args[1] in _ATTRIBUTES
    if user.target in _EXCHANGES and len(user.args) == 3 and not user.kwargs:
        return {int(d) % 2 for d in user.args[1:] if isinstance(d, int)} == {0, 1}
    return False


def _use(value: fx.Node, user: fx.Node, flipped: bool) -> Use | None:
    """The product that `user` is, where it reads W as `value`."""
    args: tuple[Any, ...] = user.args
    if [*user.all_input_nodes].count(value) > 1 or sum(a is value for a in args) != 1:
        return None
    if user.target in LINEAR:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | user.kwargs
        if given.get("weight") is not value:
            return None
        return Use(user, given["input"], given.get("bias"), transposed=flipped)
    if user.kwargs:
        return None
    if user.target in MATMUL and len(args) == 2:
        if args[0] is value:
            return Use(user, args[1], left=True, transposed=flipped)
        return Use(user, args[0], transposed=not flipped)
    if user.target in ADDMM and len(args) == 3 and args[0] is not value:
        bias, first, second = args
        if first is value:
            return Use(user, second, bias, left=True, transposed=flipped)
        return Use(user, first, bias, transposed=not flipped)
    return None


def reader_name(node: fx.Node) -> str:
    """What reads a weight, for messages."""
    if node.op == "output":
        return "the output"
    return operator_name(node)
