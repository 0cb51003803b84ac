"""The table of invariants that a legal graph satisfies, and `verify`, which checks it.

`torch.fx`'s own ``lint`` accepts graphs without output, calls with too few arguments and false
metadata. Rows are checked in order, and each may rely on the rows above it; so a graph is refused
for the first row that it violates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from graphopt.errors import InvariantError
from graphopt.graph import Graph, source_of
from graphopt.verify import form, step
from graphopt.verify.form import Scan, Violation
from graphopt.verify.memory import in_place_safe
from graphopt.verify.values import values_true


@dataclass(frozen=True)
class Invariant:
    """One row of the table.

    Attributes:
        name: a stable name in kebab-case.
        meaning: one sentence that is true of every legal graph.
        check: yields each violation as a node (or none) and a sentence about it.
        cost: ``"structure"`` is checked always, ``"full"`` runs every operator on fake tensors.
    """

    name: str
    meaning: str
    check: Callable[[Scan], Iterator[Violation]]
    cost: Literal["structure", "full"] = "structure"


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(
        "one-output",
        "There is exactly one output node and it is the last node.",
        form.one_output_last,
    ),
    Invariant(
        "placeholders",
        "Placeholders come first, one per input of the signature.",
        form.placeholders_match,
    ),
    Invariant(
        "outputs",
        "The output returns a flat list of nodes, one per output of the signature.",
        form.outputs_match,
    ),
    Invariant(
        "unique-names",
        "No two nodes have the same name, no two inputs or outputs the same role and name.",
        form.names_unique,
    ),
    Invariant(
        "defined-before-use",
        "Every argument is an earlier node of the same graph.",
        form.defined_before_use,
    ),
    Invariant(
        "allowed-targets",
        "Calls are of operators, higher-order operators, getitem, and functions on numbers; of a "
        "forward graph of any function or method.",
        form.targets_allowed,
    ),
    Invariant(
        "attributes",
        "Every get_attr node names an attribute of the module.",
        form.attributes_exist,
    ),
    Invariant(
        "arguments",
        "The arguments of a call fit the operator's schema in number and name.",
        form.arguments_bind,
    ),
    Invariant(
        "values",
        "Every node that computes something has a fake value in its meta.",
        form.values_present,
    ),
    Invariant(
        "elements",
        "A getitem call takes an existing element of a tuple.",
        form.elements_exist,
    ),
    Invariant(
        "phase-order",
        "No forward node uses a backward node or a tangent.",
        step.phases_ordered,
    ),
    Invariant(
        "forward-outputs",
        "Forward outputs come from forward nodes.",
        step.forward_outputs,
    ),
    Invariant(
        "mutations",
        "A mutation output names an input of equal shape and dtype.",
        step.mutations_fit,
    ),
    Invariant(
        "gradients",
        "A gradient has the shape and dtype of the input that it belongs to.",
        step.gradients_fit,
    ),
    Invariant(
        "in-place",
        "An in-place operator overwrites nothing that is read later, and only declared inputs.",
        in_place_safe,
    ),
    Invariant(
        "frozen",
        "A frozen value depends only on parameters and buffers that the graph does not mutate.",
        step.frozen_constant,
    ),
    Invariant(
        "collectives",
        "Each result of a collective is waited on exactly once, and read only through the wait.",
        step.collectives_waited,
    ),
    Invariant(
        "collectives-everywhere",
        "No collective is inside a subgraph that some ranks may not run.",
        step.no_collective_inside,
    ),
    Invariant(
        "true-values",
        "The value in a node's meta has the form (shape, dtype, device, stride) of the result.",
        values_true,
        "full",
    ),
)


def verify(graph: Graph, *, full: bool = False) -> None:
    """Check `graph` against the table.

    Args:
        graph: the graph; it is not changed.
        full: whether to run every operator on fake tensors too.

    Raises:
        InvariantError: it violates an invariant; names the invariant and the first node.
    """
    scan = Scan(graph)
    for invariant in INVARIANTS:
        if invariant.cost == "full" and not full:
            continue
        violations = invariant.check(scan)
        if first := next(violations, None):
            raise _error(invariant, first, sum(1 for _ in violations))


def _error(invariant: Invariant, violation: Violation, others: int) -> InvariantError:
    node, sentence = violation
    subject = f"node {node.name!r}: " if node is not None else ""
    more = f" (and {others} more)" if others else ""
    source = source_of(node) if node is not None else ""
    call = node.format_node() if node is not None else None
    return InvariantError(
        f"invariant {invariant.name!r} is broken: {subject}{sentence}{more}. {invariant.meaning}",
        where="\n      ".join(filter(None, (call, source))),
    )
