"""Calls of `torch.utils.checkpoint`, within forward and around it, as eager runs them.

*Within*: checkpoints of the older kind, ``checkpoint(f, x, use_reentrant=True)``, are functions of
their arguments for autograd. Where no argument requires a gradient, none reaches what `f` computes
with, its parameters included. Dynamo captures such a checkpoint like one of the newer kind, through
which those gradients flow.

*Around*: a checkpoint of the newer kind runs the call again in the backward and breaks off as soon
as the last saved tensor is known. What of the Python state eager's forward has changed by then, it
changes twice; a graph has changed nothing by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.variables import (
    BaseListVariable,
    ConstantVariable,
    ConstDictVariable,
    TensorVariable,
)
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._dynamo.variables.tensor import SymNodeVariable
from torch.utils import _pytree as pytree

from graphopt.capture.gradients import leaf_of
from graphopt.capture.restored import puts_back
from graphopt.errors import CaptureError
from graphopt.graph import Graph, Level, source_of
from graphopt.plan import Role

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint

# -- around ----------------------------------------------------------------------------------------


_autograd: Any = torch._C._autograd


@contextmanager
def without_hooks() -> Iterator[None]:
    """Within, the caller's hooks on saved tensors, those of a checkpoint too, see nothing."""
    hooks: list[tuple[Any, Any]] = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.insert(0, top)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in hooks:
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


def within_checkpoint() -> bool:
    """Whether the call runs in a checkpoint of the newer kind, for the first time or again."""
    hooks = _autograd._top_saved_tensors_default_hooks(True)
    name = getattr(hooks[0], "__qualname__", "") if hooks else ""
    return name.startswith(("_checkpoint_hook.", "_recomputation_hook."))


@dataclass
class Changes:
    """What calls will change of the objects that were there.

    Attributes:
        objects: that are changed.
        kept: those of them that are given tensors of this call, or numbers, as Dynamo names them.
    """

    objects: list[object] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


@contextmanager
def noting_changes() -> Iterator[Changes]:
    """While Dynamo captures: which objects, of those that were there, calls will change."""
    changes = Changes()
    generate = SideEffects.codegen_update_mutated

    def noting(effects: SideEffects, *args: Any, **kwargs: Any) -> None:
        for variable in list(effects.id_to_variable.values()):
            new = isinstance(variable.mutation_type, _NEW)
            if effects.is_modified(variable) and not (new or puts_back(effects, variable)):
                changes.objects.append(variable)
                changes.kept += _kept(effects, variable)
        generate(effects, *args, **kwargs)

    with mock.patch.object(SideEffects, "codegen_update_mutated", noting):
        yield changes


_NEW = (AttributeMutationNew, ValueMutationNew)


def _kept(effects: SideEffects, variable: Any) -> list[str]:
    where = variable.source.name if variable.source is not None else "an object"
    assigned = effects.store_attr_mutations.get(variable, {})
    found = [f"{where}.{name}" for name, value in assigned.items() if _is_of_call(value)]
    return found + ([where] if any(map(_is_of_call, _items(variable))) else [])


def _items(variable: Any) -> list[Any]:
    items = getattr(variable, "items", ())
    return list(items.values() if isinstance(items, Mapping) else items if items else ())


def _is_input(node: fx.Node) -> bool:
    """Whether a tensor lies in the memory of one that was there, which was written to."""
    memory = node.meta["example_value"].untyped_storage()._cdata
    inputs = (n.meta.get("example_value") for n in node.graph.find_nodes(op="placeholder"))
    return any(isinstance(v, Tensor) and v.untyped_storage()._cdata == memory for v in inputs)


def _is_of_call(value: Any) -> bool:
    """Whether a value that is kept is, or has in it, a computed tensor or a number."""
    if isinstance(value, TensorVariable):
        return value.source is None and not _is_input(value.proxy.node)
    if isinstance(value, SymNodeVariable):
        return value.source is None
    if isinstance(value, ConstantVariable):
        return type(value.value) in (int, float)
    return isinstance(value, BaseListVariable | ConstDictVariable) and any(
        map(_is_of_call, _items(value))
    )


