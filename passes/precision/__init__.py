"""Run operators in bfloat16 or float16 where that is faster, with as few casts as possible."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import fx

from graphopt.analysis.liveness import liveness
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, module_of, module_stack, operator_name
from graphopt.passbase import Applied, Declined, Numerics, Outcome, Pass, PassContext, lowered
from graphopt.passes.precision.calibrated import Calibrated, check_budget
from graphopt.passes.precision.decision import Question, decide
from graphopt.passes.precision.emulated import apply_emulated, emulate, find_products
from graphopt.passes.precision.findings import Findings
from graphopt.passes.precision.formats import FORMATS
from graphopt.passes.precision.problem import Problem, find_problem, is_lowered_already
from graphopt.passes.precision.recipes import Recipe, recipe_of
from graphopt.passes.precision.rewrite import lower
from graphopt.passes.precision.rules import Kind
from graphopt.passes.precision.scaling import scale_gradients
from graphopt.passes.precision.sharing import promote, share_casts


@dataclass(frozen=True)
class Precision(Pass):
    """Lower forward and backward operators, and the activations saved between them.

    Each operator has a time in float32 and in the lower format, and each value that changes format
    costs one cast, which all its readers share. The choice of least time is a minimum cut, so no
    other one is better under these times. Parameters, gradients, outputs and buffers keep their
    types: optimizers work on float32 weights as before. Losses, norms and the statistics of K-FAC
    stay in float32.

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
        loss_scale: ``dynamic`` scales gradients in float16 by a power of two, which adapts; steps
            in which they overflow get no gradients, so that optimizers skip them. A
            ``torch.amp.GradScaler`` given to ``graphopt.use_scaler`` takes its place.
        calibration: a file that ``graphopt calibrate`` wrote for this model. Operators whose values
            do not fit the format are kept in float32.
        budget: the largest expected change of the loss, by the calibration; 0 for any. The fastest
            choice within it is taken.
        granularity: of the scales of ``float8``: one per ``tensor``, gradients in e5m2, or one per
            ``row`` along the contracted axis, all in e4m3, powers of two.
        scaling: of the scales of ``mxfp8``: ``floor`` as OCP has it, where the largest elements of
            a block may saturate, or ``rceil``, the least power of two where none does.
    """

    name: ClassVar[str] = "precision"
    provides: ClassVar[frozenset[str]] = frozenset({"lowered"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"lowered", "grouped", "scheduled", "staged"})
    changes_signature: ClassVar[bool] = True
    symbolic: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = (
        "TensorFlow's auto_mixed_precision for the classes of operators; minimum s-t cuts"
    )

    format: Literal["bf16", "fp16", "flex16", "mxfp8", "float8"] = "bf16"
    policy: Literal["mincut", "tf"] = "mincut"
    cost: Literal["measure", "roofline"] = "measure"
    keep: tuple[str, ...] = ()
    sums: Literal["wide", "low"] = "wide"
    loss_scale: Literal["dynamic", "none"] = "dynamic"
    granularity: Literal["tensor", "row"] = "tensor"
    scaling: Literal["floor", "rceil"] = "floor"
    calibration: str = ""
    budget: float = 0.0

    def __post_init__(self) -> None:
        check_budget(self.calibration, self.budget, self.policy, self.format)

    @property
    def communicates(self) -> frozenset[str]:  # type: ignore[override]
        """Ranks agree on the steps that are left out."""
        return frozenset({"dp"} if self._scales else ())

    @property
    def _scales(self) -> bool:
        return self.loss_scale == "dynamic" and FORMATS[self.format].loses_gradients

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
        if recipe := self._recipe:
            return apply_emulated(graph, format, recipe, kept)
        known = None
        if self.calibration:
            known = Calibrated.load(self.calibration, graph, format, self._scales)
        whole = problem = find_problem(graph, format, kept)
        ruled_out: dict[fx.Node, Declined] = {}
        if known is not None:
            known.check(whole, self.calibration)
            ruled_out = known.ruled_out(whole)
            problem = find_problem(graph, format, kept | frozenset(ruled_out))
        left_out = (*_left_out(problem, kept), *ruled_out.values())
        if not any(unit.kind is Kind.ALLOW for unit in problem.units.values()):
            detail = "no matrix product, convolution or attention can be lowered"
            return Outcome(declined=(*left_out, Declined("graph", "nothing-to-lower", detail)))
        noise = known.noise(problem) if known is not None else None
        question = Question(
            graph,
            problem,
            format,
            policy=self.policy,
            cost=self.cost,
            follow=self.sums == "wide",
            noise=noise,
            budget=self.budget,
        )
        same = f"pass {self}\ncalibration {known.calibration.digest if known else ''}"
        decision = decide(question, ctx.ranks.get("dp"), same)
        found = Findings.of(graph, format, problem, decision, noise, self.budget)
        if not decision.low:
            return found.outcome(left_out)
        casts = lower(graph, problem, decision.low, format.dtype)
        casts = promote(graph, share_casts(graph, casts))
        outcome = found.outcome(left_out, casts, graph.get(liveness).saved_bytes)
        part = scale_gradients(graph, ctx.state) if self._scales else None
        if part is None:
            return outcome
        numbers = {"first": part.initial, "grows_after": part.interval}
        scaled = Applied("loss", "scaled dynamically", numbers)
        return replace(outcome, applied=(*outcome.applied, scaled), part=part)

    def layers(self, graph: Graph) -> dict[str, tuple[str, ...]]:
        """The operators that may be lowered, by module; of modules with a product in them."""
        if is_lowered_already(graph):
            return {}
        format, kept = FORMATS[self.format], self._kept(graph)
        if recipe := self._recipe:
            units = products = find_products(graph, format, recipe, kept)[0]
        else:
            problem = find_problem(graph, format, kept)
            units = list(problem.units)
            products = [n for n in units if problem.units[n].kind is Kind.ALLOW]
        found: dict[str, tuple[str, ...]] = {module_of(n): () for n in products}
        for node in units:
            if (module := module_of(node)) in found:
                found[module] = (*found[module], node.name)
        return found

    def alone(self, graph: Graph, operators: Iterable[str]) -> Graph:
        """A copy of the graph in which only these operators are lowered."""
        copy, names = graph.copy(), frozenset(operators)
        if recipe := self._recipe:
            emulate(copy, recipe, [n for n in copy.operators if n.name in names])
            return copy
        problem = graph.get(self._problem).on(dict(zip(graph.nodes, copy.nodes, strict=True)))
        low = frozenset(n for n in problem.units if n.name in names)
        lower(copy, problem, low, FORMATS[self.format].dtype)
        return copy

    @property
    def _recipe(self) -> Recipe | None:
        options = {"granularity": self.granularity, "scaling": self.scaling}
        return recipe_of(self.format, options)

    def _problem(self, graph: Graph) -> Problem:
        """Everything that can be lowered; an analysis of the graph."""
        return find_problem(graph, FORMATS[self.format], frozenset())

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
