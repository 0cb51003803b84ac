"""What each operator of a differentiable forward graph takes, together with its own backward.

An exported graph has no backward. Each operator is therefore run by itself on fake tensors, and
autograd's backward of it behind: what is dispatched below autograd are the operators that a
training step runs. Only additions of gradients of values with several readers are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphopt.analysis.aliasing import is_view
from graphopt.analysis.cost import call_cost, tensor_bytes
from graphopt.analysis.gradient_order import Device, roofline_seconds
from graphopt.graph import value_of


@dataclass(frozen=True)
class Work:
    """One operator with its own backward.

    Attributes:
        forward: seconds.
        input_grad: seconds of the gradients of what other operators make.
        weight_grad: seconds of the gradients of parameters.
        saved: operands, or the operator itself, whose values its backward reads.
        own_bytes: of what else it keeps for its backward.
        differentiable: whether its result has a gradient.
    """

    forward: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0
    saved: frozenset[fx.Node] = frozenset()
    own_bytes: int = 0
    differentiable: bool = False


def work_of(module: fx.GraphModule, device: Device | None = None) -> dict[fx.Node, Work]:
    """The work of every operator, by the roofline.

    Args:
        module: a forward graph of torch operators, with fake values.
        device: by default the assumed one of the kind that the values are on.
    """
    found: dict[fx.Node, Work] = {}
    weights = {n: _attribute(module, n) for n in module.graph.nodes if n.op == "get_attr"}
    with torch.enable_grad():
        for node in module.graph.nodes:
            if node.op == "call_function":
                found[node] = _Run(node, found, weights, device).work()
    return found


class _Run:
    """One operator on copies of its operands, so that it may write into them."""

    def __init__(
        self,
        node: fx.Node,
        before: Mapping[fx.Node, Work],
        weights: Mapping[fx.Node, object],
        device: Device | None,
    ) -> None:
        self.node, self.weights, self.device = node, weights, device
        wanted = {n for n in node.all_input_nodes if n in before and before[n].differentiable}
        wanted |= {n for n in node.all_input_nodes if getattr(weights.get(n), "requires_grad", 0)}
        self.leaves: dict[fx.Node, list[Tensor]] = {n: [] for n in node.all_input_nodes}
        self.given = {n: self._copied(n, n in wanted) for n in node.all_input_nodes}

    def work(self) -> Work:
        """Run it forward and backward."""
        kept: list[Tensor] = []
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), self.given.__getitem__)
        target: Callable[..., Any] = self.node.target  # type: ignore[assignment]
        with torch.autograd.graph.saved_tensors_hooks(_keep(kept), lambda value: value):
            forward, result = self._timed(lambda: target(*args, **kwargs))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            return Work(forward)
        saved, own = self._saved(kept, result)
        inputs = [t for n, ts in self.leaves.items() if n not in self.weights for t in ts]
        every = [t for leaves in self.leaves.values() for t in leaves]
        whole = self._backward(outputs, every)
        of_inputs = self._backward(outputs, inputs)
        return Work(forward, of_inputs, max(whole - of_inputs, 0.0), saved, own, True)

    def _copied(self, node: fx.Node, wanted: bool) -> Any:
        value = value_of(node)
        if isinstance(value, tuple | list):
            return type(value)(self._leaf(node, part, wanted) for part in value)
        return self._leaf(node, value, wanted)

    def _leaf(self, node: fx.Node, value: object, wanted: bool) -> object:
        if not isinstance(value, Tensor):
            return value
        leaf = value.detach()
        if wanted and (leaf.is_floating_point() or leaf.is_complex()):
            leaf.requires_grad_()
            self.leaves[node].append(leaf)
        return leaf.clone()

    def _backward(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> float:
        if not leaves:
            return 0.0
        tangents = [torch.ones_like(t) for t in outputs]
        seconds, _ = self._timed(
            lambda: torch.autograd.grad(
                outputs, leaves, tangents, retain_graph=True, allow_unused=True
            )
        )
        return seconds

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        clock = _Clock(self.device)
        with clock:
            result = run()
        return clock.seconds, result

    def _saved(self, kept: Iterable[Tensor], result: object) -> tuple[frozenset[fx.Node], int]:
        owner: dict[int, fx.Node | None] = {}
        for node, value in self.given.items():
            place = None if node in self.weights else node
            owner |= {_memory(t): place for t in tree_leaves(value) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                owner.setdefault(_memory(tensor), self.node)
        others = {_memory(t): t for t in kept if _memory(t) not in owner}
        nodes = {owner.get(_memory(t)) for t in kept}
        return frozenset(n for n in nodes if n is not None), tensor_bytes(list(others.values()))


class _Clock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operators below autograd take; views, and questions to tensors, take nothing."""

    def __init__(self, device: Device | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.seconds = device, 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not is_view(func) and any(isinstance(t, Tensor) for t in tree_leaves(result)):
            leaves = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            cost = call_cost(func, (args, kwargs), list(leaves.values()), result)
            self.seconds += roofline_seconds(cost, result, self.device)
        return result


def _keep(kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    return pack


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attribute(module: fx.GraphModule, node: fx.Node) -> object:
    found: object = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found
