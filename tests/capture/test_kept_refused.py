"""Calls that no later process finds again, and why; what a file can hold is read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.capture.kept import Store
from tests.capture.test_kept import Printing


class Counting(nn.Linear):
    """Assigns an object that it keeps."""

    def forward(self, input: Tensor) -> Tensor:
        """Keep a list."""
        self.seen = [1]
        return super().forward(input)


class Output(dict[str, Tensor]):
    """A class of results."""


class Classy(nn.Linear):
    """Returns an object of a class of its own."""

    def forward(self, input: Tensor) -> Any:
        """Return it."""
        return Output(out=super().forward(input))


# Its parts, which are the graph's, and its backward are no code that Dynamo goes through.
OPERATORS = torch.library.Library("kept_operators", "DEF")  # type: ignore[no-untyped-call]
OPERATORS.define("doubled(Tensor x) -> Tensor")
OPERATORS.impl("doubled", lambda x: x * 2.0, "CompositeImplicitAutograd")


@torch.library.custom_op("kept_operators::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    """With a backward of its own."""
    return x * x


squared.register_fake(torch.empty_like)
squared.register_autograd(
    lambda ctx, grad: grad * ctx.x * 2.0,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)


def _halve(x: Tensor) -> Tensor:
    return x / 2.0


@torch._dynamo.allow_in_graph
def halved(x: Tensor) -> Tensor:
    """Is called as it is; Dynamo does not look for what it calls."""
    return _halve(x)


class Halving(nn.Linear):
    """Calls it."""

    def forward(self, input: Tensor) -> Tensor:
        """Halve."""
        return halved(super().forward(input))


class Doubling(nn.Linear):
    """Calls an operator that is decomposed."""

    def forward(self, input: Tensor) -> Tensor:
        """Double it."""
        return torch.ops.kept_operators.doubled(super().forward(input))  # type: ignore[no-any-return]


class Squaring(nn.Linear):
    """Calls an operator with a backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Square it."""
        return squared(super().forward(input))


class Reading(nn.Linear):
    """Reads a number off a tensor."""

    def forward(self, input: Tensor) -> Tensor:
        """Scale by it."""
        return super().forward(input) * self.weight.detach().abs().max().item()


class Turning(nn.Linear):
    """Multiplies by a complex number, which the backward conjugates."""

    def forward(self, input: Tensor) -> Tensor:
        """Turn by a quarter."""
        return (super().forward(input) * 1j + input).abs()


def test_numbers_that_are_complex_are_read_again() -> None:
    made = [capture(Turning(2, 2), (torch.ones(1, 2),), store=Store()) for _ in range(2)]
    assert [each.route for each in made] == ["dynamo", "kept"]


class Selecting(nn.Linear):
    """Has a size that depends on data."""

    def forward(self, input: Tensor) -> Tensor:
        """Sum what is positive."""
        y = super().forward(input)
        return y[y > 0].sum()


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Reading, "numbers that it reads off tensors are symbols of its graph"),
        (Selecting, "numbers that it reads off tensors are symbols of its graph"),
        (Halving, "it calls halved, of which Dynamo does not see the code"),
        (Doubling, "it calls kept_operators::doubled, an operator whose code is not known"),
        (Squaring, "it calls kept_operators::squared, an operator whose code is not known"),
        (Counting, "forward changes Python objects"),
        (Printing, "forward does more around its graph than take inputs and return results"),
        (Classy, "forward returns an object of class Output"),
    ],
)
def test_what_cannot_be_kept_says_why(net: type[nn.Linear], reason: str) -> None:
    made = graphopt.optimize(net(2, 2), (torch.ones(1, 2),), backend="eager")
    assert f"cache      each process captures it anew: {reason}" in made.explain()  # type: ignore[operator]
