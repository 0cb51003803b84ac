"""Set the running statistics of batch norms to those of the last steps, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import StateError
from graphopt.plan import Plan, Role
from graphopt.plan.batch_statistics import Norm, Norms, Statistic
from graphopt.runtime.batch_statistics.moments import Layout, Taking, joined, width
from graphopt.runtime.engine.step import Forward, Half, MakeForward, Step
from graphopt.runtime.part import RuntimePart, check_dtype
from graphopt.runtime.session import Session

# In `Step.own`: what a forward has found, and the buffers that belong to it.
_FOUND = "batch_statistics/found"
_RING, _WAITING = "ring/", "waiting/"
Buffers = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Found:
    """What one forward has left.

    Attributes:
        layout: of its moments.
        taking: makes them.
        results: of the forward, that they are made of.
        buffers: of each norm.
    """

    layout: Layout
    taking: Taking
    results: list[Tensor]
    buffers: Buffers


class BatchStatistics(RuntimePart[Norms]):
    """Keeps the moments of the last steps.

    The state has for each norm of C channels, by the name of its buffer of means, ``ring/<name>``,
    float64 [last, 1 + 2C], with the newest step first and zeros for steps that were not yet; and
    within a step of several micro-batches ``waiting/<name>``, float64 [1 + 2C]. See
    `graphopt.runtime.batch_statistics.moments`.
    """

    name: ClassVar[str] = "batch_statistics"
    methods: ClassVar[tuple[str, ...]] = ("no_sync",)
    accepts_early: ClassVar[bool] = True

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._norms: dict[str, Norm] = {}
        self._buffers: Buffers = {}
        self._rings: tuple[Tensor, dict[str, Tensor]] = torch.zeros(0), {}

    def forward(self, part: Norms, plan: Plan, below: MakeForward) -> MakeForward:
        """Take the statistics off."""

        def make(half: Half) -> Forward:
            return _TakingForward(below(half), half, part, plan)

        return make

    def unstaged(self, part: Norms, per_rank: int) -> str:
        """Each rank would have the statistics of its own stages only."""
        return "the statistics of one stage are not known to the ranks of others"

    def uncompared(self, part: Norms) -> Mapping[str, str]:
        """What eager has nothing like."""
        return {"statistics of several steps": "they change the training method by design"}

    @torch.no_grad()
    def finish(self, part: Norms, step: Step, gradients: dict[str, Tensor]) -> None:
        """Add moments up; where the step ends, set the buffers.

        Raises:
            RankError: a rank does not answer, or has other norms.
        """
        found: _Found | None = step.own.pop(_FOUND, None)
        if found is None:  # a second backward of the same forward
            return
        layout, moments, buffers = found.layout, found.taking(found.results), found.buffers
        if not self.session.trying:
            self._buffers.update(buffers)
            self._norms.update({norm.mean: norm for norm in part.norms})
        earlier = self._earlier()
        if earlier:
            others = [self._norms[name] for name in sorted(earlier.keys() - layout.starts.keys())]
            whole = Layout((*layout.norms, *others))
            moments, layout = joined(moments, layout, earlier, whole), whole
        if not step.ends:
            pieces = torch.split(moments, layout.widths)
            for norm, piece in zip(layout.norms, pieces, strict=True):
                self.state[_WAITING + norm.mean] = piece.clone()
            return
        moments = self._over_ranks(moments, layout)
        if not step.skipped:
            self._renew(part.last, layout, moments)
            return
        known = Layout([norm for norm in layout.norms if _RING + norm.mean in self.state])
        if known.norms:
            self._renew(part.last, known)

    def _earlier(self) -> dict[str, Tensor]:
        """Moments of earlier micro-batches of this step by norm, which are taken.

        Of norms that no call since a resumption has used there are no buffers to set.
        """
        found = {}
        for key in [key for key in self.state if key.startswith(_WAITING)]:
            moments, name = self.state.pop(key), key.removeprefix(_WAITING)
            if name in self._norms:
                found[name] = moments
        return found

    def _renew(self, last: int, layout: Layout, newest: Tensor | None = None) -> None:
        """Let one step in and the oldest go, and set the buffers to what there is now."""
        rings = self._together(last, layout)
        if newest is not None:
            rings = torch.cat([newest.to(rings.device)[None], rings[:-1]])
            keys = [_RING + norm.mean for norm in layout.norms]
            pieces = dict(zip(keys, torch.split(rings, layout.widths, dim=1), strict=True))
            self.state.update(pieces)
            self._rings = rings, pieces
        pairs = [self._buffers[norm.mean] for norm in layout.norms]
        targets = [buffer for pair in pairs for buffer in pair]
        torch._foreach_copy_(targets, layout.statistics(rings.sum(dim=0)))

    def _together(self, last: int, layout: Layout) -> Tensor:
        """The rings of some norms side by side, on the device of the model."""
        device = self._buffers[layout.norms[0].mean][0].device
        keys = [_RING + norm.mean for norm in layout.norms]
        rings, pieces = self._rings
        # As a step has left them they lie so already; a loaded state does not.
        if list(pieces) == keys and all(self.state.get(k) is p for k, p in pieces.items()):
            return rings.to(device)
        found = [self.state.get(key) for key in keys]
        empty = partial(torch.zeros, dtype=torch.float64, device=device)
        return torch.cat(
            [
                empty(last, elements) if ring is None else ring.to(device)
                for ring, elements in zip(found, layout.widths, strict=True)
            ],
            dim=1,
        )

    def _over_ranks(self, moments: Tensor, layout: Layout) -> Tensor:
        ranks = self.session.ranks.get("dp")
        if ranks is None or ranks.size == 1:
            return moments
        ranks.agree("batch norms", "\n".join(f"{n.mean} {n.channels}" for n in layout.norms), str)
        moments = moments.to(ranks.device)
        what = "the statistics of batch norms were not added up"
        with ranks.group.waiting(what):
            ranks.group.inner.allreduce([moments]).wait()
        return moments

    # -- saving and reporting ----------------------------------------------------------------------

    def accepts(self, parts: Sequence[Norms], saved: Mapping[str, Tensor]) -> None:
        """Whether saved moments are those of the norms of these; an empty state is a new start.

        Another kind of call may have other norms; theirs may be there, too, or not yet.

        Raises:
            StateError: they are not, naming the first difference.
        """
        hint = "load the state of this model, saved with the same options of batch_statistics"
        for key in saved:
            if not key.startswith((_RING, _WAITING)):
                raise StateError(
                    f"the saved state has 'batch_statistics/{key}', which is not "
                    "batch_statistics's",
                    hint=hint,
                )
        rings = any(key.startswith(_RING) for key in saved)
        for part in parts:
            for norm in part.norms:
                shapes = {_RING: (part.last, width(norm)), _WAITING: (width(norm),)}
                for prefix, shape in shapes.items():
                    found = saved.get(prefix + norm.mean)
                    if found is not None and tuple(found.shape) != shape:
                        raise StateError(
                            f"'batch_statistics/{prefix}{norm.mean}' has shape "
                            f"{tuple(found.shape)} in the saved state and {shape} here",
                            hint=hint,
                        )
                    if found is not None:
                        check_dtype(f"{self.name}/{prefix}{norm.mean}", found, torch.float64)
        expected = {_RING + norm.mean for part in parts for norm in part.norms}
        if rings and expected and not expected & saved.keys():
            raise StateError(f"the saved state lacks 'batch_statistics/{min(expected)}'", hint=hint)

    def notes(self) -> tuple[str, ...]:
        """From how much the norms evaluate."""
        counts = [v[:, 0] for k, v in self.state.items() if k.startswith(_RING)]
        if not counts:
            return ()
        steps = max(int((count > 0).sum()) for count in counts)
        values = sorted(int(count.sum()) for count in counts)
        return (
            f"batch_statistics: {len(counts)} norms evaluate with the statistics of the last "
            f"{f'{steps} steps' if steps > 1 else 'step'}, of {values[0]} to {values[-1]} values "
            "per channel",
        )


class _TakingForward:
    """A forward whose statistics stay in the step, with the buffers that they are for."""

    def __init__(self, inner: Forward, half: Half, part: Norms, plan: Plan) -> None:
        self._inner = inner
        found = [(i, Statistic.of(slot)) for i, slot in enumerate(inner.returns)]
        own = [(i, statistic) for i, statistic in found if statistic is not None]
        self._places = [i for i, _ in own]
        self.returns = tuple(s for i, s in enumerate(inner.returns) if i not in set(self._places))
        self._layout = Layout(part.norms)
        self._taking = Taking(self._layout, [statistic for _, statistic in own])
        inputs = [slot for slot in plan.signature.inputs if slot.role is not Role.TANGENT]
        at = {
            inputs[index].name: place
            for place, (kind, index) in enumerate(half.sources)
            if kind == "input" and inputs[index].role is Role.BUFFER
        }
        self._buffers = {norm.mean: (at[norm.mean], at[norm.var]) for norm in part.norms}

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        """See `Forward`."""
        buffers = {n: (inputs[mean], inputs[var]) for n, (mean, var) in self._buffers.items()}
        results = list(self._inner(step, inputs))
        found = [results[i] for i in self._places]
        for i in reversed(self._places):
            del results[i]
        step.own[_FOUND] = _Found(self._layout, self._taking, found, buffers)
        return results
