"""Scale losses in float16 as large as gradients allow, and leave out steps where they overflow."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import ArgumentError, StateError
from graphopt.plan import Plan, Role
from graphopt.plan.precision import LossScaling
from graphopt.runtime.engine.step import Backward, Half, MakeBackward, Step
from graphopt.runtime.part import RuntimePart, check_dtype, check_like
from graphopt.runtime.precision.leaving_out import LeavingOut
from graphopt.runtime.ranks.presence import Question
from graphopt.runtime.ranks.slips import slipped
from graphopt.runtime.session import Session

# The last changes of the scale that are kept.
_KEPT = 8
# Under which a step says whether its gradients come out reduced over all ranks.
_REDUCED = "precision/reduced"
# Under which it says that the gradient of an input overflowed.
_OVERFLOW = "precision/overflow"


class Precision(RuntimePart[LossScaling]):
    """Keeps the scale of a model's loss.

    State, all on the CPU:
        scale: float32 [], what the next step's tangents are multiplied with.
        clean: int64 [], steps with finite gradients since the scale last changed.
        steps: int64 [], all steps that ended.
        skipped: int64 [], those of them that were left out.
        overflow: bool [], whether a micro-batch of the present step was not finite.
        changes: int64 [8, 2], the last changes of the scale: step and log2 of the new scale.
    """

    name: ClassVar[str] = "precision"
    methods: ClassVar[tuple[str, ...]] = ("no_sync",)
    accepts_early: ClassVar[bool] = True

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._left_out = LeavingOut()
        self._asked = 0

    def unscaled(self) -> None:
        """Multiply with 1 from now on."""
        if "scale" in self.state:
            self.state["scale"].fill_(1.0)

    def backward(self, part: LossScaling, plan: Plan, below: MakeBackward) -> MakeBackward:
        """Say what the tangents are multiplied with in the graph."""
        if "steps" not in self.state:
            zero = torch.zeros((), dtype=torch.int64)
            self.state.update(clean=zero.clone(), steps=zero.clone(), skipped=zero)
            self.state["overflow"] = torch.zeros((), dtype=torch.bool)
            self.state["changes"] = torch.zeros(0, 2, dtype=torch.int64)
            self.state["scale"].fill_(part.initial)
        if self.session.scaler is not None:
            self.unscaled()
        if any(getattr(other, "stale", "none") != "none" for other in plan.parts):
            raise ArgumentError(
                "gradients of an earlier step do not go together with loss scaling: ranks would "
                "leave out different steps",
                hint="stale=none, loss_scale=none, or format=bf16, which needs no scale",
            )

        def make(half: Half) -> Backward:
            return _Scaled(self, plan, below(half))

        return make

    def unstaged(self, part: LossScaling, per_rank: int) -> str:
        """Tangents are multiplied in the last stage, and overflows found in any."""
        return "its loss scale is a decision about all stages at once; use format=bf16"

    def uncompared(self, part: LossScaling) -> Mapping[str, str]:
        """What eager has nothing like."""
        return {"steps left out": "eager leaves none out"}

    def finish(self, part: LossScaling, step: Step, gradients: dict[str, Tensor]) -> None:
        """Leave out a step with gradients that are not finite, and renew the scale.

        A step that is left out has no gradients at all, so that optimizers skip it; what other
        backwards have added to them is removed when the optimizer steps.

        Raises:
            RankError: a rank does not answer.
        """
        if self.session.scaler is not None:
            return  # it looks at the gradients itself, and skips the step
        state = self.state
        overflow = step.own.pop(_OVERFLOW, False) or not _all_finite(gradients.values())
        if step.ends:
            overflow = self._anywhere(step, overflow or bool(state["overflow"]))
            state["overflow"].fill_(False)
            self._renew(part, overflow)
        elif overflow:
            state["overflow"].fill_(True)
        step.skipped = overflow
        if overflow and step.ends:
            gradients.clear()
            self._left_out.add(p for p in step.parameters.values() if p.requires_grad)

    def _renew(self, part: LossScaling, overflow: bool) -> None:
        state = self.state
        scale = before = float(state["scale"])
        state["steps"] += 1
        if overflow:
            state["skipped"] += 1
            scale = max(part.least, scale / part.factor)
        else:
            state["clean"] += 1
            if int(state["clean"]) >= part.interval:
                scale = min(scale * part.factor, 2.0**120)
        if overflow or scale != before:
            state["clean"].zero_()
        if scale != before:
            state["scale"].fill_(scale)
            exponent = torch.tensor(scale).frexp().exponent - 1
            new = torch.stack([state["steps"], exponent.to(torch.int64)])
            state["changes"] = torch.cat([state["changes"], new[None]])[-_KEPT:]

    def _anywhere(self, step: Step, overflow: bool) -> bool:
        """Whether any rank has to leave the step out.

        Reduced gradients carry what is not finite to all ranks, and a number of the step and the
        scale; others have to ask.

        Raises:
            RankError: a rank does not answer, is in another step, or has another scale.
        """
        ranks = self.session.ranks.get("dp")
        if ranks is None or ranks.size == 1 or step.own.pop(_REDUCED):
            return overflow
        what = "whether a gradient overflowed was not agreed on"
        self._asked += 1
        scale = float(self.state["scale"])
        # A maximum shows that all are equal if that of the differences from the largest does, too.
        mine = [n for v in (self._asked % 256, math.frexp(scale)[1]) for n in (v, 255 - v)]
        bits = torch.tensor([overflow, *mine], dtype=torch.uint8).to(ranks.device)
        found, *theirs = Question(ranks, bits, lambda: ranks.group.waiting(what)).answer()
        if theirs != mine:
            raise slipped(ranks, self._asked, scale)
        return bool(found)

    # -- saving and reporting ----------------------------------------------------------------------

    def accepts(self, parts: Sequence[LossScaling], saved: Mapping[str, Tensor]) -> None:
        """Whether a saved state has a scale that can be continued from.

        Raises:
            StateError: it has not.
        """
        own = self.state
        if "steps" not in own:  # no call was captured yet
            own = dict.fromkeys(("clean", "steps", "skipped"), torch.zeros((), dtype=torch.int64))
            own |= {"overflow": torch.zeros((), dtype=torch.bool), "scale": torch.ones(())}
        changes = saved.get("changes", torch.zeros(0, 2, dtype=torch.int64))
        check_like(self.name, dict(own, changes=changes), saved)
        if bool(saved["steps"] < saved["skipped"]) or bool(saved["skipped"] < 0):
            raise StateError(
                "'precision/steps' and 'precision/skipped' are no numbers of steps",
                hint="load the state of this model",
            )
        if changes.dim() != 2 or changes.shape[1] != 2 or bool(saved["clean"] < 0):
            raise StateError(
                "'precision/changes' or 'precision/clean' is not what loss scaling saves",
                hint="load the state of this model, or remove the keys of precision/ from it",
            )
        check_dtype("precision/changes", changes, torch.int64)
        scale = float(saved["scale"])
        if not 1 <= scale < float("inf") or math.frexp(scale)[0] != 0.5:
            raise StateError(
                f"'precision/scale' is {scale:g} in the saved state, and a scale is a power of two",
                hint="load the state of this model, or remove the keys of precision/ from it",
            )

    def notes(self) -> tuple[str, ...]:
        """The scale, how it changed, and which steps were left out."""
        if self.session.scaler is not None:
            return ("precision: the loss is scaled by the scaler given to graphopt.use_scaler",)
        if "steps" not in self.state:
            return ()
        scale = self.state["scale"]
        steps, skipped = int(self.state["steps"]), int(self.state["skipped"])
        changes = ", ".join(f"2^{e} at step {at}" for at, e in self.state["changes"].tolist())
        lines = [
            f"precision: the loss is scaled by {float(scale):g}; {skipped} of {steps} steps were "
            f"left out because gradients overflowed{f' (scale: {changes})' if changes else ''}"
        ]
        if float(scale) <= 1.0 and skipped:
            lines.append(
                "precision: gradients overflow without any scale: the loss diverges, or a layer "
                "needs the range of float32 (keep=…) or of bfloat16 (format=bf16)"
            )
        return tuple(lines)


class _Scaled:
    """A backward whose graph scales its tangents."""

    def __init__(self, runtime: Precision, plan: Plan, inner: Backward) -> None:
        self.returns = inner.returns
        self._state, self._inner = runtime.state, inner
        self._reduced = "grouped" in plan.facts
        parameters = set(plan.signature.names(Role.PARAM))
        gradients = [(i, s.name) for i, s in enumerate(inner.returns) if s.role is Role.GRAD]
        self._of_inputs = [i for i, name in gradients if name not in parameters]
        self._session = runtime.session

    def __call__(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> list[Any]:
        """See `Backward`."""
        step.scale *= float(self._state["scale"])
        step.own[_REDUCED] = self._reduced
        if self._state["overflow"] and step.ends:
            # The others must hear of it, and gradients are the way.
            tangents = [None if t is None else torch.full_like(t, torch.nan) for t in tangents]
        results = self._inner(step, tangents, absent)
        if self._of_inputs and step.ends and self._session.scaler is None:
            # What lies in front of the model must not learn from an overflow, either.
            given = [results[i] for i in self._of_inputs if results[i] is not None]
            if not _all_finite(given):
                step.own[_OVERFLOW] = True
                for i in self._of_inputs:
                    results[i] = None
        return results


def _all_finite(gradients: Iterable[Tensor]) -> bool:
    dense = [g._values() if g.is_sparse else g for g in gradients]
    filled = [g for g in dense if g.numel()]
    return bool(torch.nn.utils.get_total_norm(filled, torch.inf).isfinite()) if filled else True
