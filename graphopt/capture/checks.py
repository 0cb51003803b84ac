"""Questions about values to which the answer is nearly always the same.

``if not torch.isfinite(h).all(): raise``, ``if labels.max() >= vocab: raise``, assertions, and
``if torch.isinf(h).any(): h = h.clamp(…)`` stand in much library code. Dynamo refuses to branch on
a value. Here the branch that raises, or that repairs values which are not finite, is not taken,
and the graph gets a check of it. A call that fails a check runs as PyTorch runs it: that raises
eager's error, or takes the other branch. Other branches on values stay refused.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables.functions import UserFunctionVariable
from torch._dynamo.variables.tensor import SymNodeVariable, TensorVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch.distributions import constraints
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.ops import expect  # noqa: F401

# -- while Dynamo captures -------------------------------------------------------------------------

_TRUE, _FALSE = "IF_TRUE", "IF_FALSE"


@contextmanager
def checked_branches() -> Iterator[None]:
    """Let Dynamo pass such branches, leaving a check in the graph."""
    before = []
    for kind in _translators():
        table = kind.dispatch_table
        before.append((table, list(table)))
        for opcode, handler in enumerate(table):
            name = dis.opname[opcode]
            if "JUMP" in name and (_TRUE in name or _FALSE in name):
                table[opcode] = _checking(handler, name)
    call = _entering(TorchInGraphFunctionVariable.call_function)
    try:
        with mock.patch.object(TorchInGraphFunctionVariable, "call_function", call):
            yield
    finally:
        for table, handlers in before:
            table[:] = handlers


# Dynamo would call them as a whole, and not see the checks in them.
_WITH_CHECKS = (torch.nn.functional.gaussian_nll_loss,)


def _entering(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value in _WITH_CHECKS:
            function = UserFunctionVariable(self.value, source=self.source)
            return function.call_function(tx, args, kwargs)
        return original(self, tx, args, kwargs)

    return call_function


def _translators() -> list[Any]:
    found: list[Any] = [InstructionTranslatorBase]
    for kind in found:
        found += kind.__subclasses__()
    return found


def _checking(handler: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What runs a conditional jump: as usual, unless it is on a value and has a usual answer."""
    jumps_on, keeps = _TRUE in name, "OR_POP" in name

    def jump(translator: Any, instruction: Any) -> Any:
        value = translator.stack[-1]
        if not _depends_on_data(value):
            return handler(translator, instruction)
        answer = _usual_answer(translator, instruction, value, jumps_on)
        if answer is None:
            return handler(translator, instruction)
        _check(translator.output, value, answer)
        if answer is jumps_on:
            if not keeps:
                translator.pop()
            translator.jump(instruction)
        else:
            translator.pop()
        return None

    return jump


def _depends_on_data(value: object) -> bool:
    if isinstance(value, SymNodeVariable):
        return bool(free_unbacked_symbols(value.sym_num))
    return isinstance(value, TensorVariable) and value.source is None


def _usual_answer(translator: Any, instruction: Any, value: Any, jumps_on: bool) -> bool | None:
    """The answer that does not raise, or that says all values are finite; ``None`` for neither."""
    if translator.f_code in _SAYING_NO:
        return True
    code = translator.instructions
    there = _raises(code, translator.indexof[instruction.target])
    here = _raises(code, translator.instruction_pointer)
    if there is not here:
        return not jumps_on if there else jumps_on
    return _if_finite(value.as_proxy().node)


# They return what is wrong with a value at once, for their caller to raise.
_SAYING_NO = frozenset(
    getattr(constraints, name).check.__code__ for name in ("_Symmetric", "_PositiveDefinite")
)


def _raises(code: list[Any], start: int) -> bool:
    """Whether the instructions from here on come to a ``raise`` without another jump."""
    for instruction in code[start:]:
        name = instruction.opname
        if name == "RAISE_VARARGS":
            return True
        if "JUMP" in name or "RETURN" in name or "YIELD" in name or name == "FOR_ITER":
            return False
    return False


_OVER = {"any": ("isnan", "isinf"), "all": ("isfinite",)}


def _if_finite(node: fx.Node) -> bool | None:
    """What ``isnan(x).any()``, ``isfinite(x).all()`` and their like are where x is finite."""
    while _name(node) in ("item", "sym_ite", "bool") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    reduction = _name(node)
    inner = node.args[0] if node.args else None
    if isinstance(inner, fx.Node) and _name(inner) in _OVER.get(reduction, ()):
        return reduction == "all"
    return None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _check(output: Any, value: Any, answer: bool) -> None:
    """Put into the graph that the value has to be this."""
    proxy = value.as_proxy()
    if isinstance(value, TensorVariable):
        output.create_proxy("call_function", torch.ops.graphopt.expect.default, (proxy, answer), {})
        return
    if not isinstance(value.sym_num, torch.SymBool):
        proxy = proxy != 0
    if not answer:
        proxy = output.create_proxy("call_function", torch.sym_not, (proxy,), {})
    arguments = (proxy, "a value is another than the graph was captured for")
    output.create_proxy("call_function", torch.ops.aten._assert_scalar.default, arguments, {})
