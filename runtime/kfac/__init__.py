"""Precondition gradients by the curvature that the plan describes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from graphopt.errors import StateError
from graphopt.ops.low_rank import bound
from graphopt.plan import Plan, Role
from graphopt.plan.kfac import LOW_RANK, Curvature
from graphopt.runtime import kernels
from graphopt.runtime.engine.step import (
    Backward,
    Forward,
    Half,
    MakeBackward,
    MakeForward,
    Step,
)
from graphopt.runtime.kfac.division import Division
from graphopt.runtime.kfac.saved import check_values
from graphopt.runtime.kfac.shapes import shapes
from graphopt.runtime.kfac.state import CurvatureState
from graphopt.runtime.kfac.statistics import (
    FOUND,
    Found,
    KeepingOutput,
    WithStatistics,
    is_statistic,
)
from graphopt.runtime.part import RuntimePart
from graphopt.runtime.ranks.presence import Presence
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.session import Session

# What a state of this method consists of: see `graphopt.runtime.kfac.state`.
_TABLES = frozenset({"now", "before", "interval", "sum", "solution"})
_NUMBERS = frozenset({"step", "micro-batches", "owners"})


class Kfac(RuntimePart[Curvature]):
    """Keeps the curvature of a model.

    Attributes:
        division: which rank owns what; ``None`` on one rank, and before the first step.
    """

    name: ClassVar[str] = "kfac"
    methods: ClassVar[tuple[str, ...]] = ("no_sync",)
    accepts_early: ClassVar[bool] = True

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.division: Division | None = None
        # Sizes of the sides of low rank by statistic, for the report.
        self._large: dict[str, int] = {}

    def forward(self, part: Curvature, plan: Plan, below: MakeForward) -> MakeForward:
        """Keep the model's output where labels are drawn from it."""
        if part.fisher == "empirical":
            return below

        def make(half: Half) -> Forward:
            return KeepingOutput(below(half))

        return make

    def backward(self, part: Curvature, plan: Plan, below: MakeBackward) -> MakeBackward:
        """Compute statistics in the steps in which they are due."""
        if torch.cuda.is_available():
            kernels.register()
        sides = (side for block in part.blocks for side in block.sides)
        self._large.update({s.statistic: s.size for s in sides if s.form == LOW_RANK})

        def make(half: Half) -> Backward:
            if not any(map(is_statistic, half.slots)):
                return below(half)
            state = CurvatureState(part, self.state)
            return WithStatistics(part, plan, state, half, below, self.session)

        return make

    def unstaged(self, part: Curvature, per_rank: int) -> str:
        """Labels are drawn from the model's output; statistics of micro-batches are counted."""
        if part.fisher != "empirical":
            return f"fisher={part.fisher} draws labels in the last stage for all others"
        if per_rank > 1:
            return f"it counts the micro-batches of one stage, and each rank has {per_rank}"
        return ""

    def uncompared(self, part: Curvature) -> Mapping[str, str]:
        """What eager has nothing like."""
        found = {"preconditioning": "it changes the training method by design"}
        if part.fisher != "empirical":
            found["statistics of drawn labels"] = "eager computes none"
        return found

    def finish(self, part: Curvature, step: Step, gradients: dict[str, Tensor]) -> None:
        """Renew statistics and solutions, and precondition.

        Raises:
            RankError: a rank does not answer.
        """
        found: Found | None = step.own.pop(FOUND, None)
        if found is None:  # a stage without layers that have a curvature
            self._without_layers(part, step)
            return
        curvature = found.curvature
        if step.skipped:
            if step.ends:
                curvature.taken(())
            return
        # A backward that reduces has tangents that already take the mean over ranks.
        scale = 1.0 if found.sampled else self.session.loss_scale * step.scale
        curvature.absorb(found.statistics, scale)
        if not step.ends:
            return
        curvature.keep_only(found.own)
        samples = [name for block in part.blocks for name in block.samples]
        fresh = curvature.taken([*found.due, *samples] if found.due else ())
        ranks = self.session.ranks.get("dp")
        if ranks is None or ranks.size == 1:
            curvature.take_over(part.blocks, fresh)
            changed = curvature.precondition(part.blocks, gradients)
            length = curvature.length(changed, gradients, self.session.loss_scale)
            gradients.update(curvature.clipped(changed, length))
        else:
            reduces = "grouped" not in found.plan.facts
            if reduces:
                _complete(found.plan, step, ranks, gradients)
            if self.division is None:
                self.division = Division.of(ranks, part.fraction, self.session.ranks.get("pp"))
            result = self.division.step(
                curvature, gradients, fresh, reduces=reduces, loss_scale=self.session.loss_scale
            )
            gradients.update(result)
        curvature.advance()

    def _without_layers(self, part: Curvature, step: Step) -> None:
        if step.ends and not step.skipped:
            curvature = CurvatureState(part, self.state)
            curvature.keep_only(())
            curvature.advance()

    # -- saving and reporting ----------------------------------------------------------------------

    def accepts(self, parts: Sequence[Curvature], saved: Mapping[str, Tensor]) -> None:
        """Whether saved statistics are those of the blocks of one of these.

        Another kind of call may have other layers; its statistics may be there, too, or not yet.

        Raises:
            StateError: they are not, naming the first difference.
        """
        hint = "load the state of this model, saved with the same options of kfac"
        for key in saved:
            table, _, name = key.partition("/")
            if not (table in _TABLES if name else key in _NUMBERS):
                raise StateError(
                    f"the saved state has 'kfac/{key}', which is not kfac's", hint=hint
                )
        if not saved:
            return
        lacking = []
        for part in parts:
            expected = shapes(part)
            for key in sorted(expected.keys() & saved.keys()):
                if saved[key].shape != expected[key]:
                    raise StateError(
                        f"'kfac/{key}' has shape {tuple(saved[key].shape)} in the saved state and "
                        f"{expected[key]} here",
                        hint=hint,
                    )
            _check_whole(expected, saved, hint)
            needed = (f"now/{side.statistic}" for block in part.blocks for side in block.sides)
            lacking.append(next((key for key in needed if key not in saved), ""))
        if any(key.startswith("now/") for key in saved) and lacking and all(lacking):
            raise StateError(f"the saved state lacks 'kfac/{lacking[0]}'", hint=hint)
        check_values(parts, saved, self.state)

    def gather(self) -> dict[str, Tensor]:
        """The state of all ranks; to be called on all of them.

        Raises:
            StateError: within a step.
            RankError: a rank does not answer.
        """
        return dict(self.state) if self.division is None else self.division.whole(self.state)

    def own(self) -> dict[str, Tensor]:
        """What this rank keeps."""
        return dict(self.state) if self.division is None else self.division.mine(self.state)

    def notes(self) -> tuple[str, ...]:
        """How often statistics are renewed now, what low rank leaves out, and what ranks send."""
        found = (int(v[0]) for n, v in self.state.items() if n.startswith("interval/"))
        chosen = sorted(found)
        sent = () if self.division is None else self.division.notes()
        sent = (*self._left_out(), *sent)
        if not chosen:
            return sent
        steps, middle = int(self.state["step"]), chosen[len(chosen) // 2]
        return (
            f"kfac: after {steps} steps {len(chosen)} statistics are renewed every {chosen[0]} to "
            f"{chosen[-1]} steps, half of them every {middle} or less often",
            *sent,
        )

    def _left_out(self) -> Iterator[str]:
        """A line for each side of low rank that this rank keeps."""
        for name, size in self._large.items():
            value = self.state.get(f"now/{name}")
            if value is not None:
                share, error = bound(value, size)
                rank = value.shape[1] // size - 1
                yield (
                    f"kfac: {name}, {rank} directions of {size} and the diagonal, leaves out "
                    f"{share:.2%} of the trace; its Frobenius norm is wrong by at most {error:.2%}"
                )

    def copy(self, session: Session) -> Self:
        """The same owners, with messages of their own."""
        other = type(self)(session)
        other._large.update(self._large)
        if self.division is not None:
            other.division = self.division.copy(session.ranks["dp"], session.ranks.get("pp"))
        return other


def _check_whole(expected: Collection[str], saved: Collection[str], hint: str) -> None:
    """Whether each solution that is there is there with all its tensors, and with no others.

    Raises:
        StateError: one is not.
    """
    solutions = {key[: key.rfind("/") + 1] for key in expected if key.startswith("solution/")}
    mine = {key for key in saved if key[: key.rfind("/") + 1] in solutions}
    begun = {key[: key.rfind("/") + 1] for key in mine}
    needed = {key for key in expected if key[: key.rfind("/") + 1] in begun}
    # Without samples there are no second moments.
    lacking = sorted(key for key in needed - mine if not key.endswith("/moments"))
    if lacking:
        raise StateError(f"the saved state lacks 'kfac/{lacking[0]}'", hint=hint)
    if many := sorted(mine - needed):
        raise StateError(f"the saved state has 'kfac/{many[0]}' too many", hint=hint)


def _complete(plan: Plan, step: Step, ranks: Ranks, gradients: dict[str, Tensor]) -> None:
    """Zeros for gradients that only other ranks have; those that no rank has are left out."""
    names = set(plan.signature.names(Role.GRAD)) & step.parameters.keys()
    what = "which gradients each rank has was not agreed on"
    presence = Presence(plan, names)
    question = presence.ask(ranks, gradients.keys(), lambda: ranks.group.waiting(what))
    nowhere = presence.absent(names - gradients.keys(), question)
    found = {name: gradients.pop(name, None) for name in presence.names}
    # In one order on all ranks, as they lie in the messages in the order of this dictionary.
    for name, gradient in found.items():
        if name not in nowhere:
            zeros = torch.zeros_like
            gradients[name] = zeros(step.parameters[name]) if gradient is None else gradient
