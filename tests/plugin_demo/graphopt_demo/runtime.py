"""What `scale_by_peak` does in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import StateError
from graphopt.plan import Plan, Role
from graphopt.runtime.engine.step import Forward, Half, MakeForward, Step
from graphopt.runtime.part import RuntimePart
from graphopt_demo.plan import Peaks

SEEN = "scale_by_peak/seen"  # in `Step.own`
WAITING, RUNNING = "waiting/", "running/"  # in the state


class WithPeaks:
    """A forward half that leaves the maxima of its activations in the step."""

    def __init__(self, inner: Forward, prefix: str) -> None:
        self._inner = inner
        slots = list(enumerate(inner.returns))
        own = [(i, s) for i, s in slots if s.role is Role.AUX and s.name.startswith(prefix)]
        self._own = [(i, s.name.removeprefix(prefix)) for i, s in own]
        self.returns = tuple(pair[1] for pair in slots if pair not in own)

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        results = list(self._inner(step, inputs))
        step.own[SEEN] = {name: results[i] for i, name in self._own}
        for i, _ in reversed(self._own):
            del results[i]
        return results


class ScaleByPeak(RuntimePart[Peaks]):
    """Keeps the running maxima.

    The state has ``running/<activation>``, and within a step of several micro-batches
    ``waiting/<activation>``, the maximum so far.
    """

    name: ClassVar[str] = "scale_by_peak"
    methods: ClassVar[tuple[str, ...]] = ("no_sync", "activation_maxima")

    def activation_maxima(self) -> dict[str, float]:
        """The running maximum of each activation."""
        running = {k: v for k, v in self.state.items() if k.startswith(RUNNING)}
        return {k.removeprefix(RUNNING): float(v) for k, v in running.items()}

    def forward(self, part: Peaks, plan: Plan, below: MakeForward) -> MakeForward:
        """Take the maxima off the results."""

        def make(half: Half) -> Forward:
            return WithPeaks(below(half), f"{self.name}/")

        return make

    def finish(self, part: Peaks, step: Step, gradients: dict[str, Tensor]) -> None:
        """Renew the running maxima and divide by them."""
        names = [peak.name for peak in part.peaks]
        seen: dict[str, Tensor] = step.own[SEEN]
        for name in names:
            before = self.state.pop(WAITING + name, None)
            seen[name] = seen[name] if before is None else torch.maximum(seen[name], before)
        if not step.ends:
            self.state.update({WAITING + name: seen[name] for name in names})
            return
        # In double precision, which holds the maxima of all types of activations exactly.
        fresh = self._over_ranks(torch.stack([seen[name].double() for name in names]))
        for peak, now in zip(part.peaks, fresh, strict=True):
            before = self.state.get(RUNNING + peak.name, now)
            running = torch.maximum(before * part.decay, now)
            self.state[RUNNING + peak.name] = running
            for name in peak.parameters:
                if name in gradients:
                    scale = running.clamp_min(1e-6).to(gradients[name].dtype)
                    gradients[name] = gradients[name] / scale

    def _over_ranks(self, maxima: Tensor) -> Tensor:
        ranks = self.session.ranks.get("dp")
        if ranks is None or ranks.size == 1:
            return maxima
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        with ranks.group.waiting("the maxima of activations were not agreed on"):
            ranks.group.inner.allreduce([maxima], options).wait()
        return maxima

    def accepts(self, parts: Sequence[Peaks], saved: Mapping[str, Tensor]) -> None:
        """Whether saved maxima are those of these activations; an empty state is a new start."""
        running = {k.removeprefix(RUNNING) for k in saved if k.startswith(RUNNING)}
        if running and (
            odd := sorted(running ^ {peak.name for part in parts for peak in part.peaks})
        ):
            raise StateError(
                f"the saved state of {self.name!r} and this model differ in activation {odd[0]!r}",
                hint="load the state of this model",
            )

    def notes(self) -> tuple[str, ...]:
        """The largest of the maxima."""
        maxima = self.activation_maxima()
        return (f"{self.name}: largest activation {max(maxima.values()):.4g}",) if maxima else ()
