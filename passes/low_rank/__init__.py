"""Multiply with large weights in factors where that is faster and near enough."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.passbase import (
    Applied,
    Declined,
    Number,
    Numerics,
    Outcome,
    Pass,
    PassContext,
    lowered,
)
from graphopt.passes.low_rank.decide import Candidate, Decision, decide
from graphopt.passes.low_rank.rewrite import multiply_in_factors, with_factors, without_input
from graphopt.passes.low_rank.sites import Weight, find_weights, reader_name
from graphopt.structured import StructuredWeight, form_of
from graphopt.structured.weight import relative_error

# How much further off than a weight the results of a layer may be, relative to the largest of them.
AMPLIFIED = 10.0
# In units of the dtype's epsilon: what factors of a matrix can hold.
_REACHABLE = 8


@dataclass(frozen=True)
class LowRank(Pass):
    """Replace large weights by factors that are trained in their place.

    Each weight matrix that the forward only multiplies with is probed: flat low rank, Toeplitz,
    tiles (BLR), halves of halves (HODLR). A form is taken if the nearest matrix of its kind is
    within `tolerance` and a step of forward and backward is `gain` times faster in factors. Most
    weights have no such form and stay dense, each with the reason; operators with a geometry have
    one: mixing of tokens, smooth kernels, long convolutions.

    The factors become parameters of the model, under the name that `torch.nn.utils.parametrize`
    gives them; the weight is what they make. This happens once, in `optimize`, which therefore
    needs example inputs; an optimizer is made afterwards. `graphopt.dense_state_dict` and
    `load_dense_state_dict` convert. The forward graph is rewritten, and autograd derives the
    backward of the products in factors.

    Attributes:
        tolerance: largest error of a weight, relative to it, in the Frobenius norm.
        smallest: weights with a side below this are not probed.
        cost: ``measure`` times each form on this device, ``roofline`` assumes one.
        gain: how many times faster than dense a form has to be; 0 takes any form within the
            tolerance.
    """

    name: ClassVar[str] = "low_rank"
    levels: ClassVar[frozenset[str]] = frozenset({"forward"})
    changes_signature: ClassVar[bool] = True
    communicates: ClassVar[frozenset[str]] = frozenset({"dp"})
    symbolic: ClassVar[bool] = True
    source: ClassVar[str] = (
        "HODLR: Ambikasaran and Darve 2013; BLR: Amestoy et al. 2015; ranks: Halko et al. 2011"
    )

    tolerance: float = 1e-3
    smallest: int = 256
    cost: Literal["measure", "roofline"] = "measure"
    gain: float = 1.1

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ArgumentError(
                f"low_rank: tolerance={self.tolerance} is no relative error",
                hint="a number between 0 and 1, such as tolerance=0.001",
            )
        if self.smallest < 1 or self.gain < 0:
            raise ArgumentError(
                f"low_rank: smallest={self.smallest}, gain={self.gain}: one of them is too small",
                hint="smallest=256 and gain=1.1 are the defaults",
            )

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        """By the tolerance."""
        return lowered(AMPLIFIED * self.tolerance)

    def wants_parameters(self, model: nn.Module) -> bool:
        """Where it has not been before; a model that has factors keeps them."""
        return not any(isinstance(module, StructuredWeight) for module in model.modules())

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Multiply in factors, those that there are and those that are found."""
        weights, computed = find_weights(graph)
        declined = [_computed(node) for node in computed]
        before = ctx.decided.get(self.name)
        applied: list[Applied] = []
        dense: list[Weight] = []
        for weight in weights:
            if weight.structure is None:
                dense.append(weight)
            elif weight.other is not None:
                declined.append(_read_otherwise(weight))
            else:
                applied.append(_in_factors(graph, weight, before))
        if not ctx.parameters:
            said = {d.site for d in declined}
            declined += [d for d in _decided_before(dense, before) if d.site not in said]
            return Outcome(tuple(applied), tuple(declined), tables=before.tables if before else {})
        probed = []
        for weight in dense:
            reason = self._ruled_out(weight, ctx.parameters)
            if reason is None:
                probed.append(weight)
            else:
                declined.append(reason)
        decisions = self._decide(probed, ctx)
        parametrized: dict[str, nn.Module] = {}
        for decision in decisions:
            if decision.declined is not None:
                declined.append(decision.declined)
            if decision.chosen is not None:
                weight, chosen = decision.weight, decision.chosen
                applied.append(_applied(decision, chosen))
                factors = with_factors(graph, weight, chosen.form)
                multiply_in_factors(graph, weight, chosen.form, factors)
                without_input(graph, weight.node)
                parametrized[weight.name] = StructuredWeight(
                    chosen.form, self.tolerance, chosen.factors
                )
        rows = tuple(row for decision in decisions for row in decision.rows())
        return Outcome(
            tuple(applied),
            tuple(declined),
            tables={"weights": rows} if rows else {},
            parametrized=parametrized,
        )

    def _ruled_out(self, weight: Weight, parameters: Mapping[str, Tensor]) -> Declined | None:
        """Why a weight is not probed."""
        rows, cols = weight.value.shape
        if min(rows, cols) < self.smallest:
            detail = f"a side is below {self.smallest}"
            return Declined(weight.name, "small", detail, {"rows": rows, "cols": cols})
        if weight.other is not None:
            return _read_otherwise(weight)
        value = parameters.get(weight.name)
        if value is None:
            return Declined(weight.name, "unknown", "the model has no parameter of this name")
        return _unfit(weight.name, value, parameters)

    def _decide(self, weights: Sequence[Weight], ctx: PassContext) -> list[Decision]:
        """On rank 0 where there are several."""
        for weight in weights:
            self._check_tolerance(weight)
        ranks = ctx.ranks.get("dp")
        mine: list[Decision] = []

        def by_rank_0() -> str:
            options = {"tolerance": self.tolerance, "gain": self.gain, "cost": self.cost}
            values = ctx.parameters
            mine.extend(decide(w, values[w.name].detach(), **options) for w in weights)  # type: ignore[arg-type]
            forms = {
                d.weight.name: (d.chosen.form.name, d.chosen.form.sizes) for d in mine if d.chosen
            }
            return json.dumps(forms)

        if ranks is None:
            by_rank_0()
            return mine
        asked = "\n".join(f"{w.name} {list(w.value.shape)}" for w in weights)
        agreed = json.loads(ranks.agree("low_rank", f"{self}\n{asked}", by_rank_0))
        return mine or [_as_agreed(w, ctx.parameters[w.name].detach(), agreed) for w in weights]

    def _check_tolerance(self, weight: Weight) -> None:
        reachable = _REACHABLE * torch.finfo(weight.value.dtype).eps
        if self.tolerance < reachable:
            dtype = str(weight.value.dtype).removeprefix("torch.")
            raise ArgumentError(
                f"low_rank: tolerance={self.tolerance:g} is below what factors in {dtype} can "
                f"hold, which is {reachable:.2g}",
                where=weight.name,
                hint=f"tolerance={reachable:.2g} or more, or a model in a longer type",
            )


