"""Run operators in bfloat16 or float16 where that is faster, with as few casts as possible."""

from __future__ import annotations

import difflib
import fnmatch
import json
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from graphopt.analysis.liveness import liveness
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, module_stack, operator_name
from graphopt.passbase import Applied, Declined, Numerics, Outcome, Pass, PassContext, lowered
from graphopt.passes.precision.emulated import apply_emulated
from graphopt.passes.precision.formats import FORMATS, Format
from graphopt.passes.precision.mincut import Times, minimum_cut
from graphopt.passes.precision.problem import Problem, find_problem, is_lowered_already
from graphopt.passes.precision.recipes import recipe_of
from graphopt.passes.precision.rewrite import lower
from graphopt.passes.precision.rules import Kind, kinds
from graphopt.passes.precision.tf import propagate
from graphopt.passes.precision.times import assumed_times, measured_times


@dataclass(frozen=True)
class Precision(Pass):
    """Lower forward and backward operators, and the activations saved between them.

    Each operator has a time in float32 and in the lower format, and each value that changes format
    costs one cast, which all its readers share. The choice of least time is a minimum cut, so no
    other one is better under these times. Parameters, gradients, outputs and buffers keep their
    types: optimizers work on float32 weights as before. Losses, norms and the statistics of K-FAC
    stay in float32. In float16 small gradients vanish: scale the loss (``torch.amp.GradScaler``).

    Attributes:
        format: ``bf16`` or ``fp16``; or ``flex16``, ``mxfp8`` or ``float8``, which are emulated:
            the operands of products are rounded to them and multiplied in float32, by the device's
            own product with scales where it has one. Nothing gets faster by emulation, so
            whoever names such a format wants it: every product is lowered but those of `keep`,
            and `policy`, `cost` and `sums` have no say.
        policy: ``mincut``, or ``tf`` for the propagation rules of TensorFlow's graph pass.
        cost: ``measure`` times each operator on this device, ``roofline`` assumes one.
        keep: patterns of module names that stay in float32, as ``head*|*.norm``.
        sums: ``wide`` leaves a sum of a float32 and a lower value in float32, as autocast does;
            ``low`` lowers it where that saves time.
        granularity: of the scales of ``float8``: one per ``tensor``, gradients in e5m2, or one per
            ``row`` along the contracted axis, all in e4m3, powers of two.
        scaling: of the scales of ``mxfp8``: ``floor`` as OCP has it, where the largest elements of
            a block may saturate, or ``rceil``, the least power of two where none does.
    """

    name: ClassVar[str] = "precision"
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered", "grouped", "scheduled"})
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = (
        "TensorFlow's auto_mixed_precision for the classes of operators; minimum s-t cuts"
    )

    format: Literal["bf16", "fp16", "flex16", "mxfp8", "float8"] = "bf16"
    policy: Literal["mincut", "tf"] = "mincut"
    cost: Literal["measure", "roofline"] = "measure"
    keep: tuple[str, ...] = ()
    sums: Literal["wide", "low"] = "wide"
    granularity: Literal["tensor", "row"] = "tensor"
    scaling: Literal["floor", "rceil"] = "floor"

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        """By the format."""
        return lowered(FORMATS[self.format].bound)

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Choose a format for each operator and insert the casts."""
        kept = self._kept(graph)
        if is_lowered_already(graph):
            detail = "the model or autocast has chosen lower precision itself"
            return Outcome(declined=(Declined("graph", "lowered-already", detail),))
        format = FORMATS[self.format]
        options = {"granularity": self.granularity, "scaling": self.scaling}
        if recipe := recipe_of(self.format, options):
            return apply_emulated(graph, format, recipe, kept)
        problem = find_problem(graph, format, kept)
        declined = _left_out(problem, kept)
        if not any(unit.kind is Kind.ALLOW for unit in problem.units.values()):
            detail = "no matrix product, convolution or attention can be lowered"
            return Outcome(declined=(*declined, Declined("graph", "nothing-to-lower", detail)))
        low, times = self._choice(graph, problem, format, ctx)
        declined += _slower(problem, low, times)
        if not low:
            return Outcome(declined=tuple(declined))
        before = graph.get(liveness).saved_bytes
        casts = lower(graph, problem, low, format.dtype)
        after = graph.get(liveness).saved_bytes
        applied = [_applied(node, format, times) for node in problem.units if node in low]
        applied.append(Applied("casts", "inserted casts", {"casts": len(casts)}))
        if before:
            saved = {"before": before, "after": after}
            applied.append(Applied("activations", "bytes saved for backward", saved))
        return Outcome(tuple(applied), tuple(declined))

    def _choice(
        self, graph: Graph, problem: Problem, format: Format, ctx: PassContext
    ) -> tuple[frozenset[fx.Node], Times]:
        """The units to lower, the same on all ranks, and the times that decided."""
        ranks = ctx.ranks.get("dp")
        measures = self.cost == "measure" and (ranks is None or ranks.size == 1)
        times = (measured_times if measures else assumed_times)(graph, problem, format)

        def best(by: Times) -> frozenset[fx.Node]:
            if self.policy == "tf":
                return propagate(problem, kinds(graph, format))
            return minimum_cut(problem, by, follow=self.sums == "wide")

        if ranks is None or ranks.size == 1 or self.cost == "roofline":
            return best(times), times

        def decide() -> str:
            chosen = best(measured_times(graph, problem, format))
            return json.dumps(sorted(node.name for node in chosen))

        known = "\n".join([f"pass {self}", *(node.name for node in problem.units)])
        names = set(json.loads(ranks.agree("precision", known, decide)))
        return frozenset(node for node in problem.units if node.name in names), times

    def _kept(self, graph: Graph) -> frozenset[fx.Node]:
        """Operators of the modules that the user keeps in float32.

        Raises:
            ArgumentError: a pattern matches no module.
        """
        names = {n: [name for name, _ in module_stack(n) if name] for n in graph.operators}
        known = sorted({name for found in names.values() for name in found})
        for pattern in self.keep:
            if not fnmatch.filter(known, pattern):
                near = difflib.get_close_matches(pattern, known, n=3)
                raise ArgumentError(
                    f"precision: keep={pattern} matches no module",
                    hint=f"did you mean {' or '.join(near)}?" if near else "see graphopt show M",
                )
        return frozenset(
            node
            for node, found in names.items()
            if any(fnmatch.filter(found, pattern) for pattern in self.keep)
        )


def _applied(node: fx.Node, format: Format, times: Times) -> Applied:
    numbers = {"float32_us": 1e6 * times.high[node], f"{format.name}_us": 1e6 * times.low[node]}
    return Applied(node.name, f"{operator_name(node)} runs in {format.name}", numbers)


def _left_out(problem: Problem, kept: frozenset[fx.Node]) -> list[Declined]:
    found = [
        Declined(n.name, "no-rule", f"nothing is known of {operator_name(n)} in lower precision")
        for n in problem.unknown
    ]
    found += [
        Declined(node.name, "cannot-run", f"{operator_name(node)}: {reason}")
        for node, reason in problem.refused.items()
    ]
    found += [Declined(n.name, "kept", "its module is kept in float32") for n in kept]
    return found


def _slower(problem: Problem, low: frozenset[fx.Node], times: Times) -> list[Declined]:
    """Operators that could have gained and did not."""
    return [
        Declined(
            node.name,
            "not-faster",
            f"{operator_name(node)} with its casts is not faster in lower precision",
            {"float32_us": 1e6 * times.high[node], "low_us": 1e6 * times.low[node]},
        )
        for node, unit in problem.units.items()
        if unit.kind is Kind.ALLOW and node not in low
    ]
