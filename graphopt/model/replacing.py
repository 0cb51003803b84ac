"""Passes that replace parameters: what they decide, and whether the model stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from graphopt.capture import capture_forward
from graphopt.errors import MismatchError
from graphopt.model.comparison import Observed, differences, tolerance
from graphopt.model.parametrize import Replaced, named_parameters
from graphopt.model.trial import Call, Trial, describe_call
from graphopt.notices import warn
from graphopt.passbase import EXACT, Outcome, PassContext
from graphopt.pipeline import Pipeline

# How much further than noise of the size of the errors an error in the weights may move a result.
_TIMES = 8.0


@dataclass
class Replacement:
    """Parameters replaced for one call of a model, and how far that may move it.

    Args:
        model: the model.
        args, kwargs: of the call.
        forward: the model's own forward.
        around: what trials take place in.

    Attributes:
        decided: what each pass on the forward graph did, by its name.
    """

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    forward: Call
    around: Callable[[], Any]
    decided: dict[str, Outcome] = field(default_factory=dict)
    _bound: float = 0.0
    _by: str = ""
    _reference: Observed | None = None
    _moved: dict[str, float] = field(default_factory=dict)
    _names: frozenset[str] = frozenset()
    _done: Replaced | None = None

    def make(self, pipeline: Pipeline, ctx: PassContext, *, compares: bool) -> None:
        """Let the passes decide, and replace.

        Args:
            pipeline: the pipeline.
            ctx: what passes may know; `parameters` are added here.
            compares: whether `check` is going to be called.
        """
        graph = capture_forward(self.model, self.args, self.kwargs, forward=self.forward)
        known = replace(ctx, parameters=named_parameters(self.model))
        steps = pipeline.run(graph, known)[: len(pipeline.on_forward)]
        parametrized: dict[str, nn.Module] = {}
        for pass_, step in zip(pipeline.on_forward, steps, strict=True):
            self.decided[pass_.name] = replace(step.outcome, parametrized={})
            if step.outcome.parametrized:
                parametrized |= step.outcome.parametrized
                self._bound = max(self._bound, pass_.numerics.bound)
                self._by = pass_.name
        if not parametrized:
            return
        self._names = frozenset(parametrized)
        if compares:
            self._observe(parametrized)
        self._done = Replaced(self.model, parametrized)

    def _observe(self, parametrized: Mapping[str, nn.Module]) -> None:
        """The step before, and how far noise in the weights moves it."""
        trial = Trial(self.model, self.args, self.kwargs, self.around)
        with trial.outside():
            self._reference = trial.observe(self.forward)
            with _noise(named_parameters(self.model), parametrized):
                noisy = trial.observe(self.forward)
        self._moved = {d.name: d.error for d in differences(self._reference, noisy)}

    def check(self, *, raises: bool = True) -> None:
        """Compare the model's own forward with what it was, where something was replaced.

        What passes make of it is compared with that forward where they are checked.

        Args:
            raises: whether a difference is an error, and not a warning.

        Raises:
            MismatchError: a result is further off than the tolerance of the pass, and than noise of
                that size in the weights, explain.
        """
        if self._reference is None:
            return
        trial = Trial(self.model, self.args, self.kwargs, self.around)
        with trial.outside():
            now = trial.observe(self.forward)
        own = {f"gradient of {name}" for name in self._names}
        common = {n: v for n, v in self._reference.values.items() if n not in own}
        found = differences(
            Observed(common, self._reference.parameters),
            Observed({n: v for n, v in now.values.items() if n in common}, now.parameters),
        )
        floor = max(self._bound, tolerance(self._reference, EXACT))
        for worst in sorted(found, key=lambda d: -d.error):
            allowed = max(floor, _TIMES * self._moved.get(worst.name, 0.0))
            if worst.error > allowed:
                error = MismatchError(
                    f"with the factors of pass {self._by!r}, {worst.name} has a relative error of "
                    f"{worst.error:.2g} against the model with its weights, and {allowed:.2g} is "
                    "allowed",
                    where=describe_call(self.model, self.args, self.kwargs),
                    hint="a smaller tolerance, or leave the pass out; the model is as it was",
                )
                if raises:
                    raise error
                warn(str(error))
                return

    def undo(self) -> None:
        """Give the model its weights back."""
        if self._done is not None:
            self._done.undo()
            self._done = None

    def settle(self) -> None:
        """The new parameters stay."""
        if self._done is not None:
            self._done.settle()
            self._done = None

    @property
    def made(self) -> bool:
        """Whether parameters are replaced now."""
        return self._done is not None

    @property
    def old(self) -> Mapping[str, Tensor]:
        """The parameters that others stand in the place of now, by name."""
        return {} if self._done is None else self._done.old


@contextmanager
def _noise(
    parameters: Mapping[str, Tensor], parametrized: Mapping[str, nn.Module]
) -> Iterator[None]:
    """Within, the weights differ by random numbers of the relative size that is tolerated."""
    generator = torch.Generator().manual_seed(0)
    old = {name: parameters[name].detach().clone() for name in parametrized}
    try:
        with torch.no_grad():
            for name, before in old.items():
                noise = torch.randn(before.shape, generator=generator, dtype=torch.float64)
                size = float(before.double().norm()) * cast("float", parametrized[name].tolerance)
                noise *= size / float(noise.norm())
                parameters[name].data.add_(noise.to(before))
        yield
    finally:
        with torch.no_grad():
            for name, before in old.items():
                parameters[name].data.copy_(before)