def outside_checkpoints(holds: Callable[..., bool]) -> Callable[..., bool]:
    """Conditions of a capture that changes Python objects, or draws from Python's random."""

    def outside(*args: Any, **kwargs: Any) -> bool:
        return not within_checkpoint() and holds(*args, **kwargs)

    return outside


def refusal(where: str) -> CaptureError:
    """Of a call that changes Python objects within a checkpoint."""
    return CaptureError(
        "forward changes Python objects, and torch.utils.checkpoint runs this call again in the "
        "backward, up to a place that a graph does not have",
        where=where,
        hint="checkpoint with use_reentrant=True, or keep the state outside of what is "
        "checkpointed",
    )


# -- within ----------------------------------------------------------------------------------------


_DRAWS = ("dropout", "rand", "bernoulli", "multinomial", "normal", "poisson")


def refuse_other_draws(module: fx.GraphModule) -> None:
    """Refuse checkpoints that shall draw other random numbers when they run again.

    Raises:
        CaptureError: one with ``preserve_rng_state=False`` draws.
    """
    for node in module.graph.nodes if torch.is_grad_enabled() else ():
        if node.target is CHECKPOINT and node.kwargs.get("preserve_rng_state") is False:
            body = getattr(module, str(node.args[0].target))
            if any(_draws(inner) for inner in body.graph.nodes):
                raise CaptureError(
                    "a checkpoint with preserve_rng_state=False draws other random numbers in the "
                    "backward than in the forward",
                    where=source_of(node),
                    hint="leave preserve_rng_state out",
                )


def _draws(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training")
    off = "dropout" in name and training is False
    return any(word in name for word in _DRAWS) and not off


def refuse_repeated_writes(graph: Graph) -> None:
    """Refuse what eager writes a second time, as it runs a checkpoint again in the backward.

    Raises:
        CaptureError: a buffer is changed within a checkpoint: the statistics of a batch norm.
    """
    if graph.level is not Level.JOINT:
        return
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        if slot.role is Role.MUTATION and "recompute" in node.meta:
            raise CaptureError(
                f"forward changes buffer {slot.name!r} within torch.utils.checkpoint, which eager "
                "does once more in the backward",
                where=source_of(node),
                hint="checkpoint only modules without running statistics, or in eval mode",
            )


def without_gradient(module: fx.GraphModule, inputs: Sequence[Tensor], fake_mode: Any) -> None:
    """Detach what checkpoints return that get no argument with a gradient; changes the module.

    Args:
        module: a flat forward graph.
        inputs: live tensors of the captured call. Parameters among them are taken for what `f`
            computes with, not for its arguments.
        fake_mode: of the capture.
    """
    if not torch.is_grad_enabled() or not any(_reentrant(n) for n in module.graph.nodes):
        return
    leaves = [leaf_of(fake_mode, value) for value in inputs]
    closed_over = {
        node
        for node, live in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
        if isinstance(live, nn.Parameter)
    }
    with fake_mode, torch.enable_grad():
        run = _Run(module, closed_over)
        run.run(*leaves)
    for node in run.cut:
        for output in list(node.users):
            users = list(output.users)
            with module.graph.inserting_after(output):
                cut = module.graph.call_method("detach", (output,))
            for user in users:
                user.replace_input_with(output, cut)
    if run.cut:
        module.recompile()


def _reentrant(node: fx.Node) -> bool:
    return node.target is CHECKPOINT and bool(node.kwargs.get("use_reentrant"))


class _Run(fx.Interpreter):
    """On fake tensors, to see what requires a gradient where."""

    def __init__(self, module: fx.GraphModule, closed_over: set[fx.Node]) -> None:
        super().__init__(module)
        self.closed_over = closed_over
        self.cut: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        if not _reentrant(n) or any(map(self._requires_grad, n.all_input_nodes)):
            return super().run_node(n)
        self.cut.append(n)
        return pytree.tree_map_only(Tensor, Tensor.detach, super().run_node(n))

    def _requires_grad(self, node: fx.Node) -> bool:
        value = self.env[node]
        return node not in self.closed_over and isinstance(value, Tensor) and value.requires_grad
