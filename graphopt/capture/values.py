"""What Dynamo takes for something else, or leaves out without need, while it reads forward.

Deques that the model holds keep their ``maxlen``, which Dynamo drops.
Lists of numbers of a floating-point tensor, and the checks of `torch.distributions`, can be
captured; generators and NumPy scalars that forward returns or keeps cannot: what comes back would
be of another type than in eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch._dynamo import utils
from torch._dynamo.codegen import PyCodegen
from torch._dynamo.exc import unimplemented
from torch._dynamo.source import AttrSource, is_from_source
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.functions import LocalGeneratorObjectVariable
from torch._dynamo.variables.iter import IteratorVariable
from torch._dynamo.variables.tensor import NumpyNdarrayVariable, TensorVariable
from torch.distributions.constraints import is_dependent
from torch.distributions.utils import _lazy_property_and_property


@contextmanager
def values_as_in_eager() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    rules = get_torch_obj_rule_map()
    rule = rules.pop(is_dependent, None)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(TensorVariable, "method_tolist", _tolist))
        for owner, name, wrap in (
            (PyCodegen, "add_graph_output", _no_numpy_scalars),
            (InstructionTranslator, "_return", _no_generators),
        ):
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        try:
            yield
        finally:
            if rule is not None:
                rules[is_dependent] = rule


def forget_lazy_properties(graph: Any) -> None:
    """Drop guards on torch's lazy properties, which are another object each time one looks.

    Args:
        graph: Dynamo's output graph.
    """
    scope = {"L": graph.local_scope, "G": graph.global_scope}
    lazy = {
        source.base
        for source in (guard.originating_source for guard in graph.guards)
        if isinstance(source, AttrSource)
        and source.member == "wrapped"
        and isinstance(source.base.get_value(scope, {}, {}), _lazy_property_and_property)
    }
    for guard in list(graph.guards) if lazy else ():
        # A guard that two sources give the same object knows the other one as an argument.
        other = getattr(guard.create_fn, "keywords", {}).get("source_b")
        sources = [s for s in (guard.originating_source, other) if s is not None]
        if any(is_from_source(source, base) for source in sources for base in lazy):
            graph.guards.inner.discard(guard)


def _tolist(self: Any, tx: Any) -> Any:
    """`Tensor.tolist` as one `item` per element, for all dtypes."""

    def nested(shape: tuple[int, ...], proxy: Any) -> Any:
        if not shape:
            return wrap_fx_proxy(tx, proxy.item())
        return [nested(shape[1:], proxy[i]) for i in range(shape[0])]

    proxy = self.as_proxy()
    return VariableTracker.build(tx, nested(tuple(proxy.node.meta["example_value"].shape), proxy))


def _no_numpy_scalars(original: Callable[..., None]) -> Callable[..., None]:
    def add_graph_output(self: Any, value: Any) -> None:
        if isinstance(value, NumpyNdarrayVariable):
            node = value.as_proxy().node
            scalar = node.meta["example_value"].ndim == 0
            if scalar and type(node.target).__module__ == utils.__name__:
                unimplemented(
                    gb_type="A NumPy scalar is returned or kept",
                    context=str(node),
                    explanation="It would come back as an array without dimensions.",
                    hints=["Take a number instead: float(…)"],
                )
        return original(self, value)

    return add_graph_output


def _no_generators(original: Callable[..., None]) -> Callable[..., None]:
    def returns(self: Any, instruction: Any) -> None:
        value = self.stack[-1] if self.stack else None
        if isinstance(value, LocalGeneratorObjectVariable | IteratorVariable):
            unimplemented(
                gb_type="A generator is returned",
                context=str(value),
                explanation="What it yields later is no part of the graph.",
                hints=["Return a list or a tuple"],
            )
        return original(self, instruction)

    return returns
