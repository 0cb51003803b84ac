"""For one weight: which form, if any, and the figures behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.passbase import Declined, Number, Row
from graphopt.passes.low_rank.candidates import forms_within
from graphopt.passes.low_rank.sites import Weight
from graphopt.passes.low_rank.times import Times, assumed_times, measured_times
from graphopt.structured import Form
from graphopt.structured.truncate import LARGE
from graphopt.structured.weight import relative_error

# Rounding that factors of a form may add to its error, as a share of the tolerance.
_SLACK = 1e-3
# Forms of each kind that are timed: a roofline knows little about many small products.
TIMED = 3


@dataclass(frozen=True)
class Candidate:
    """A form that comes near enough to a weight.

    Attributes:
        form: the form.
        factors: those nearest to the weight, in its dtype.
        error: of their product, relative to the weight, in the Frobenius norm.
    """

    form: Form
    factors: tuple[Tensor, ...]
    error: float


@dataclass(frozen=True)
class Decision:
    """What becomes of one weight.

    Attributes:
        weight: which one.
        candidates: forms within the tolerance.
        seconds: of forward and backward, by form; None is dense.
        chosen: the fastest, if it is faster than dense by what was asked for.
        declined: why it stays dense otherwise.
    """

    weight: Weight
    candidates: tuple[Candidate, ...]
    seconds: Times
    chosen: Candidate | None
    declined: Declined | None

    def rows(self) -> list[Row]:
        """The rows of the table: dense, and each candidate."""
        rows, cols = self.weight.value.shape
        reason = self.declined.reason if self.declined else "slower than another form"
        dense = self.seconds.get(None)
        found: list[Row] = [
            _row(
                self.weight.name, "dense", dense, 0.0, rows * cols, "" if self.chosen else "chosen"
            )
        ]
        for c in self.candidates:
            why = "chosen" if c is self.chosen else reason
            found.append(
                _row(
                    self.weight.name,
                    str(c.form),
                    self.seconds[c.form],
                    c.error,
                    c.form.numbers,
                    why,
                )
            )
        return found


def _row(
    site: str, form: str, seconds: float | None, error: float, numbers: int, why: str
) -> dict[str, Number | None]:
    return {
        "site": site,
        "form": form,
        "seconds": seconds,
        "error": error,
        "numbers": numbers,
        "why": why,
    }


def decide(weight: Weight, value: Tensor, *, tolerance: float, gain: float, cost: str) -> Decision:
    """Probe one weight.

    Args:
        weight: where it is used.
        value: its values.
        tolerance: largest relative error of the weight.
        gain: how many times faster than dense a form has to be.
        cost: ``"measure"`` or ``"roofline"``.
    """
    size = value.numel()
    # A form of as many numbers reads as much and multiplies as often.
    most = float("inf") if gain == 0 else size / max(gain, 1.0)
    forms = list(forms_within(value, tolerance, most))
    found = _nearest(weight, value, forms, tolerance, TIMED if cost == "measure" else 1)
    if not found:
        return Decision(
            weight, (), assumed_times(weight, ()), None, _full(weight, value, tolerance, most)
        )
    if cost == "measure":
        seconds = measured_times(weight, value, {c.form: c.factors for c in found})
    else:
        seconds = assumed_times(weight, [c.form for c in found])
    best = min(found, key=lambda c: seconds[c.form])
    ratio = seconds[None] / seconds[best.form]
    if ratio >= gain:
        return Decision(weight, tuple(found), seconds, best, None)
    detail = f"its nearest rival, {best.form}, is not {gain:g} times faster"
    numbers: dict[str, Number] = {
        "dense_ms": seconds[None] * 1e3,
        "form_ms": seconds[best.form] * 1e3,
        "error": best.error,
    }
    declined = Declined(weight.name, "dense-is-faster", detail, numbers)
    return Decision(weight, tuple(found), seconds, None, declined)


def _nearest(
    weight: Weight, value: Tensor, forms: Sequence[Form], tolerance: float, count: int
) -> list[Candidate]:
    """Of each kind of form the first ones by a roofline, with factors that keep the bound."""
    assumed = assumed_times(weight, forms)
    kinds: dict[str, list[Form]] = {}
    for form in forms:
        kinds.setdefault(form.name, []).append(form)
    found = []
    for same in kinds.values():
        kept = 0
        for form in sorted(same, key=lambda f: assumed[f]):
            if kept == count:
                break
            factors = form.factors(value)
            error = relative_error(form, factors, value)
            if error <= tolerance * (1 + _SLACK):
                found.append(Candidate(form, factors, error))
                kept += 1
    return found


def _full(weight: Weight, value: Tensor, tolerance: float, most: float) -> Declined:
    """No form is near enough: how near the largest flat rank is that has fewer numbers."""
    rows, cols = value.shape
    rank = int(min(rows, cols, most // (rows + cols)))
    numbers: dict[str, Number] = {"rank": rank, "error": _best_error(value.double(), rank)}
    above = "at least " if min(rows, cols) >= LARGE else ""
    detail = (
        f"no form with fewer numbers is within {tolerance:g}: at rank {rank} the error is "
        f"{above}{numbers['error']:.2g}"
    )
    return Declined(weight.name, "full-rank", detail, numbers)


def _best_error(value: Tensor, rank: int) -> float:
    """Of a flat low rank, relative; of large matrices a lower bound (`truncate.out_of_reach`)."""
    total = float(torch.linalg.norm(value)) ** 2
    if not total:
        return 0.0
    if min(value.shape) < LARGE:
        return math.sqrt(float(torch.linalg.svdvals(value)[rank:].square().sum()) / total)
    gram = float(torch.linalg.norm(value @ value.mT))
    return math.sqrt(max(0.0, 1 - math.sqrt(rank) * gram / total))
