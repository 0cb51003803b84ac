"""What has been seen of flex tensors so far: overflow, NaN and bits in use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt.notices import warn
from graphopt.runtime.flexpoint.statistics import ELEMENTS, NANS, SATURATED

# Columns of the counters, int64: sums over steps, then steps in which a tensor was seen at all, and
# those in which it saturated.
_SEEN, _OVERFLOWED = ELEMENTS + 1, ELEMENTS + 2
COLUMNS = ELEMENTS + 3


def count(counters: Tensor, bits: Tensor, rows: Tensor, gamma: Tensor) -> None:
    """Add one step, in place.

    Args:
        counters: int64 [n, `COLUMNS`].
        bits: float64 [n]; sums of log2 Γ.
        rows: statistics, int64 [n, 4].
        gamma: Γ of each tensor, float64 [n]; 0 for tensors of zeros.
    """
    counters[:, SATURATED : ELEMENTS + 1] += rows[:, SATURATED : ELEMENTS + 1]
    counters[:, _SEEN] += gamma > 0
    counters[:, _OVERFLOWED] += rows[:, SATURATED] > 0
    bits += torch.log2(gamma.clamp(min=1.0))


def note(counters: Mapping[str, Tensor], bits: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Lines for the report; reads the counters from their device."""
    if not counters:
        return ()
    total = torch.cat([c.cpu() for c in counters.values()])
    sums = total.sum(0).tolist()
    spent = sum(float(b.sum()) for b in bits.values())
    lines = [
        f"flexpoint: {len(total)} tensors use {spent / max(1, sums[_SEEN]):.1f} bits beside the "
        f"sign; {_rate(sums[SATURATED], sums[ELEMENTS])} of elements saturated, in "
        f"{sums[_OVERFLOWED]} of {sums[_SEEN]} tensors and steps"
    ]
    if sums[NANS]:
        many = int((total[:, NANS] > 0).sum())
        lines.append(f"flexpoint: {sums[NANS]} NaN in {many} tensors became 0")
    return tuple(lines)


def _rate(part: int, whole: int) -> str:
    return f"{part / whole:.2g}" if part and whole else "none"


class Watch:
    """Warns once when NaN were rounded away.

    On a GPU the numbers are looked at when they have arrived by themselves, a step later.
    """

    def __init__(self) -> None:
        self._warned = False
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None

    def look(self, rows: Tensor, names: tuple[str, ...]) -> None:
        """Look at the statistics of a step.

        Args:
            rows: statistics, int64 [n, 4].
            names: of the tensors.
        """
        if self._warned:
            return
        found = rows[:, NANS]
        if found.device.type == "cuda":
            self._on_gpu(found, names)
        else:
            self._report(found, names)

    def _on_gpu(self, found: Tensor, names: tuple[str, ...]) -> None:
        if self._coming is not None and self._coming[1].query():  # type: ignore[no-untyped-call]
            self._report(self._coming[0], names)
            self._coming = None
        if self._coming is None:
            place = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            place.copy_(found, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._coming = place, event

    def _report(self, found: Tensor, names: tuple[str, ...]) -> None:
        wrong = [(int(n), name) for n, name in zip(found.tolist(), names, strict=True) if n]
        if wrong and not self._warned:
            self._warned = True
            number, name = wrong[0]
            others = f" and {len(wrong) - 1} other tensors" if len(wrong) > 1 else ""
            warn(
                f"flexpoint: {number} NaN in {name!r}{others} became 0, since integers have none; "
                "explain() counts them",
                RuntimeWarning,
            )
