"""Which gradients exist on any rank.

Where a model has several outputs and the loss uses only some of them, eager leaves the other
parameters' gradients alone. Another rank may use other outputs in the same step. A gradient that
any rank has is the mean over all ranks, with zeros for those without it; one that no rank has stays
absent. `DistributedDataParallel` does the same with ``find_unused_parameters=True``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.distributed as dist

from graphopt.plan import Plan, Role
from graphopt.runtime.ranks.channel import Waiting
from graphopt.runtime.ranks.ranks import Ranks

Await = Callable[[], Waiting]


class Presence:
    """Agrees on the reduced gradients that are absent everywhere.

    Args:
        plan: of the step.
        reduced: names of the gradients that are reduced.

    Attributes:
        names: the reduced gradients, sorted, since ranks that use their parameters in other orders
            list them in other orders.
        asks: whether a rank may lack a gradient that another one has; the same on all ranks, as
            their models are.
    """

    def __init__(self, plan: Plan, reduced: Collection[str]) -> None:
        grads = plan.signature.names(Role.GRAD)
        reach: Mapping[str, set[int]] = {
            name: set(sources)
            for name, sources in zip(grads, plan.gradient_sources, strict=True)
            if name in reduced
        }
        self.names = tuple(sorted(reach))
        self._never = {name for name, sources in reach.items() if not sources}
        everything = set().union(*reach.values())
        self.asks = any(sources and sources != everything for sources in reach.values())

    def ask(self, ranks: Ranks, present: Collection[str], waiting: Await) -> Question | None:
        """Start to find out who has what; ``None`` where all ranks have all gradients.

        One message of a byte per gradient, which travels while the backward computes.

        Args:
            ranks: who is asked.
            present: names of gradients that this rank has.
            waiting: makes the block in which one waits for the answer.
        """
        if not self.asks:
            return None
        bits = [name in present for name in self.names]
        return Question(ranks, torch.tensor(bits, dtype=torch.uint8).to(ranks.device), waiting)

    def absent(self, local: Collection[str], question: Question | None) -> set[str]:
        """Names of gradients that are absent: reduced ones only where no rank has them."""
        found = set(local) - set(self.names) | self._never
        if question is not None:
            answers = zip(self.names, question.answer(), strict=True)
            found |= {name for name, has in answers if not has}
        return found


class Question:
    """Bits on their way to their maximum over all ranks.

    Args:
        ranks: who is asked.
        bits: uint8 of one dimension, on the device of the ranks; overwritten.
        waiting: makes the block in which one waits for the answer.
    """

    def __init__(self, ranks: Ranks, bits: torch.Tensor, waiting: Await) -> None:
        self._bits, self._waiting = bits, waiting
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        with waiting():
            self._work = ranks.group.start(bits, options)

    def answer(self) -> list[int]:
        """Wait for the maxima."""
        with self._waiting():
            self._work.wait()
        found: list[int] = self._bits.tolist()
        return found