def _unfit(name: str, value: Tensor, parameters: Mapping[str, Tensor]) -> Declined | None:
    """What is against replacing a parameter."""
    others = [n for n, p in parameters.items() if p is value and n != name]
    if others:
        detail = f"it is {others[0]} too, and factors would untie them"
        return Declined(name, "tied", detail)
    if not value.is_floating_point():
        return Declined(name, "no-float", f"its type is {value.dtype}")
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        return Declined(name, "no-plain-tensor", f"it is a {type(value).__name__}")
    if value.is_meta:
        return Declined(name, "unknown", "it has no values yet")
    if value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None):
        return Declined(name, "hooked", "a hook waits for its gradient")
    broken = int((~value.isfinite()).sum())
    if broken:
        detail = "some of its values are not finite"
        return Declined(name, "not-finite", detail, {"values": broken})
    if not value.any():
        detail = "it is zero, so that its values say nothing about the weight it will be"
        return Declined(name, "zero", detail)
    return None


def _as_agreed(
    weight: Weight, value: Tensor, agreed: Mapping[str, tuple[str, Sequence[int]]]
) -> Decision:
    """Rank 0's decision on another rank, which gets rank 0's factors afterwards."""
    if weight.name not in agreed:
        declined = Declined(weight.name, "rank-0", "rank 0 has decided so; its report has figures")
        return Decision(weight, (), {}, None, declined)
    form = form_of(*agreed[weight.name])
    factors = form.factors(value)
    chosen = Candidate(form, factors, relative_error(form, factors, value))
    return Decision(weight, (chosen,), {form: 0.0}, chosen, None)


def _applied(decision: Decision, chosen: Candidate) -> Applied:
    rows, cols = decision.weight.value.shape
    numbers: dict[str, Number] = {
        "error": chosen.error,
        "memory": chosen.form.numbers / (rows * cols),
    }
    if None in decision.seconds:
        dense, form = decision.seconds[None], decision.seconds[chosen.form]
        numbers |= {"dense_ms": dense * 1e3, "form_ms": form * 1e3}
    return Applied(decision.weight.name, f"replaced by factors: {chosen.form}", numbers)


def _in_factors(graph: Graph, weight: Weight, before: Outcome | None) -> Applied:
    """Fuse what makes a weight of its factors with the products that read it."""
    form = weight.structure
    assert form is not None
    factors = weight.node.args[0]
    assert isinstance(factors, list | tuple)
    multiply_in_factors(graph, weight, form, [f for f in factors if isinstance(f, fx.Node)])
    known = {site.site: site.numbers for site in before.applied} if before else {}
    numbers = known.get(weight.name, {"memory": form.numbers / (form.rows * form.cols)})
    return Applied(weight.name, f"multiplied in factors: {form}", numbers)


def _read_otherwise(weight: Weight) -> Declined:
    detail = "something else than a product reads it"
    reader = reader_name(weight.other) if weight.other is not None else "nothing"
    return Declined(weight.name, "read-otherwise", f"{detail}: {reader}")


def _computed(node: fx.Node) -> Declined:
    detail = "its weight is computed in the forward, so that there is no parameter to replace"
    return Declined(node.name, "computed", detail)


def _decided_before(weights: Sequence[Weight], before: Outcome | None) -> list[Declined]:
    if before is not None:
        return list(before.declined)
    detail = "parameters are replaced in optimize only, once, where it is given example inputs"
    return [Declined(w.name, "not-probed", detail) for w in weights]
