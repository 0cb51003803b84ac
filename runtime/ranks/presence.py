"""Which gradients exist on any rank.

Where a model has several outputs and the loss uses only some of them, eager leaves the other
parameters' gradients alone. Another rank may use other outputs in the same step. A gradient that
any rank has is the mean over all ranks, with zeros for those without it; one that no rank has stays
absent. `DistributedDataParallel` does the same with ``find_unused_parameters=True``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from graphopt.plan import Plan, Role, Slot
from graphopt.runtime.ranks.channel import Channel


class Presence:
    """Agrees on the reduced gradients of one plan that are absent everywhere.

    Args:
        plan: what to obey; without a grouping, all gradients of parameters are reduced.
        returned: the outputs of its backward.

    Attributes:
        names: the reduced gradients by their position among the outputs of the backward.
        asks: whether ranks can differ at all: some gradient depends on some tangents and not on
            others. Equal on all ranks, because their models are.
    """

    def __init__(self, plan: Plan, returned: Sequence[Slot]) -> None:
        grouped = set(plan.signature.names(Role.PARAM))
        if plan.grouping is not None:
            grouped = {name for group in plan.grouping.groups for name in group.names}
        grads = {i: s.name for i, s in enumerate(returned) if s.role is Role.GRAD}
        self.names = {i: name for i, name in grads.items() if name in grouped}
        named = zip(grads.values(), plan.gradient_sources, strict=True)
        reach = [set(sources) for name, sources in named if name in grouped and sources]
        self._never = {
            i
            for i, sources in zip(grads, plan.gradient_sources, strict=True)
            if i in self.names and not sources
        }
        # A result of the step before belongs to no tangent of this step: it is never absent.
        self.asks = plan.stale == "none" and any(r != set().union(*reach) for r in reach)

    def present(self, absent: Collection[int]) -> set[str]:
        """Names of reduced gradients that this rank has."""
        return {name for i, name in self.names.items() if i not in absent}

    def ask(
        self, line: Channel, absent: Collection[int], also: Collection[str], device: torch.device
    ) -> _Question | None:
        """Start to find out who has what; ``None`` where all ranks have all gradients.

        One message of a byte per gradient, which travels while the backward computes.

        Args:
            line: the ranks.
            absent: positions of gradients that this rank lacks in this backward.
            also: names of gradients that it has from earlier ones.
            device: where messages lie.
        """
        if not self.asks:
            return None
        bits = [i not in absent or name in also for i, name in self.names.items()]
        return _Question(line, torch.tensor(bits, dtype=torch.uint8).to(device))

    def absent(self, local: Collection[int], question: _Question | None) -> set[int]:
        """Positions of gradients that are absent: reduced ones only where no rank has them."""
        found = {i for i in local if i not in self.names} | self._never
        if question is not None:
            found |= {i for i, has in zip(self.names, question.answer(), strict=True) if not has}
        return found


class _Question:
    """A bit per gradient on its way, reduced to its maximum over all ranks."""

    def __init__(self, line: Channel, bits: torch.Tensor) -> None:
        self._line, self._bits = line, bits
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX  # type: ignore[assignment]
        self._work = line.start(bits, 0, options)

    def answer(self) -> list[int]:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._line.failure(0, error) from error
        found: list[int] = self._bits.tolist()
        return found
