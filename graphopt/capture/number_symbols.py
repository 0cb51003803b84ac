"""Numbers that Dynamo makes symbols of, instead of constants, and what became of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import sympy  # type: ignore[import-untyped]
import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo import pgo, utils
from torch._dynamo.variables import builder
from torch.fx.experimental.sym_node import SymNode
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions


@dataclass(frozen=True)
class Numbers:
    """What shall be done about numbers.

    Attributes:
        sources: those that shall be inputs, by where Dynamo finds them (``L['self'].steps``).
        symbols: whether whole numbers may be symbols of the graph, where no tensor can stand for
            one.
        backed: let numbers of floating point be symbols as well, of which torch makes constants
            where it has to.
    """

    sources: frozenset[str] = frozenset()
    symbols: bool = True
    backed: bool = False


NONE = Numbers()


@contextmanager
def as_inputs(sources: Iterable[str]) -> Iterator[None]:
    """Let Dynamo make inputs of the numbers with these sources, and constants of all others."""
    wanted = frozenset(sources)
    if not wanted:
        yield
        return

    def process(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
        return replace(entry, scalar=pgo.auto_dynamic) if name in wanted else entry

    patterns = ",".join(f"{re.escape(s)}$" for s in sorted(wanted) if "," not in s and ":" not in s)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.config.patch(dynamic_sources=patterns))  # type: ignore[attr-defined]
        stack.enter_context(torch._dynamo.config.patch(specialize_float=False))
        stack.enter_context(mock.patch.object(builder, "process_automatic_dynamic", process))
        stack.enter_context(_without_constants())
        yield


@contextmanager
def _without_constants() -> Iterator[None]:
    """Let Dynamo see what calls return without making constants of numbers that they take.

    What a call returns for a number is found out once more when the backward is derived, where the
    number has no value, so nothing that depends on it can stay unnoticed.
    """
    asked: list[list[Any]] = []
    run, guard = utils.run_node, SymNode.guard_float

    def run_node(tracer: Any, node: fx.Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
        if (value := _opaque(node, args)) is not None:
            return value
        asked.append([])
        try:
            result = run(tracer, node, args, kwargs, nnmodule)
        finally:
            here = asked.pop()
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            for number in here:  # Python goes on with what came of its value
                guard(number, "", 0)
        return result

    def guard_float(self: Any, file: str, line: int) -> float:
        if not asked or not self.has_hint():
            return guard(self, file, line)
        asked[-1].append(self)
        return float(self.hint)

    with (
        mock.patch.object(utils, "run_node", run_node),
        mock.patch.object(SymNode, "guard_float", guard_float),
    ):
        yield


def _opaque(node: fx.Node, args: Sequence[Any]) -> Any:
    """What `math.exp` and the like, and whole powers, are for a symbol; else ``None``.

    Torch makes a constant of the first, and a condition of the sign of the base of the second.
    """
    if not args or not isinstance(args[0], torch.SymInt | torch.SymFloat):
        return None
    number, *rest = args
    name = getattr(node.target, "__name__", "")
    symbolic = getattr(functions, f"OpaqueUnaryFn_{name}", None)
    if not number.node.has_hint():
        return None
    env, expression = number.node.shape_env, number.node.expr
    if symbolic is not None and getattr(math, name, None) is node.target and not rest:
        made = symbolic(expression)
    elif name in ("pow", "ipow") and isinstance(number, torch.SymFloat) and type(rest[0]) is int:
        made = functions.FloatPow(expression, sympy.Float(rest[0]))
    else:
        return None
    hint = node.target(number.node.hint, *rest)  # type: ignore[operator]
    return env.create_symfloatnode(made, hint=hint)


def constants(shape_env: Any, sources: Iterable[str]) -> frozenset[str]:
    """Which of these numbers a graph holds for one value of.

    Args:
        shape_env: once nothing more is asked of its symbols.
        sources: of the numbers.
    """
    wanted = frozenset(sources)
    found = set()
    for symbol, places in shape_env.var_to_sources.items():
        if shape_env.simplify(symbol).is_number:
            found |= {name for place in places for name in wanted if name in place.name}
    return frozenset(found)


def counters(output: Any, assigned: Iterable[str]) -> frozenset[str]:
    """Numbers that forward reads and assigns, which hence differ at each call.

    Args:
        output: of Dynamo, whose guards say which values are constants.
        assigned: where forward assigns numbers.
    """
    guards = output.graph_capture_output.output_graph.guards
    kinds = ("CONSTANT_MATCH", "EQUALS_MATCH")
    read = {g.originating_source.name for g in guards if g.create_fn_name() in kinds}
    return frozenset(assigned) & read
