"""Flexpoint: every tensor of a step as 16-bit integers with one predicted exponent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graphopt.analysis.liveness import liveness
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, Level, module_of, value_of
from graphopt.ops.flex import LEAST_EXPONENT, MANTISSAS, MOST_EXPONENT, UNKNOWN
from graphopt.passbase import (
    ALGORITHM,
    Applied,
    Declined,
    Numerics,
    Outcome,
    Pass,
    PassContext,
    lowered,
)
from graphopt.passes.flexpoint.rewrite import State, quantise
from graphopt.passes.flexpoint.rules import elements_of
from graphopt.passes.flexpoint.values import Values, find_values, is_lowered_already
from graphopt.plan import Phase, Role, Slot
from graphopt.plan.flexpoint import FlexTensors

# A step rounds hundreds of times in a row, each time to 2^(1 - mantissa) of the tensor's largest
# magnitude; normalisations make that more for what is small in a tensor.
_ROUNDINGS = 2**10


@dataclass(frozen=True)
class Flexpoint(Pass):
    """Train in flex tensors: integers with one exponent per tensor, which Autoflex predicts.

    Every float32 tensor of the step, forward and backward, is rounded to a mantissa of 16 bits and
    an exponent that all its elements share; what an operator computes inside stays float32, as in
    the simulator of the publication. Exponents follow from the statistics of earlier steps, which
    cost no pass over memory, and a tensor is saved for the backward as its integers. Views, ReLU
    and what else only moves or selects elements take over the exponent of their operand. Statistics
    of norms and of other passes stay float32, and so do integers, float64 and complex numbers.
    Without a backward each exponent follows from its tensor.

    Attributes:
        mantissa: bits of an integer, sign included; 8 to 16.
        exponent: bits of an exponent, 1 to 8. It has 2^bits values, the largest of them 0; of 7 and
            8 bits what lies beyond float32's -126 is moved up or left out.
        autoflex: how an exponent follows. ``paper`` predicts by Algorithm 2 of the publication;
            ``code2016`` as its first code did, with a bit less headroom; ``delayed`` takes the
            largest of 1024 steps, as Transformer Engine does; ``current`` looks at the tensor
            itself first, over all of float32's exponents.
        rounding: ``nearest`` with ties to even, or ``stochastic``.
        master_weights: whether parameters stay float32 between steps. Without them the parameters
            themselves are rounded at the beginning of a step, as in the publication.
    """

    name: ClassVar[str] = "flexpoint"
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered", "grouped", "scheduled", "staged"})
    changes_signature: ClassVar[bool] = True
    symbolic: ClassVar[bool] = True
    communicates: ClassVar[frozenset[str]] = frozenset({"dp"})
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = "Köster et al., Flexpoint, NIPS 2017, arXiv 1711.02213"

    mantissa: int = 16
    exponent: int = 5
    autoflex: Literal["paper", "code2016", "delayed", "current"] = "paper"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    master_weights: bool = True

    def __post_init__(self) -> None:
        if self.mantissa not in MANTISSAS:
            raise ArgumentError(
                f"flexpoint: mantissa={self.mantissa} is not a number of bits from "
                f"{MANTISSAS.start} to {MANTISSAS.stop - 1}",
                hint="leave it out for 16",
            )
        if not 1 <= self.exponent <= 8:
            raise ArgumentError(
                f"flexpoint: exponent={self.exponent} is not a number of bits from 1 to 8",
                hint="5 is what the publication trains with, 8 has the range of float32",
            )

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        """By the mantissa; weights that are rounded for good are another training method."""
        return lowered(_ROUNDINGS * 2.0**-self.mantissa) if self.master_weights else ALGORITHM

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Round all tensors, and decide what the runtime predicts."""
        if is_lowered_already(graph):
            detail = "the model or autocast has chosen lower precision itself"
            return Outcome(declined=(Declined("graph", "lowered-already", detail),))
        values = find_values(graph)
        if not values.roots:
            detail = "no tensor of this graph is float32"
            return Outcome(declined=(*values.declined, Declined("graph", "no-float32", detail)))
        part = self._part(graph, values)
        predicts = graph.level is not Level.INFERENCE
        before = graph.get(liveness).saved_bytes
        state = self._state(graph, values, part, ctx) if predicts else State()
        found = quantise(graph, values, self.mantissa, state)
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        statistics = {
            Slot(Role.AUX, f"{self.name}/{half}", Phase(half)): node for half, node in found.items()
        }
        first = {s: n for s, n in statistics.items() if s.phase is Phase.FORWARD}
        graph.set_outputs({**first, **outputs, **statistics})
        graph.changed()
        applied = [
            Applied(name, "became a flex tensor", {"elements": count})
            for name, count in zip(part.names, part.elements, strict=True)
        ]
        if before:
            saved = {"before": before, "after": graph.get(liveness).saved_bytes}
            applied.append(Applied("activations", "bytes saved for backward", saved))
        return Outcome(tuple(applied), values.declined, part if predicts else None)

    def _part(self, graph: Graph, values: Values) -> FlexTensors:
        names = tuple(root.name for root in values.roots)
        described = (f"{module_of(r)} {r.name} {r.target}" for r in values.roots)
        digest = hashlib.sha256("\n".join(described).encode()).hexdigest()
        least, most = window(self.exponent)
        return FlexTensors(
            key=digest[:12],
            names=names,
            forward=values.forward,
            elements=tuple(map(elements_of, values.roots)),
            mantissa=self.mantissa,
            least=least,
            most=most,
            autoflex=self.autoflex,
            stochastic=self.rounding == "stochastic",
            weights={} if self.master_weights else _trained(graph, values),
        )

    def _state(self, graph: Graph, values: Values, part: FlexTensors, ctx: PassContext) -> State:
        """Inputs for the exponents, unknown at first, and the seed."""
        like: torch.Tensor = value_of(values.roots[0])
        device = like.device
        what = f"exponents/{part.key}"
        start = torch.full((len(part.names),), UNKNOWN, dtype=torch.int32, device=device)
        _initialise(ctx, what, start)
        exponents = graph.add_input(
            Slot(Role.STATE, f"{self.name}/{what}"),
            like.new_empty((len(part.names),), dtype=torch.int32),
        )
        if not part.stochastic:
            return State(exponents)
        _initialise(ctx, "seed", torch.zeros(2, dtype=torch.int64, device=device))
        seed = graph.add_input(
            Slot(Role.STATE, f"{self.name}/seed"),
            like.new_empty((2,), dtype=torch.int64),
        )
        return State(exponents, seed)


def window(bits: int) -> tuple[int, int]:
    """The least and the largest exponent that so many bits tell apart.

    The scale is 2^-e with e of so many bits, as in the publication, so exponents are -(2^bits - 1)
    to 0: -31 to 0 for 5 bits. Where that goes beyond what 8 bits with a sign have, it begins there,
    and what float32 has no normal number for is left out: 8 bits are -126 to 126.
    """
    least = max(1 - 2**bits, -128)
    most = least + 2**bits - 1
    return max(least, LEAST_EXPONENT), min(most, MOST_EXPONENT)


def _initialise(ctx: PassContext, what: str, start: torch.Tensor) -> None:
    """Put a tensor into the state, unless it is there; on the device where the model is now."""
    found = ctx.state.get(what)
    ctx.state[what] = start if found is None else found.to(start.device)


def _trained(graph: Graph, values: Values) -> dict[str, int]:
    """Rows of the parameters that receive gradients."""
    slots = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
    trained = set(graph.signature.names(Role.GRAD))
    found = ((row, slots[root]) for row, root in enumerate(values.roots) if root in slots)
    return {s.name: row for row, s in found if s.role is Role.PARAM and s.name in trained}
