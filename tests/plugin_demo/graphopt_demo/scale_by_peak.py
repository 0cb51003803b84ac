"""`scale_by_peak`: divide gradients by the running maximum of the activations they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.errors import ArgumentError
from graphopt.graph import Graph, phase_of
from graphopt.passbase import ALGORITHM, Applied, Declined, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Phase, Role, Slot
from graphopt.rewrite import emit
from graphopt_demo.plan import Peak, Peaks

aten = torch.ops.aten
ACTIVATIONS = (aten.relu.default, aten.gelu.default, aten.tanh.default, aten.sigmoid.default)


@dataclass(frozen=True)
class ScaleByPeak(Pass):
    """Divide the gradients of a layer by the largest magnitude its activation had lately.

    The maxima are nodes of the forward half. A layer is what lies between two activations.

    Attributes:
        decay: what a running maximum is multiplied with in each step; at 1 it never falls.
    """

    name: ClassVar[str] = "scale_by_peak"
    numerics: ClassVar[Numerics] = ALGORITHM
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    changes_signature: ClassVar[bool] = True
    communicates: ClassVar[frozenset[str]] = frozenset({"dp"})
    idempotent: ClassVar[bool] = False

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ArgumentError(
                f"scale_by_peak: decay={self.decay:g} is not in [0, 1]", hint="0.9 is a usual start"
            )

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Return the maximum of each activation, and decide whose gradients it scales."""
        sites = [n for n in graph.operators if n.target in ACTIVATIONS and _in_forward(n)]
        gradients, taken = set(graph.signature.names(Role.GRAD)), set(sites)
        parameters = {
            node: slot.name
            for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True)
            if slot.role is Role.PARAM
        }
        peaks, applied, declined, maxima = [], [], [], {}
        for site in sites:
            own = [parameters[n] for n in _above(site, taken) if n in parameters]
            own = [name for name in own if name in gradients]
            gradients -= set(own)
            if not own:
                detail = "No parameter between this activation and the one before has a gradient."
                declined.append(Declined(site.name, "no-parameters", detail))
                continue
            with graph.fx.inserting_after(site):
                magnitude = emit(graph, aten.abs.default, site, like=site)
            with graph.fx.inserting_after(magnitude):
                peak = emit(graph, aten.amax.default, magnitude, like=site)
            maxima[Slot(Role.AUX, f"{self.name}/{site.name}")] = peak
            peaks.append(Peak(site.name, tuple(sorted(own))))
            applied.append(Applied(site.name, f"scales the gradients of {', '.join(sorted(own))}"))
        if not peaks:
            return Outcome(declined=tuple(declined))
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        graph.set_outputs({**maxima, **outputs})
        graph.changed()
        return Outcome(tuple(applied), tuple(declined), Peaks(tuple(peaks), self.decay))


def _in_forward(node: fx.Node) -> bool:
    return phase_of(node) is Phase.FORWARD


def _above(site: fx.Node, others: set[fx.Node]) -> list[fx.Node]:
    """All nodes that a node depends on, up to the other sites."""
    found: dict[fx.Node, None] = {}
    stack = [site]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used not in found and used not in others:
                found[used] = None
                stack.append(used)
    return list(found)
