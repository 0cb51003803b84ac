"""Every way in which a weight changes is seen, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.runtime.frozen.unchanged import SAMPLE, Weights, WhileUnchanged

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool]


def _moving_average(weight: Tensor) -> None:
    weight.data.mul_(0.5).add_(0.25)


def _assigned(weight: Tensor) -> None:
    weight.data = weight.data.clone()


def _through_a_view(weight: Tensor) -> None:
    weight.detach().view(-1)[3:].neg_()


def _by_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[...] += 1


def _in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight[0, 0] += 1


def _nan(weight: Tensor) -> None:
    weight.data.fill_(float("nan"))


def _negative_zero(weight: Tensor) -> None:
    weight.data.copy_(weight.data.zero_().neg())


def _swapped(weight: Tensor) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(torch.ones_like(weight)))


CHANGES = [
    *(_moving_average, _assigned, _through_a_view, _by_numpy, _in_place, _nan),
    *(_negative_zero, _swapped),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_change_of_any_weight_is_seen_once(change: Callable[[Tensor], None], place: int) -> None:
    weights = [nn.Parameter(torch.randn(n, 9)) for n in (3, 40, 300)]
    known = Weights()
    assert not known.are(weights)
    assert known.are(weights)
    change(weights[place])
    assert not known.are(weights)
    assert known.are(weights)


def test_another_tensor_with_the_same_numbers_is_another_weight() -> None:
    first, second = torch.ones(4), torch.ones(4)
    known = Weights()
    assert not known.are([first])
    assert not known.are([second])
    assert not known.are([second, first])
    assert not known.are([second])


def test_memory_of_a_weight_that_is_replaced_is_not_given_to_the_next_one() -> None:
    weight = nn.Parameter(torch.randn(1000))
    known = Weights()
    assert not known.are([weight])
    for _ in range(5):
        weight.data = weight.data.clone()  # the same numbers, at a new address
        assert not known.are([weight])


def _laid_out(shape: list[int], form: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(0, 2, shape, generator=generator).to(dtype)
    match form:
        case "transposed":
            return value.transpose(0, -1)
        case "behind others":  # at an address that is a multiple of the element's size only
            return torch.cat([value.flatten()[:1], value.flatten()])[1:].view(shape)
        case "every other":
            return torch.stack([value, value], -1)[..., 0]
        case "repeated":
            return value[:1].expand(shape)
        case _:
            return value


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=3),
            st.sampled_from(["plain", "transposed", "behind others", "every other", "repeated"]),
            st.sampled_from(DTYPES),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 99),
)
def test_each_byte_of_spread_elements_counts(
    given_: list[tuple[list[int], str, torch.dtype]], seed: int
) -> None:
    weights = [_laid_out(shape, form, dtype, seed) for shape, form, dtype in given_]
    known = Weights()
    assert not known.are(weights)
    assert known.are(weights)
    for weight in weights:
        memory = _memory(weight)
        size, reach = memory.shape[1], memory.shape[0]
        for element in range(0, reach, max(1, reach // SAMPLE)):
            memory[element, (element + seed) % size] ^= 1  # behind autograd's back
            assert not known.are(weights)
            assert known.are(weights)


def _memory(weight: Tensor) -> Any:
    """The bytes of a weight and of what lies between its elements; a row is an element."""
    if not weight.numel():
        return np.zeros((0, 1), np.uint8)
    reach = 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
    values = weight.as_strided((reach, 1), (1, 1))
    return values.view(torch.uint8).numpy()


def test_prologue_runs_again_when_it_must() -> None:
    runs = []

    def prologue(weights: list[Tensor]) -> list[Tensor]:
        runs.append(1)
        return [weight * 2 for weight in weights]

    weight, held = torch.ones(3), torch.zeros(3)
    run = WhileUnchanged(prologue, lambda given: [given[0] + held], [1], [held])
    x = torch.ones(3)
    assert torch.equal(run([x, weight])[0], torch.full((3,), 3.0))
    assert torch.equal(run([x, weight])[0], torch.full((3,), 3.0))
    assert len(runs) == 1
    weight.data.add_(1)
    assert torch.equal(run([x, weight])[0], torch.full((3,), 5.0))
    assert len(runs) == 2
