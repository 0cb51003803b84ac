"""Do once, before inference, what depends on weights only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import graphopt.ops  # noqa: F401  (registers graphopt::frozen)
from graphopt.analysis.constants import derived, private_attributes
from graphopt.graph import Graph
from graphopt.passbase import REASSOCIATED, Numerics, Outcome, Pass, PassContext
from graphopt.passes.fold_inference.freeze import FROZEN, freeze
from graphopt.passes.fold_inference.layers import mark_weights
from graphopt.passes.fold_inference.norm import fold_norms
from graphopt.plan import Role


@dataclass(frozen=True)
class FoldInference(Pass):
    """Fold batch norm into the convolution or linear layer before it, and freeze constant weights.

    With ``scale = gamma / sqrt(var + eps)``, weight and bias become ``w * scale`` and ``(b - mean)
    * scale + beta``, as expressions of the graph; they, casts of weights and whatever else depends
    on weights only are closed by ``graphopt.frozen``, so that the runtime computes them once and
    again when a weight changes. So are, on CPUs, weights that layers read as they are: the runtime
    may keep them in another layout. Nothing is read from the weights here.

    Rounding: with k products per result and unit roundoff u, folded and unfolded are both within
    ``(k + 8) u (|scale| (sum |w x| + |b| + |mean|) + |beta|)`` of the exact result. That grows with
    the scale, up to ``|gamma| / sqrt(eps)`` for a channel without variance, but it does so with and
    without folding, so no channel is refused for its scale. Types below float32 are refused: there
    the folded weight is rounded once more, with u = 2**-9 in bfloat16. So is ``eps <= 0``, where a
    variance of zero gives infinity unfolded and NaN folded.
    """

    name: ClassVar[str] = "fold_inference"
    numerics: ClassVar[Numerics] = REASSOCIATED
    levels: ClassVar[frozenset[str]] = frozenset({"inference"})
    symbolic: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Fold, then freeze."""
        mutations = set(graph.signature.names(Role.MUTATION))
        inputs = {
            node: slot
            for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True)
            if slot.role in (Role.PARAM, Role.BUFFER)
        }
        weights = {node: slot for node, slot in inputs.items() if slot.name not in mutations}
        frozen = graph.fx.find_nodes(op="call_function", target=FROZEN)
        fixed = [*private_attributes(graph), *frozen]

        known = derived(graph, [*weights, *fixed])
        mutated = derived(graph, [*inputs, *fixed]).keys() - known.keys()
        changing = inputs.keys() - weights.keys()
        folded = fold_norms(graph, {*weights, *fixed, *known}, mutated | changing)

        known = derived(graph, [*weights, *fixed])
        marked = freeze(graph, weights, known, mutated)
        layers = mark_weights(graph, weights)
        if folded.changed or marked.changed or layers.changed:
            graph.changed()
        return Outcome(
            folded.applied + marked.applied + layers.applied, folded.declined + marked.declined
        )
