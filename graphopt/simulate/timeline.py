"""The computation of one step on one rank: when it produces which gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from graphopt.errors import ArgumentError
from graphopt.plan.grouping import Ready


@dataclass(frozen=True)
class Timeline:
    """The computation of one step, undisturbed.

    Attributes:
        forward: seconds of the forward pass.
        backward: seconds of the backward pass.
        ready: all gradients to reduce, in any order; their seconds count from the beginning of the
            backward pass.

    Raises:
        ArgumentError: a time is negative or not finite, a gradient is ready after the backward
            pass, or two have the same name.
    """

    forward: float
    backward: float
    ready: tuple[Ready, ...]

    def __post_init__(self) -> None:
        for name, seconds in (("forward", self.forward), ("backward", self.backward)):
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ArgumentError(f"the {name} pass cannot take {seconds} s", where=name)
        for gradient in self.ready:
            if not 0 <= gradient.seconds <= self.backward:
                raise ArgumentError(
                    f"the gradient of {gradient.name!r} is ready after {gradient.seconds} s of a "
                    f"backward pass of {self.backward} s",
                    where="ready",
                    hint="count from the beginning of the backward pass",
                )
        names = [gradient.name for gradient in self.ready]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ArgumentError(
                f"{twice!r} has two gradients",
                where="ready",
                hint="list a tied weight once, with the time of its last use",
            )

    @property
    def compute(self) -> float:
        """Seconds of the step on one rank, without any communication."""
        return self.forward + self.backward

    def stretched(self, factor: float) -> Timeline:
        """The same computation, `factor` times as slow."""
        return Timeline(
            self.forward * factor,
            self.backward * factor,
            tuple(replace(g, seconds=g.seconds * factor) for g in self.ready),
        )
