"""Which forms of a step were compared with what they stand for, and what was found.

The comparison with eager runs one form of each half, alone. Forms that send messages, add up
micro-batches or compute statistics run later, in real steps: the part that makes them compares each
with the forms it is made of when it first runs, and in every sampled step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from graphopt.errors import MismatchError

# Relative to the largest magnitude, in units of rounding.
UNITS, UNITS_OF_SHORT = 1e3, 8.0
# What generated code may be off by, and what is noise beside the largest gradient of a step.
GENERATED, NOISE = 1e-3, 1e-4


@dataclass(frozen=True)
class Form:
    """One form of a step, and how its comparison came out.

    Attributes:
        part: the method that makes it.
        name: of the form, in words.
        result: ``"bit-equal"``, ``"within tolerance"``, ``"mismatch"``, ``"not run yet"``, or
            ``"not compared"``.
        reason: why it is not compared, or what was wrong.
        step: in which step it was last compared.
        worst_name: the gradient that was farthest off, in all steps.
        worst_error: relative to its largest magnitude.
        times: how often it was compared.
    """

    part: str
    name: str
    result: str = "not run yet"
    reason: str = ""
    step: int = 0
    worst_name: str = ""
    worst_error: float = 0.0
    times: int = 0


@dataclass
class Validation:
    """What compares the forms of one model.

    Args:
        on_mismatch: ``"raise"``; otherwise the step falls back on the forms that were compared.
        every: after so many steps forms are compared again; 0 for never.
        warn: tells the user, at the line that has called.

    Attributes:
        forms: by part and name.
        sampled: after how many steps calls were compared with eager last.
    """

    on_mismatch: str
    every: int
    warn: Callable[[str], None]
    forms: dict[tuple[str, str], Form] = field(default_factory=dict)
    sampled: int = 0

    def copy(self) -> Validation:
        """For a copy of the model, which has compared nothing yet."""
        return Validation(self.on_mismatch, self.every, self.warn)

    def expect(self, part: str, name: str, unless: str = "") -> None:
        """Know of a form.

        Args:
            part: the method that makes it.
            name: of the form.
            unless: why it cannot be compared; empty where it can.
        """
        result = "not compared" if unless else "not run yet"
        self.forms.setdefault((part, name), Form(part, name, result, unless))

    def due(self, steps: int) -> bool:
        """Whether the step after so many is one of those that are sampled."""
        return bool(self.every and steps and steps % self.every == 0)

    def wants(self, part: str, name: str, steps: int) -> bool:
        """Whether a form has to be compared in the step after so many."""
        form = self.forms.get((part, name))
        return form is None or form.result == "not run yet" or self.due(steps)

    def distrusts(self, part: str, name: str) -> bool:
        """Whether a form was found wrong, so that it does not run any more."""
        form = self.forms.get((part, name))
        return form is not None and form.result == "mismatch"

    def found(self, part: str, name: str, step: int, worst: str, error: float) -> None:
        """Note a form that was as it should be."""
        before = self.forms.get((part, name), Form(part, name))
        if error < before.worst_error:
            worst, error = before.worst_name, before.worst_error
        result = "within tolerance" if error else "bit-equal"
        self.forms[part, name] = replace(
            before,
            result=result,
            step=step,
            worst_name=worst if error else "",
            worst_error=error,
            times=before.times + 1,
        )

    def wrong(self, error: MismatchError, part: str, name: str, step: int, instead: str) -> None:
        """Note a form that is wrong.

        Args:
            error: says so.
            part: the method that makes it.
            name: of the form.
            step: in which it was compared.
            instead: what runs from now on.

        Raises:
            MismatchError: the one that was given, unless the step may fall back.
        """
        before = self.forms.get((part, name), Form(part, name))
        if self.on_mismatch == "raise":
            raise error
        self.forms[part, name] = replace(
            before, result="mismatch", reason=error.message, step=step, times=before.times + 1
        )
        self.warn(f"{instead} from now on (on_mismatch={self.on_mismatch!r}): {error}")


def rounding(tensors: Mapping[str, Tensor], *, generated: bool = False) -> float:
    """The relative error that rounding explains between two orders of the same sums.

    Args:
        tensors: what is compared.
        generated: whether code was generated for them, or runs on a GPU, with orders of its own.
    """
    floats = [t.dtype for t in tensors.values() if t.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    allowed = UNITS * eps if eps < 1e-3 else UNITS_OF_SHORT * eps
    return max(allowed, GENERATED) if generated else allowed


def error_of(reference: Tensor, actual: Tensor | None, scale: float) -> float:
    """The largest difference, relative to a magnitude; infinite where only one side is finite."""
    if actual is None or actual.shape != reference.shape:
        return float("inf")
    a, b = reference.double(), actual.double()
    alike = (a == b) | (a.isnan() & b.isnan())
    difference = float(torch.where(alike, 0.0, (a - b).abs()).max()) if a.numel() else 0.0
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else difference


def magnitude(tensor: Tensor) -> float:
    """The largest finite absolute value."""
    finite = torch.where(tensor.isfinite(), tensor.abs(), torch.zeros_like(tensor))
    return float(finite.max()) if tensor.numel() else 0.0
