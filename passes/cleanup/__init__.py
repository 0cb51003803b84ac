"""Remove what changes no bit of any result, so that later passes match one form of each thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from graphopt.analysis.effects import Effect, effect_of
from graphopt.analysis.sharing import Sharing
from graphopt.graph import Graph, operator_name
from graphopt.passbase import EXACT, Applied, Declined, Numerics, Outcome, Pass, PassContext
from graphopt.passes.cleanup.constants import fold_constants
from graphopt.passes.cleanup.merge import DETAILS, merge_equal


def remove_dead(graph: Graph) -> Outcome:
    """Delete operators whose result nobody reads and that do nothing else.

    An unread random operator stays, since without it later ones would draw other numbers; so does
    an operator that graphopt does not know. An operator that would have raised an error on its
    operands does not raise it any more.
    """
    applied: list[Applied] = []
    declined: list[Declined] = []
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output"):
            continue
        effect = effect_of(node)
        if effect is Effect.PURE:
            applied.append(Applied(operator_name(node), "removed dead code", {"nodes": 1}))
            graph.fx.erase_node(node)
        elif effect is not Effect.VISIBLE:
            declined.append(Declined(node.name, f"{effect}-op", _UNREAD[effect]))
    return Outcome(tuple(applied), tuple(declined))


_UNREAD = {
    Effect.RANDOM: "nobody reads it, but without it later operators would draw other numbers",
    Effect.OPAQUE: f"nobody reads it, but {DETAILS['opaque-op']}",
}


@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead code, redundant views, copies and duplicates; compute small constants once.

    Every result stays equal, bit for bit. No output starts to share memory with another one or with
    an input; no value is kept for backward that was not; what activation checkpointing computes
    again is still computed again. Applied to its own result, it does nothing.
    """

    name: ClassVar[str] = "cleanup"
    numerics: ClassVar[Numerics] = EXACT
    symbolic: ClassVar[bool] = True
    lasting: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Rewrite `graph` until nothing is left to do."""
        applied = list(remove_dead(graph).applied)
        while True:
            sharing = Sharing(graph)
            steps = (
                merge_equal(graph, sharing),
                fold_constants(graph, sharing),
                remove_dead(graph),
            )
            done = [item for step in steps for item in step.applied]
            declined = [item for step in steps for item in step.declined]
            applied += done
            # Only what was declined can have become possible by what was done.
            if not (done and declined):
                break
        if applied:
            graph.changed()
        return Outcome(_grouped(applied), tuple(declined))


def _grouped(applied: Iterable[Applied]) -> tuple[Applied, ...]:
    """One item per site and kind of change, with summed numbers."""
    sums: dict[tuple[str, str], Counter[str]] = {}
    for item in applied:
        sums.setdefault((item.site, item.what), Counter()).update(item.numbers)
    return tuple(
        Applied(site, what, dict(numbers)) for (site, what), numbers in sorted(sums.items())
    )
