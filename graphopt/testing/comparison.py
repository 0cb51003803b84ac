"""Two lists of outputs held against each other at a numerics class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import MismatchError
from graphopt.graph import Graph
from graphopt.passbase import Numerics
from graphopt.plan import Signature
from graphopt.testing.oracles import run_graph_fp64

# The relative error that float32 makes in a graph that does not amplify rounding: three roundings.
_ORDINARY_NOISE = 2e-7


def assert_same(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    numerics: Numerics,
    signature: Signature | None = None,
    amplification: Sequence[float] | None = None,
) -> None:
    """Accept `actual` in place of `expected` at a numerics class.

    Shapes and dtypes always agree; NaN equals NaN. ``"exact"`` wants bit-equality, ``"algorithm"``
    nothing else; between them the largest difference, relative to the largest finite magnitude of
    the expected output, stays within the bound; of an output that is 0 throughout, relative to that
    of all outputs, since what cancels exactly in one order of sums may not in another.

    Args:
        expected: the outputs that are right.
        actual: the outputs in question.
        numerics: how far they may be apart.
        signature: names the outputs in the message.
        amplification: factor on the bound, per output (`amplification_of`).

    Raises:
        MismatchError: names the worst output, its largest error and what was allowed.
    """
    if len(expected) != len(actual):
        raise MismatchError(f"{len(expected)} outputs were expected, there are {len(actual)}")
    names = [str(s) for s in signature.outputs] if signature else _numbered(expected)
    for name, want, have in zip(names, expected, actual, strict=True):
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            raise MismatchError(
                f"{name} has shape {tuple(have.shape)} and dtype {have.dtype} instead of "
                f"{tuple(want.shape)} and {want.dtype}"
            )
    if numerics.kind == "algorithm":
        return
    unit = max((_magnitude(value) for value in expected), default=0.0)
    factors = amplification or [1.0] * len(expected)
    differences = [
        _Difference(name, want, have, unit, 0.0 if not numerics.bound else numerics.bound * factor)
        for name, want, have, factor in zip(names, expected, actual, factors, strict=True)
        if not _bit_equal(want, have)
    ]
    excessive = [d for d in differences if numerics.kind == "exact" or d.error > d.allowed]
    if excessive:
        worst = max(excessive, key=lambda d: d.error)
        raise MismatchError(
            f"{worst.name} is off by {worst.error:.3g} of its largest magnitude; "
            f"{numerics} allows {worst.allowed:.3g}"
            + (f" (and {len(excessive) - 1} more)" if len(excessive) > 1 else ""),
            where=worst.place,
        )


def relative_error(expected: Tensor, actual: Tensor, unit: float = 0.0) -> float:
    """The largest difference, relative to the largest finite magnitude of `expected`, or to `unit`.

    `unit` is for values that are 0 throughout. Infinite where one of them is NaN or infinite and
    the other differs from it.
    """
    if not expected.numel():
        return 0.0
    want, have = (_comparable(value) for value in (expected, actual))
    finite = torch.isfinite(want) & torch.isfinite(have)
    if not bool((finite | _equal(want, have)).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = float((want - have)[finite].abs().max())
    scale = float(want[finite].abs().max()) or unit
    return difference / scale if scale else (float("inf") if difference else 0.0)


def amplification_of(
    graph: Graph, inputs: Sequence[Any], outputs: Sequence[Tensor], seed: int = 0
) -> list[float]:
    """How much more than usual a graph amplifies rounding, per output; at least 1.

    A batch norm over equal values, say, turns rounding errors into results, and then no rewrite
    that touches rounding stays within a bound made for ordinary graphs. Measured as the error of
    `outputs` against double precision.
    """
    exact = run_graph_fp64(graph, inputs, seed)
    noise = [relative_error(e, value) for e, value in zip(exact, outputs, strict=True)]
    return [max(1.0, error / _ORDINARY_NOISE) for error in noise]


def _magnitude(value: Tensor) -> float:
    """The largest finite magnitude."""
    known = _comparable(value)
    known = known[torch.isfinite(known)]
    return float(known.abs().max()) if known.numel() else 0.0


@dataclass(frozen=True)
class _Difference:
    name: str
    want: Tensor
    have: Tensor
    unit: float
    allowed: float

    @property
    def error(self) -> float:
        return relative_error(self.want, self.have, self.unit)

    @property
    def place(self) -> str:
        index = torch.nonzero(~_equal(self.want, self.have))[0].tolist()
        want, have = (value[tuple(index)].item() for value in (self.want, self.have))
        return f"{self.name} at {index}: {want!r} expected, {have!r} found"


def _numbered(outputs: Sequence[Tensor]) -> list[str]:
    return [f"output {index}" for index in range(len(outputs))]


def _comparable(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128 if value.dtype.is_complex else torch.float64)


def _equal(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (torch.isnan(one) & torch.isnan(other))


def _bit_equal(one: Tensor, other: Tensor) -> bool:
    return bool(_equal(one, other).all())
