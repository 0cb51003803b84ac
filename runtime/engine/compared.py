"""Two forms of one backward that must give the same gradients."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from graphopt.errors import MismatchError
from graphopt.plan import Role
from graphopt.runtime.engine.step import Backward, Step
from graphopt.runtime.session import Session
from graphopt.runtime.validation import NOISE, error_of, magnitude, rounding

NAME = "with and without results of its own"


class Pair:
    """A form that only gives gradients, and one that gives a part's own results, too.

    One of them has run in the comparison with eager. They are compared with each other when the
    second one is about to run for the first time, and in sampled steps; neither sends anything
    then.

    Args:
        session: of the model.
        part: the method that has the forms.
        backend: what has made them.
    """

    def __init__(self, session: Session, part: str, backend: str) -> None:
        self._session, self._part, self._backend = session, part, backend
        self._seen: set[bool] = set()
        self._compared = False
        if session.validation is not None:
            session.validation.expect(part, NAME)

    @property
    def distrusts(self) -> bool:
        """Whether they differ; the one with more results, which the comparison has seen, runs."""
        validation = self._session.validation
        return validation is not None and validation.distrusts(self._part, NAME)

    def wants(self, with_results: bool, step: Step) -> bool:
        """Whether they are compared in this step.

        Args:
            with_results: which form runs.
            step: of it.
        """
        validation = self._session.validation
        if validation is None or self._session.trying or self.distrusts:
            return False
        self._seen.add(with_results)
        if len(self._seen) < 2:
            return False
        if self._session.in_job:
            # Ranks exchange what they find, so they must all compare in the same step.
            return validation.wants(self._part, NAME, self._session.steps) and step.ends
        return not self._compared or validation.due(self._session.steps)

    def compare(
        self,
        plain: Backward,
        full: Backward,
        step: Step,
        tangents: Sequence[Tensor | None],
        absent: Collection[str],
    ) -> None:
        """Run both, alone, and compare the gradients.

        Raises:
            MismatchError: they differ, on some rank; on all of them.
            RankError: a rank does not answer.
        """
        session, validation = self._session, self._session.validation
        assert validation is not None
        found = []
        with session.silently():
            for form in (plain, full):
                # A form may add gradients to sums where these lie.
                own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in step.own.items()}
                again = replace(step, saved=list(step.saved), own=own, ends=False)
                results = form(again, list(tangents), absent)
                gradients = zip(form.returns, results, strict=True)
                found.append(
                    {s.name: r for s, r in gradients if s.role is Role.GRAD and r is not None}
                )
        reference, actual = found[1], found[0]
        generated = self._backend != "eager" or any(r.is_cuda for r in reference.values())
        scales = {n: magnitude(r) for n, r in reference.items()}
        floor = NOISE * max(scales.values(), default=0.0) if generated else 0.0
        errors = {
            n: error_of(r, actual.get(n), max(scales[n], floor)) for n, r in reference.items()
        }
        worst = max(errors, key=errors.__getitem__, default="")
        error = errors.get(worst, 0.0)
        said = ""
        if error > rounding(reference, generated=generated):
            said = f"the gradient of {worst} by a relative error of {error:.2g}"
        # Ranks along pp have other stages, which may have no such forms.
        rank, said = session.complaint(NAME, said, along="dp")
        at, self._compared = session.steps + 1, True
        if not said:
            validation.found(self._part, NAME, at, worst, error)
            return
        where = f" on rank {rank}" if session.in_job else ""
        by = "" if self._backend == "eager" else f", in the code of backend {self._backend!r}"
        wrong = MismatchError(
            f"two forms of the backward of the runtime part {self._part!r} differ in step "
            f"{at}{where}{by}: {said}",
            hint=f"leave {self._part} out, and report it",
            guilty=f"part {self._part}",
        )
        instead = f"the form of {self._part} that computes more runs"
        validation.wrong(wrong, self._part, NAME, at, instead)
