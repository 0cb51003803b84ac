"""How the exponents of all flex tensors follow from their statistics.

For the units ``2^E`` of n tensors and their largest magnitudes A since the last renewal, with
``M = 2^(N-1) - 1`` for N bits of mantissa and ``Γ = min(round(A / 2^E), M)``:

- `paper`, Algorithm 2 of Köster et al. (arXiv 1711.02213). Where Γ reaches M, the queue is cleared
  and Γ doubled. ``Γ 2^E`` joins the queue of the last 16, and the next unit is
  ``2^(ceil(log2 χ) - N + 1)`` for ``χ = 2 (max + 3 std + 100 2^E)``.
- `code2016`, as in the code from which neon's Flexpoint came: ``χ = max + 3 std + 100 2^E`` and the
  unit ``2^(floor(log2 χ) - N + 2)``. A tensor that was seen in fewer than 1 of 16 renewals takes
  ``χ = max of its last two + 2^12 2^E``.
- `delayed`, as in Transformer Engine: the least unit that holds the largest A of the last 1024,
  without margin, as a power of two.
- `current` predicts nothing: the exponent stays unknown, so the operator looks at the tensor.

Deviations are of one pass over the queue. A tensor of zeros says nothing about its size: its
exponent and queue stay as they are. Every rule is a function of vectors on their device, without
synchronisation; numbers are float64, in which maxima, sums and powers of two here are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ops.flex import UNKNOWN, chosen_exponent, largest_mantissa

ALPHA, BETA, GAMMA = 2.0, 3.0, 100.0
STALE_OFFSET, STALE_SHARE = 2.0**12, 1 / 16


@dataclass(frozen=True)
class Limits:
    """The format.

    Attributes:
        mantissa: N, sign included.
        least: smallest exponent.
        most: largest one.
    """

    mantissa: int
    least: int
    most: int


@dataclass(frozen=True)
class History:
    """What a rule looks at; one row per tensor.

    Attributes:
        queue: float64 [n, length]; what was appended, in a ring.
        lengths: int64 [n]; how often that was done since the queue was cleared, at least 1.
        unit: float64 [n]; ``2^E``.
        seen: float64 [n]; share of all renewals in which the tensor was not zero.
        limits: of the format.
    """

    queue: Tensor
    lengths: Tensor
    unit: Tensor
    seen: Tensor
    limits: Limits

    @property
    def filled(self) -> Tensor:
        """Which places of the ring are in use; bool [n, length]."""
        places = torch.arange(self.queue.shape[1], device=self.queue.device)
        return places < self.lengths[:, None]

    def largest(self) -> Tensor:
        """Maximum of each queue."""
        return torch.where(self.filled, self.queue, 0.0).amax(1)

    def deviation(self) -> Tensor:
        """Standard deviation of each queue, of the whole population."""
        count = self.filled.sum(1).double()
        mean = torch.where(self.filled, self.queue, 0.0).sum(1) / count
        squares = torch.where(self.filled, self.queue - mean[:, None], 0.0).square().sum(1)
        return (squares / count).sqrt()

    def last(self, before: int) -> Tensor:
        """What was appended last but so many; 0 where that was not."""
        place = (self.lengths - 1 - before).clamp(min=0) % self.queue.shape[1]
        found = self.queue.gather(1, place[:, None])[:, 0]
        return torch.where(self.lengths > before, found, 0.0)


def _log2(value: Tensor, *, up: bool) -> Tensor:
    """Floor or ceiling of the logarithm of positive numbers, from their bits."""
    fraction, exponent = torch.frexp(value)
    return exponent - (fraction == 0.5).int() if up else exponent - 1


def _paper(history: History) -> Tensor:
    spread = history.largest() + BETA * history.deviation() + GAMMA * history.unit
    return _log2(ALPHA * spread, up=True) - history.limits.mantissa + 1


def _code2016(history: History) -> Tensor:
    spread = history.largest() + BETA * history.deviation() + GAMMA * history.unit
    stale = torch.maximum(history.last(0), history.last(1)) + STALE_OFFSET * history.unit
    spread = torch.where(history.seen < STALE_SHARE, stale, spread)
    return _log2(spread, up=False) - history.limits.mantissa + 2


def _delayed(history: History) -> Tensor:
    return chosen_exponent(bits_of(history.largest()), history.limits.mantissa)


def _current(history: History) -> Tensor:
    return torch.full_like(history.lengths, UNKNOWN)


@dataclass(frozen=True)
class Rule:
    """One way to predict.

    Attributes:
        length: of the queues.
        clipped: whether it sees Γ, with what follows from its overflow, or the magnitude itself.
        exponent: the next exponents, where they are not limited.
    """

    length: int
    clipped: bool
    exponent: Callable[[History], Tensor]


RULES: Mapping[str, Rule] = {
    "paper": Rule(16, True, _paper),
    "code2016": Rule(16, True, _code2016),
    "delayed": Rule(1024, False, _delayed),
    "current": Rule(1, False, _current),
}
"""By name."""


@dataclass(frozen=True)
class Memory:
    """What all tensors of a step keep; changed in place by `renew`.

    Attributes:
        exponents: int32 [n]; `UNKNOWN` before the first renewal that saw the tensor.
        queue: float32 [n, length]; a ring.
        lengths: int64 [n]; what was appended since the queue was cleared.
        seen: int64 [n]; in how many renewals the tensor was not zero.
        renewals: int64 []; how many there were.
    """

    exponents: Tensor
    queue: Tensor
    lengths: Tensor
    seen: Tensor
    renewals: Tensor


def mantissas(amax: Tensor, exponents: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Γ, clipped, and the unit of each tensor, float64.

    Args:
        amax: largest magnitudes as the bits of float32, int32 [n].
        exponents: int32 [n]; of unknown ones it is that of the tensor itself, within the limits.
        limits: of the format.
    """
    own = chosen_exponent(amax, limits.mantissa).clamp(limits.least, limits.most)
    used = torch.where(exponents == UNKNOWN, own, exponents)
    unit = torch.ldexp(torch.ones_like(used, dtype=torch.float64), used)
    largest = float(largest_mantissa(limits.mantissa))
    return (value_of(amax) / unit).round().clamp(max=largest), unit


