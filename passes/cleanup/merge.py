"""The part of cleanup that lets readers of a value read an equal, earlier one instead.

One walk in graph order suffices: when a node is reached, its operands are already the kept ones.
Whether two values may become one is asked of `graphopt.analysis.sharing`; that they are equal, of
`graphopt.analysis.identity`.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from typing import Any, cast

from torch import fx

from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.effects import Effect, effect_of, is_repeatable
from graphopt.analysis.identity import VIEWS, call_key, copied, geometry
from graphopt.analysis.sharing import REASONS, Seen, Sharing
from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.passbase import Applied, Declined, Outcome
from graphopt.plan import Phase

DETAILS = {
    **REASONS,
    "random-op": "each call draws its own numbers",
    "opaque-op": "graphopt does not know what this operator does beside computing its result",
    "unknown-result": "two calls need not return the same",
    "recompute": "activation checkpointing computes one of them again, and not the other",
    "saves-activation": "backward would read a forward value that is not kept for it so far",
}


def merge_equal(graph: Graph, sharing: Sharing) -> Outcome:
    """Replace views, copies and calls by an earlier node of the same value, where nobody can tell.

    A backward node is replaced by a forward node only if that keeps no further memory for backward.
    Calls without operands (``full``) are not merged across the two halves. `sharing` is that of
    `graph`, and is kept up to date.
    """
    return _Walk(graph, sharing).run()


class _Walk:
    def __init__(self, graph: Graph, sharing: Sharing) -> None:
        self.graph = graph
        self.sharing = sharing
        self.outputs = set(graph.outputs)
        self.applied: list[Applied] = []
        self.declined: list[Declined] = []
        # The tensor that a chain of views starts from, for each view.
        self.base: dict[fx.Node, fx.Node] = {}
        self.views: dict[Hashable, fx.Node] = {}
        self.calls: dict[Hashable, fx.Node] = {}

    def run(self) -> Outcome:
        for node in self.graph.nodes:
            if node.op != "output":
                self._visit(node)
        return Outcome(tuple(self.applied), tuple(self.declined))

    def _visit(self, node: fx.Node) -> None:
        form, key = self._keys(node)
        refused: dict[str, fx.Node] = {}
        for kept, what in self._candidates(node, form, key):
            reason = self._obstacle(node, kept)
            if not reason:
                self._replace(node, kept, what)
                return
            refused.setdefault(reason, kept)
        self._remember(node, form, key)
        for reason, kept in refused.items():
            numbers = (
                {"bytes": tensor_bytes(value_of(kept))} if reason == "saves-activation" else {}
            )
            detail = f"equal to {kept.name}, but {DETAILS[reason]}"
            self.declined.append(Declined(node.name, reason, detail, numbers))

    def _keys(self, node: fx.Node) -> tuple[Hashable, Hashable]:
        """What two equal views have in common, and two equal calls."""
        form = geometry(node)
        if node.target in VIEWS and form is not None:
            operand = cast("fx.Node", node.args[0])
            self.base[node] = self.base.get(operand, operand)
            return (self.base[node], form), None
        is_call = node.op == "call_function" and effect_of(node) is not Effect.VISIBLE
        return (node, form), call_key(node) if is_call else None

    def _candidates(
        self, node: fx.Node, form: Hashable, key: Hashable
    ) -> Iterator[tuple[fx.Node, str]]:
        """Earlier nodes with the value of `node`, best first, and what replacing it means."""
        if node in self.base:
            equal = self.views.get(form)
            if equal is not None and _may_precede(equal, node):
                yield equal, "removed view"
            return
        if (source := copied(node)) is not None:
            yield source, "removed copy"
        if key is None:
            return
        # Remaking a constant is cheaper than handing it to backward.
        phases = (Phase.FORWARD, Phase.BACKWARD) if node.all_input_nodes else (phase_of(node),)
        for phase in phases:
            equal = self.calls.get((key, phase))
            if equal is not None and _may_precede(equal, node) and _same_form(equal, node):
                yield equal, "merged duplicate"

    def _remember(self, node: fx.Node, form: Hashable, key: Hashable) -> None:
        """Offer `node` to later ones; of several that could not be merged, the newest call."""
        if not _may_precede(self.views.setdefault(form, node), node):
            self.views[form] = node
        if key is not None:
            self.calls[key, phase_of(node)] = node

    # -- what stands against it ------------------------------------------------------------------

    def _obstacle(self, node: fx.Node, kept: fx.Node) -> str:
        is_copy = copied(node) is kept
        if not is_copy and not is_repeatable(node):
            effect = effect_of(node)
            return "unknown-result" if effect is Effect.PURE else f"{effect}-op"
        if self._breaks_checkpoint(node, kept):
            return "recompute"
        if node in self.outputs and not self._may_return(kept, phase_of(node)):
            return "escapes"
        if self.sharing.owner(node) is self.sharing.owner(kept):
            return ""
        if any(self.sharing.seen(operand) & Seen.WRITTEN for operand in node.all_input_nodes):
            return "mutated"
        return self._memory_obstacle(node, kept)

    def _memory_obstacle(self, node: fx.Node, kept: fx.Node) -> str:
        sharing = self.sharing
        crosses = phase_of(node) is not phase_of(kept)
        for removed, counterpart in _pieces(node, kept):
            if counterpart is None:
                if crosses:
                    return "saves-activation"
                continue
            if reason := sharing.obstacle(removed, counterpart):
                return reason
            is_kept = bool(sharing.seen(counterpart) & Seen.KEPT)
            if crosses and not is_kept:
                return "saves-activation"
            # A small copy may be there to let a large source die before backward.
            if sharing.seen(removed) & Seen.KEPT and not is_kept:
                whole = value_of(sharing.owner(counterpart))
                if tensor_bytes(whole) > tensor_bytes(value_of(removed)):
                    return "saves-activation"
        return ""

    def _breaks_checkpoint(self, node: fx.Node, kept: fx.Node) -> bool:
        """Whether a value would be kept that is computed again, or the reverse."""
        tags = _checkpoint(kept)
        if node in self.base or copied(node) is kept:
            return phase_of(node) is Phase.FORWARD and tags not in (_NO_TAGS, _checkpoint(node))
        return tags != _checkpoint(node)

    def _may_return(self, kept: fx.Node, phase: Phase) -> bool:
        return kept.op == "call_function" and kept not in self.outputs and phase_of(kept) is phase

    # -- doing it --------------------------------------------------------------------------------

    def _replace(self, node: fx.Node, kept: fx.Node, what: str) -> None:
        for removed, counterpart in _pieces(node, kept):
            if counterpart is not None:
                self.sharing.merge(removed, counterpart)
        if node in self.outputs:
            self.outputs.remove(node)
            self.outputs.add(kept)
        node.replace_all_uses_with(kept)
        self.graph.fx.erase_node(node)
        self.applied.append(Applied(operator_name(node), what, {"nodes": 1}))


_NO_TAGS = (None, None)


def _checkpoint(node: fx.Node) -> tuple[Any, Any]:
    return node.meta.get("recompute"), node.meta.get("ac_graph_id")


def _may_precede(kept: fx.Node, node: fx.Node) -> bool:
    """Forward nodes must not read backward ones."""
    return phase_of(kept) is Phase.FORWARD or phase_of(node) is Phase.BACKWARD


def _same_form(one: fx.Node, other: fx.Node) -> bool:
    first, second = value_of(one), value_of(other)
    if isinstance(first, tuple | list):
        return isinstance(second, tuple | list) and len(first) == len(second)
    return geometry(one) == geometry(other)


def _pieces(node: fx.Node, kept: fx.Node) -> list[tuple[fx.Node, fx.Node | None]]:
    """What readers of `node` read, each with the node that holds the same in `kept`."""
    if not isinstance(value_of(node), tuple | list):
        return [(node, kept)]
    existing = {user.args[1]: user for user in kept.users if user.target is operator.getitem}
    return [(user, existing.get(user.args[1])) for user in node.users]
