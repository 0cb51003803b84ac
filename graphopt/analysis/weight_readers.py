"""What the forward pass does with each parameter: who reads it, and what becomes of the result.

The operators that compute gradients (`graphopt.analysis.weight_uses`) tell products, lookups and
norms apart. The forward pass tells what a gradient does not: whether a vector is added or
multiplied, whether what it scales was normalised, and whether a product is the model's output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import cast

from torch import fx
from torch._ops import OpOverload

from graphopt.analysis.weight_uses import base_of, depends_on_tangents
from graphopt.graph import Graph, operator_name, value_of
from graphopt.plan import Role


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators, by name, that show or copy their operand, or part of it.
_SHOWS = _names(
    "clone _to_copy detach alias t transpose permute view _unsafe_view reshape squeeze unsqueeze "
    "expand repeat slice select split split_with_sizes unbind chunk diagonal as_strided "
    "contiguous lift_fresh_copy"
)
_JOINS = _names("add sub cat stack")
_PARTS = _names("select slice split split_with_sizes unbind chunk")
PRODUCTS = _names("mm addmm bmm baddbmm mv addmv dot convolution")
LOOKUPS = _names("embedding _embedding_bag _embedding_bag_forward_only index index_select gather")
NORMS = _names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training cudnn_batch_norm _batch_norm_with_update "
    "_batch_norm_with_update_functional native_layer_norm native_group_norm "
    "_fused_rms_norm"
)
# What an output does not go through: another layer, or a graph inside of the graph.
_LAYERS = PRODUCTS | LOOKUPS - {"index", "index_select", "gather"} | NORMS
_POINTWISE = _names("add sub mul div rsqrt sqrt pow reciprocal clamp clamp_min maximum square neg")
_STATISTICS = _names("mean sum var var_mean std std_mean linalg_vector_norm")
_ROOTS = _names("rsqrt sqrt pow std std_mean linalg_vector_norm")


def kind_of(node: fx.Node) -> str:
    """The name of a node's operator, without namespace and overload (``"mm"``)."""
    target = node.target
    if isinstance(target, OpOverload):
        return str(target._schema.name).rsplit("::", 1)[-1]
    return operator_name(node)


class Readers:
    """The forward pass, seen from its parameters; get it by ``graph.get(Readers)``."""

    def __init__(self, graph: Graph) -> None:
        self._backward = graph.get(depends_on_tangents)
        inputs = zip(graph.inputs, graph.signature.inputs, strict=True)
        self.parameters = {slot.name: n for n, slot in inputs if slot.role is Role.PARAM}
        self._trained: set[fx.Node] = set(self.parameters.values())
        self.fixed = set(self._trained)  # all that comes from parameters alone
        for node in graph.nodes:
            operands = node.all_input_nodes
            if any(used in self._trained for used in operands):
                self._trained.add(node)
            if operands and all(used in self.fixed for used in operands):
                self.fixed.add(node)

    def of(self, value: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Every forward operator that reads a parameter, and what of it that one reads.

        Views, copies and parts are followed, and sums of parameters and what is joined of them.
        """
        for user in self._users(value):
            joined = user in self.fixed and kind_of(user) in _JOINS
            if joined or self._shows(user):
                yield from self.of(user)
            else:
                yield user, value

    def parts(self, product: fx.Node) -> int:
        """Into how many parts the result is split; 1 where it is read as a whole."""
        found, values = 0, [product]
        for value in values:
            users = list(self._users(value))
            if users and all(kind_of(u) in _PARTS for u in users):
                found = max(found, sum(self._pieces(u) for u in users))
            else:
                values += [u for u in users if self._shows(u) or self._adds_bias(u)]
        return max(found, 1)

    def ends(self, product: fx.Node) -> bool:
        """Whether the result is what the model returns, or goes into its loss.

        There is no layer behind it, and it is not added to anything that it was computed from, as
        in a residual block.
        """
        seen, pending, returned = {product}, [product], False
        before = _once(lambda: self._ancestors(product))
        while pending:
            value = pending.pop()
            for user in value.users:
                if user.op == "output":
                    returned = True
                elif user not in seen and user not in self._backward:
                    if not self._passes(user, seen, before):
                        return False
                    seen.add(user)
                    pending.append(user)
        return returned

    def normalised(self, value: fx.Node) -> bool:
        """Whether the value is another one divided by a root of a statistic of it."""
        value = base_of(value)
        if kind_of(value) not in ("mul", "div"):
            return False
        operands = value.all_input_nodes
        sizes = [value_of(o).numel() for o in operands]
        small = [o for o, s in zip(operands, sizes, strict=True) if s < value_of(value).numel()]
        return any(self._rooted(o) for o in small)

    # -- steps -------------------------------------------------------------------------------------

    def _users(self, value: fx.Node) -> Iterator[fx.Node]:
        return (u for u in value.users if u.op != "output" and u not in self._backward)

    def _shows(self, node: fx.Node) -> bool:
        if node.target is operator.getitem:
            return kind_of(cast("fx.Node", node.args[0])) in _SHOWS
        return kind_of(node) in _SHOWS

    def _adds_bias(self, node: fx.Node) -> bool:
        return kind_of(node) == "add" and any(o in self.fixed for o in node.all_input_nodes)

    def _pieces(self, part: fx.Node) -> int:
        return max(1, len(part.users)) if kind_of(part) not in ("select", "slice") else 1

    def _passes(
        self, user: fx.Node, seen: set[fx.Node], before: Callable[[], set[fx.Node]]
    ) -> bool:
        name = kind_of(user)
        if name in _LAYERS or "attention" in name or "rnn" in name or _has_graph(user):
            return False
        others = [o for o in user.all_input_nodes if o not in seen and o in self._trained]
        return not any(base_of(o) in before() for o in others if base_of(o).op != "placeholder")

    def _ancestors(self, node: fx.Node) -> set[fx.Node]:
        found, pending = {node}, [node]
        while pending:
            for used in pending.pop().all_input_nodes:
                if used not in found:
                    found.add(used)
                    pending.append(used)
        return found & self._trained - {node}

    def _rooted(self, node: fx.Node) -> bool:
        """Whether a root was taken on the way from a statistic to here, by pointwise operators."""
        root, pending = False, [node]
        for value in pending:
            name = kind_of(value)
            root |= name in _ROOTS
            if name in _STATISTICS:
                if root:
                    return True
            elif name in _POINTWISE or self._shows(value):
                pending += value.all_input_nodes
        return False


def _has_graph(node: fx.Node) -> bool:
    return any(used.op == "get_attr" for used in node.all_input_nodes)


def _once(make: Callable[[], set[fx.Node]]) -> Callable[[], set[fx.Node]]:
    made: list[set[fx.Node]] = []

    def get() -> set[fx.Node]:
        if not made:
            made.append(make())
        return made[0]

    return get
