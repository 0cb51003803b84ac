"""The choice that TensorFlow's graph pass makes, by propagation of colours.

Source: ``tensorflow/core/grappler/optimizers/auto_mixed_precision.cc``. It has no times: operators
that gain much pull in what lies between them, and what is unsafe spreads downstream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

from torch import fx

from graphopt.passes.precision.problem import Problem
from graphopt.passes.precision.rules import Kind

Step = Callable[[fx.Node], Iterable[fx.Node]]


def propagate(problem: Problem, kind_of: Mapping[fx.Node, Kind | None]) -> frozenset[fx.Node]:
    """The units that TensorFlow's pass would lower.

    Args:
        problem: with its units.
        kind_of: kind of every operator, those that stay in float32 too.
    """
    units = problem.units
    allowed = {n for n, unit in units.items() if unit.kind is Kind.ALLOW}
    if not allowed:
        return frozenset()
    denied = _denied(kind_of)
    free = {n for n, u in units.items() if u.kind in (Kind.INFER, Kind.CLEAR) and n not in denied}
    below = _reached(allowed, _users, free)  # everything that comes after an allowed operator
    between = _reached(allowed, _operands, below & free)
    painted = allowed | between
    clear = {n for n in free if units[n].kind is Kind.CLEAR}
    painted |= _reached(painted, lambda n: (*_users(n), *_operands(n)), clear - painted)
    return frozenset(painted)


def _denied(kind_of: Mapping[fx.Node, Kind | None]) -> set[fx.Node]:
    """Unsafe operators, and those after them that are safe only where nothing unsafe is before."""
    unsafe = {n for n, kind in kind_of.items() if kind in (Kind.DENY, None)}
    infer = {n for n, kind in kind_of.items() if kind is Kind.INFER}
    clear = {n for n, kind in kind_of.items() if kind is Kind.CLEAR}
    # Clear operators that lead to an unsafe or inferred one through clear ones only.
    leading = _reached(unsafe | infer, _operands, clear)
    return unsafe | _reached(unsafe, _users, infer | leading)


def _reached(start: set[fx.Node], step: Step, within: set[fx.Node]) -> set[fx.Node]:
    """What is reached from `start` by steps that stay within a set."""
    found: set[fx.Node] = set()
    queue = list(start)
    while queue:
        for node in step(queue.pop()):
            if node in within and node not in found:
                found.add(node)
                queue.append(node)
    return found


def _users(node: fx.Node) -> Iterable[fx.Node]:
    for user in node.users:
        yield from user.users if user.target is operator.getitem else (user,)


def _operands(node: fx.Node) -> Iterable[fx.Node]:
    for operand in node.all_input_nodes:
        yield operand.all_input_nodes[0] if operand.target is operator.getitem else operand
