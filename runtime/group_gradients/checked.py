"""Reduced gradients against the mean over ranks of what each rank computes alone.

What reduces has shares in one buffer, sums in the order of a collective, scales, and a narrow wire.
The mean has none of these: each gradient is sent on its own, in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import MismatchError
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.group_gradients.messages import Means, Messages
from graphopt.runtime.session import Session
from graphopt.runtime.validation import NOISE, Validation, error_of, magnitude, rounding

# Relative errors that a wire may make, for each contribution.
_OF_WIRE = {"native": 0.0, "bf16": 2**-7, "int32": 2**-20}

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Worst:
    """The gradient that is farthest off on any rank.

    Attributes:
        error: relative to the largest magnitude on any rank.
        name: of the gradient.
        ranks: those with an error that is not allowed.
        finite: whether all gradients are.
    """

    error: float
    name: str
    ranks: tuple[int, ...]
    finite: bool


class Checked:
    """Compares what one part has reduced.

    Args:
        session: of the model.
        messages: carries what the graph sends.
        part: what was obeyed.
        backend: what has run the graph.
    """

    def __init__(
        self, session: Session, messages: Messages, part: Reduction, backend: str = "eager"
    ) -> None:
        self._session, self._messages, self._part = session, messages, part
        self._backend = backend

    def validation(self) -> Validation | None:
        """What notes the results; ``None`` where nothing is compared now."""
        # Who joins with unequally many steps sends what the others send, and no more.
        return None if self._messages.joining is not None else self._session.validation

    def wants(self, name: str) -> bool:
        """Whether a form is compared in this step; the same on all ranks."""
        validation = self.validation()
        return validation is not None and validation.wants(
            self._part.name, name, self._session.steps
        )

    def distrusts(self, name: str) -> bool:
        """Whether a form was found wrong."""
        validation = self._session.validation
        return validation is not None and validation.distrusts(self._part.name, name)

    def check(
        self,
        name: str,
        local: Gradients,
        found: Mapping[str, Tensor | None],
        in_eager: Callable[[], Mapping[str, Tensor | None]] | None = None,
        mean: Means | None = None,
    ) -> Gradients | None:
        """Compare, on all ranks at the same time.

        Args:
            name: of the form.
            local: this rank's gradients, over all micro-batches.
            found: what was reduced.
            in_eager: reduces once more, by eager's kernels, to tell a backend from the form.
            mean: over ranks, where it is known: it is that of an earlier step.

        Returns:
            What takes the place of wrong gradients, where the step falls back.

        Raises:
            MismatchError: the form is wrong on some rank; on all of them.
            RankError: a rank does not answer.
        """
        validation = self._session.validation
        assert validation is not None
        step = self._session.steps + 1
        worst = self._worst(local, found, mean)
        if not worst.ranks:
            if worst.finite:
                validation.found(self._part.name, name, step, worst.name, worst.error)
            return None
        guilty = f"part {self._part.name}"
        by_code = in_eager is not None and self._backend != "eager"
        if by_code and in_eager and not self._worst(local, in_eager(), mean).ranks:
            guilty = f"backend {self._backend}"
        kind, _, who = guilty.partition(" ")
        ranks = ", ".join(map(str, worst.ranks))
        error = MismatchError(
            f"{'the runtime part' if kind == 'part' else kind} {who!r} reduces wrongly in step "
            f"{step} ({name}): the gradient of {worst.name} on rank {ranks} is not the mean over "
            f"ranks, by a relative error of {worst.error:.2g}",
            hint="report it; on_mismatch='warn' sends each gradient on its own instead",
            guilty=guilty,
        )
        validation.wrong(
            error, self._part.name, name, step, f"{name}: each gradient is reduced on its own"
        )
        return dict(mean.values) if mean is not None else self.means(local)

    def means(self, local: Gradients) -> dict[str, Tensor]:
        """The mean over ranks of each gradient.

        Raises:
            RankError: a rank does not answer.
        """
        return {name: self._mean(local[name]).to(local[name].dtype) for name in sorted(local)}

    def expected(self, local: Gradients) -> Means:
        """What a later step has to return of these gradients; all ranks ask at the same time."""
        return Means(self.means(local), self._scales(local))

    def _scales(self, local: Gradients) -> dict[str, float]:
        """The largest magnitude of each gradient on any rank."""
        names = sorted(local)
        scales = torch.tensor([magnitude(local[n]) for n in names], dtype=torch.float64)
        scales = scales.to(self._messages.ranks.device)
        self._sum(scales, maximum=True)
        return dict(zip(names, map(float, scales), strict=True))

    def _mean(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().double().contiguous()
        total = total.clone() if total is tensor else total
        self._sum(total)
        return total.div_(self._messages.ranks.size)

    def _sum(self, tensor: Tensor, maximum: bool = False) -> None:
        options = dist.AllreduceOptions()
        if maximum:
            options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
        with self._messages.waiting():
            self._messages.ranks.group.inner.allreduce([tensor], options).wait()

    def _worst(
        self, local: Gradients, found: Mapping[str, Tensor | None], mean: Means | None
    ) -> Worst:
        names = sorted(local if mean is None else mean.values)
        device = self._messages.ranks.device
        generated = self._backend != "eager" or device.type != "cpu"
        allowed = max(rounding(local, generated=generated), _OF_WIRE[self._part.wire])
        largest = self._scales(local) if mean is None else mean.scales
        floor = NOISE * max(largest.values(), default=0.0) if generated else 0.0
        mine, place, finite = 0.0, 0, True
        for index, name in enumerate(names):
            wanted = self._mean(local[name]) if mean is None else mean.values[name]
            if not bool(wanted.isfinite().all()):
                finite = False
                continue
            error = error_of(wanted, found.get(name), max(largest[name], floor))
            if error > mine:
                mine, place = error, index
        return self._of_all(names, mine, place, allowed, finite=finite)

    def _of_all(
        self, names: list[str], error: float, place: int, allowed: float, *, finite: bool
    ) -> Worst:
        """The worst of all ranks; each writes two numbers into a row of zeros."""
        ranks = self._messages.ranks
        table = torch.zeros(ranks.size, 2, dtype=torch.float64, device=ranks.device)
        table[ranks.group.rank()] = torch.tensor([error, float(place)], dtype=torch.float64)
        self._sum(table)
        errors = [float(row[0]) for row in table]
        worst = max(range(len(errors)), key=errors.__getitem__)
        name = names[int(table[worst, 1])] if names else ""
        wrong = tuple(rank for rank, one in enumerate(errors) if one > allowed)
        return Worst(errors[worst], name, wrong, finite)
