"""What a step computed, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.passbase import Numerics

# Numbers that are compared at once, in double precision.
PART = 1 << 18


@dataclass(frozen=True)
class Observed:
    """What one step computed.

    Attributes:
        values: by name, every output, gradient and buffer, and whatever other tensors were written.
        parameters: by the same names, all of them, and other tensors that could be written.
        streams: where the step left the random streams, by name.
        moved: names of those that it moved.
    """

    values: Mapping[str, Tensor | None]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    streams: Mapping[str, object] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()

    def get(self, name: str) -> Tensor | None:
        """One value; a parameter that was not written has the one it had."""
        return self.values.get(name, self.parameters.get(name))


@dataclass(frozen=True)
class Difference:
    """How far one value of two observations is off.

    Attributes:
        name: of the value.
        error: largest difference relative to the largest magnitude of the reference; infinite for
            what has no magnitude (another shape, integers).
        absolute: largest difference; of integers the share that differs.
    """

    name: str
    error: float
    absolute: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether everything was bit-equal."""
        return self.error == 0.0


def compare(reference: Observed, actual: Observed) -> Difference:
    """The value that differs most, relative to the largest magnitude of its reference.

    A value that one side lacks, or a NaN that only one side has, differs infinitely.
    """
    return max(differences(reference, actual), key=lambda d: d.error, default=Difference("", 0.0))


def differences(reference: Observed, actual: Observed) -> list[Difference]:
    """All values that are not bit-equal."""
    found = []
    for name in sorted(reference.values.keys() | actual.values.keys()):
        error, absolute = _error(reference.get(name), actual.get(name))
        if error > 0:
            found.append(Difference(name, error, absolute))
    return found


def tolerance(observed: Observed, numerics: Numerics) -> float:
    """Largest allowed relative error between two runs that should agree at `numerics`.

    Eager itself is not always reproducible to the last bit (atomics on GPUs), so even an exact
    rewrite is refused only beyond what rounding in the coarsest dtype of the step explains.
    """
    floats = [v.dtype for v in observed.values.values() if v is not None and v.is_floating_point()]
    eps = max((torch.finfo(d).eps for d in floats), default=0.0)
    return max(numerics.bound, 1e3 * eps if eps < 1e-3 else 8 * eps)


def tolerance_of_pass(observed: Observed, numerics: Numerics) -> float:
    """Largest allowed relative error between a graph and what a pass made of it.

    On a CPU the same operators give the same bits, so a pass gets exactly the bound of its class.
    On a GPU eager itself differs from run to run (atomics).
    """
    on_gpu = any(value is not None and value.is_cuda for value in observed.values.values())
    return tolerance(observed, numerics) if on_gpu else numerics.bound


def _error(reference: Tensor | None, actual: Tensor | None) -> tuple[float, float]:
    """Relative and absolute difference."""
    infinite = float("inf"), float("inf")
    if reference is None or actual is None:
        return (0.0, 0.0) if reference is actual else infinite
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return infinite
    if reference.layout is not actual.layout:
        return infinite
    if same(reference, actual):
        return 0.0, 0.0
    if reference.layout is not torch.strided:
        reference, actual = reference.to_dense(), actual.to_dense()
    if not (reference.is_floating_point() or reference.is_complex()):
        return float("inf"), float((reference != actual).double().mean())
    wide = torch.complex128 if reference.is_complex() else torch.float64
    difference, scale = torch.zeros((), dtype=torch.float64), 0.0
    parts = (torch.split(t.reshape(-1), PART) for t in (reference, actual))
    for part, other in zip(*parts, strict=True):
        a, b = part.to(wide), other.to(wide)
        alike = (a == b) | (a.isnan() & b.isnan())
        # Of a NaN on one side `maximum` makes NaN, unlike Python's `max`.
        difference = torch.maximum(difference, torch.where(alike, 0.0, (a - b).abs()).max().cpu())
        scale = max(scale, torch.where(a.isfinite(), a.abs(), 0.0).max().item())
    absolute = difference.item()
    error = absolute / scale if scale > 0 else absolute
    # NaN in one and not the other compares unequal with everything.
    return (error, absolute) if error == error else infinite


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal, with NaN equal to NaN; on the meta device there are no bits."""
    if a.is_meta or b.is_meta:
        return a.device == b.device and a.shape == b.shape and a.dtype == b.dtype
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout is b.layout and same(a.to_dense(), b.to_dense())
    return bool(torch.equal(a, b) or (a.is_floating_point() and _nan_equal(a, b)))


def _nan_equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
