"""One side of a comparison: a model with a random world of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError
from graphopt.testing.fuzz.between import AFTER
from graphopt.testing.fuzz.layers import WIDTH
from graphopt.testing.fuzz.observe import difference, leaves, state_of, surroundings
from graphopt.testing.fuzz.scenario import Scenario, Step
from graphopt.testing.fuzz.uses import USES

_SEED = 5


class Side:
    """Runs the steps of a scenario; another side that runs between them changes nothing.

    Attributes:
        model: that the run goes on with.
        left: what the last call has left behind, by name.
        trace: what a call that graphopt refused has changed, in words.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.model = scenario.build()
        self.left: dict[str, object] = {}
        self.trace = ""
        self._data = torch.Generator().manual_seed(scenario.seed)
        self._streams: tuple[Any, ...] = (
            torch.Generator().manual_seed(_SEED).get_state(),
            random.Random(_SEED).getstate(),
            np.random.RandomState(_SEED).get_state(),
        )

    def call(self, step: Step) -> Exception | None:
        """Call the model as the step does; the error that this raises, if any."""
        inputs: list[Tensor] = []

        def batch() -> Tensor:
            inputs.append(torch.randn(step.batch, WIDTH, generator=self._data))
            return inputs[-1]

        output, error = None, None
        with self._world():
            self.model.train(step.training)
            try:
                output = USES[step.use](_Called(self.model, self._watched), batch)
            except Exception as raised:
                error = raised
            self.left = state_of(self.model) | leaves("output", output) | leaves("input", inputs)
            self.left |= surroundings()
        return error

    def after(self, step: Step) -> Exception | None:
        """What the loop does to the model then; the error that this raises, if any."""
        with self._world():
            try:
                self.model = AFTER[step.after](self.model)
            except Exception as raised:  # `deepcopy` of a module that holds a value with a graph
                return raised
        return None

    def _watched(self, *args: Any) -> Any:
        before = state_of(self.model)
        try:
            return self.model(*args)
        except GraphoptError:
            self.trace = difference(before, state_of(self.model))
            raise

    @contextmanager
    def _world(self) -> Iterator[None]:
        outside = _streams()
        _enter(self._streams)
        try:
            yield
        finally:
            self._streams = _streams()
            _enter(outside)


class _Called(nn.Module):
    """A model as `USES` see it: calls go through `call`."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def _streams() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _enter(streams: tuple[Any, ...]) -> None:
    torch.set_rng_state(streams[0])
    random.setstate(streams[1])
    np.random.set_state(streams[2])
