"""How many micro-batches a step should have: two rules, and the record of what they changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rounding = Literal["powers", "whole"]


@dataclass(frozen=True)
class Change:
    """The size of a step has changed, or would have but for a limit.

    Attributes:
        step: optimizer steps done before it.
        epoch: whole epochs done before it.
        before: micro-batches in a step, until then.
        after: from then on; the same where a limit forbids a change.
        reason: what made it so, in words.
        limit: what kept it from more, in words; empty if nothing did.
    """

    step: int
    epoch: int
    before: int
    after: int
    reason: str
    limit: str = ""

    def __str__(self) -> str:
        what = f"{self.before} -> {self.after} micro-batches"
        why = f"{self.reason}; {self.limit}" if self.limit else self.reason
        return f"step {self.step} (epoch {self.epoch}): {what}, {why}"


def follow(now: int, wanted: float, *, hysteresis: float, rounding: Rounding) -> int:
    """The size for a step whose noise scale amounts to `wanted` micro-batches.

    Sizes are rounded down, so that a step has no more examples than the noise scale. It stays as it
    is while ``now / hysteresis < wanted < now * hysteresis``. With powers of two it also takes
    twice the size to grow, so a value near the limit between two of them does not flutter: it falls
    back at the limit over `hysteresis`.

    Args:
        now: micro-batches in a step, at least 1.
        wanted: at least 0; may be infinite.
        hysteresis: above 1.
        rounding: to powers of two, or to whole numbers.
    """
    if now / hysteresis < wanted < now * hysteresis:
        return now
    rounded = _round(wanted, rounding)
    if wanted > now:
        return max(now, rounded)
    return min(now, rounded)


def _round(wanted: float, rounding: Rounding) -> int:
    """Down, to 1 at least; a number beyond all batches stays one that can be counted."""
    whole = int(max(1.0, min(wanted, 2.0**31)))
    return whole if rounding == "whole" else 1 << (whole.bit_length() - 1)


def doubled(smallest: int, epochs: int, every: int) -> int:
    """AdaBatch (Devarakonda et al., arXiv 1712.02029): twice the size after each `every` epochs.

    Args:
        smallest: micro-batches in the first steps.
        epochs: done.
        every: epochs between two doublings, at least 1.
    """
    return smallest << min(epochs // every, 31)