@torch.no_grad()
def renew(rule: Rule, memory: Memory, amax: Tensor, limits: Limits) -> None:
    """Predict the exponents of the next step.

    Args:
        rule: how.
        memory: what the tensors keep.
        amax: largest magnitudes as the bits of float32, int32 [n]; 0 for tensors of zeros.
        limits: of the format.
    """
    is_there = amax > 0
    gamma, unit = mantissas(amax, memory.exponents, limits)
    memory.renewals.add_(1)
    memory.seen.add_(is_there)
    value, lengths = value_of(amax), memory.lengths
    if rule.clipped:
        overflow = gamma >= largest_mantissa(limits.mantissa)
        value = gamma * (1.0 + overflow.double()) * unit
        lengths = torch.where(overflow, 0, lengths)
    place = (lengths % rule.length)[:, None]
    before = memory.queue.gather(1, place)
    appended = torch.where(is_there[:, None], value[:, None].float(), before)
    memory.queue.scatter_(1, place, appended)
    memory.lengths.copy_(torch.where(is_there, lengths + 1, memory.lengths))
    history = History(
        memory.queue.double(),
        memory.lengths.clamp(min=1),
        unit,
        memory.seen.double() / memory.renewals.double(),
        limits,
    )
    following = rule.exponent(history)
    limited = following.clamp(limits.least, limits.most)
    following = torch.where(following == UNKNOWN, following, limited)
    memory.exponents.copy_(torch.where(is_there, following, memory.exponents))


def value_of(bits: Tensor) -> Tensor:
    """Float32 numbers from their bits, as float64."""
    return bits.to(torch.int32).view(torch.float32).double()


def bits_of(values: Tensor) -> Tensor:
    """Bits of numbers that are float32 ones."""
    return values.float().view(torch.int32)
