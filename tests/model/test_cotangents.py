"""The backward of a trial gives what autograd gives, and holds nothing for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.model.cotangents import Backward, cotangent_of
from graphopt.model.trial import Trial


def leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {n: torch.randn(3, 4, generator=generator) for n in ("a", "b", "c")}
    return {name: value.requires_grad_() for name, value in made.items()}


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Operators by number, each on two of the values that there are."""
    count = draw(st.integers(1, 6))
    return [
        (draw(st.integers(0, 3)), *(draw(st.integers(0, 2 + i)) for _ in range(2)))
        for i in range(count)
    ]


def outputs_of(program: list[tuple[int, int, int]], values: list[Tensor]) -> list[Tensor]:
    for kind, i, j in program:
        a, b = values[i], values[j]
        made = {
            0: lambda a, b: a * b,
            1: lambda a, b: (a + b).tanh(),
            2: lambda a, b: a.t().contiguous().t() - b,
            3: lambda a, b: a @ b.t() @ b,
        }[kind](a, b)
        values.append(made)
    return values[3:]


@given(programs(), st.booleans(), st.data())
def test_gradients_are_those_of_autograd(
    program: list[tuple[int, int, int]], loss: bool, data: st.DataObject
) -> None:
    """The oracle adds up the products of outputs and cotangents and differentiates the sum."""
    ours, theirs = leaves(), leaves()
    chosen = data.draw(st.lists(st.integers(0, len(program) - 1), min_size=1, unique=True))

    def made(of: dict[str, Tensor]) -> list[Tensor]:
        found = outputs_of(program, list(of.values()))
        return [found[i] for i in chosen] + ([found[-1].square().mean()] if loss else [])

    results: dict[str, Tensor | None] = {}
    assert Backward(made(ours), ours)(results, at_once=True)
    assert all(leaf.grad is None for leaf in ours.values())
    ends = made(theirs)
    whole = sum(
        (end * cotangent_of(i, end, beside_number=loss)).sum() for i, end in enumerate(ends)
    )
    assert isinstance(whole, Tensor)
    whole.backward()
    for name, leaf in theirs.items():
        found = results[f"gradient of {name}"]
        if leaf.grad is None:
            assert found is None
        else:
            torch.testing.assert_close(found, leaf.grad)


def test_beside_a_number_other_outputs_have_one_row() -> None:
    output = torch.empty(5, 3, 4)
    assert len(set(cotangent_of(0, output, beside_number=False).flatten().tolist())) == 60
    row = cotangent_of(0, output, beside_number=True)
    assert row.untyped_storage().nbytes() == 16
    assert cotangent_of(1, torch.empty(4), beside_number=True).stride() == (1,)


def test_cotangents_are_dense_where_no_gradient_is_added() -> None:
    seen = {}

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *tangents: Tensor) -> Tensor:
            seen["stride"] = tangents[0].stride()
            return tangents[0]

    given = leaves()
    Backward([Asks.apply(given["a"]), given["b"].sum()], given)({}, at_once=True)  # type: ignore[no-untyped-call]
    assert seen["stride"] == (4, 1)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_gradient_in_parts_is_not_taken_up_at_once(at_once: bool) -> None:
    """A backward within the backward adds to the same leaf."""
    given = leaves()

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *tangents: Tensor) -> Tensor:
            with torch.enable_grad():
                given["b"].sum().backward()
            return tangents[0] * 2

    end = Again.apply(given["a"]) + given["b"]  # type: ignore[no-untyped-call]
    results: dict[str, Tensor | None] = {}
    assert Backward([end], given)(results, at_once=at_once) is not at_once
    if not at_once:
        (cotangent,) = [cotangent_of(0, end, beside_number=False)]
        assert torch.equal(results["gradient of b"], cotangent + 1)


class Nested(nn.Module):
    """Its backward adds to its own weight a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight

        class Again(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, h: Tensor) -> Tensor:
                return h * 1

            @staticmethod
            def backward(ctx: Any, *tangents: Tensor) -> Tensor:
                with torch.enable_grad():
                    (weight * 2).sum().backward()
                return tangents[0]

        return Again.apply(x * weight) + weight  # type: ignore[no-any-return, no-untyped-call]


def test_a_trial_runs_again_where_gradients_come_in_parts() -> None:
    observed = Trial(Nested(), (torch.ones(3),), {}).observe(Nested.forward)
    found = observed.values["gradient of weight"]
    (cotangent,) = [cotangent_of(0, torch.empty(3), beside_number=False)]
    assert found is not None
    torch.testing.assert_close(found, 2 * cotangent + 2)
