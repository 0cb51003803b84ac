"""Numbers that forward reads off tensors, and sizes that depend on data: as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.support.as_graph import assert_equal, assert_same_steps, squares, step, twins

Body = Callable[[Tensor, Tensor], Any]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.body(self.lin(x), mask)


def _calls() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(5, 4), torch.arange(5) <= i) for i in range(4)]


def _first(h: Tensor, mask: Tensor) -> Tensor:
    return h[: int(mask.sum())].square()


def _selected(h: Tensor, mask: Tensor) -> Tensor:
    index = mask.nonzero().squeeze(1)
    return torch.zeros(5, 4).index_add(0, index, h[index].relu())


def _written(h: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[mask] = h[mask] * 2
    return out


NUMBERS: dict[str, Body] = {
    "logged": lambda h, m: (h, h.detach().mean().item(), int(m.sum())),
    "flag": lambda h, m: (h, bool(torch.isnan(h).any())),
    "integers": lambda h, m: (h, h.argmax(1).tolist()),
    "floats": lambda h, m: (h, h.detach().mean(1).tolist()),
    "divides": lambda h, m: h / m.sum().item(),
    "scales": lambda h, m: h * h.detach().abs().max().item(),
    "clips": lambda h, m: h / max(1.0, h.detach().norm().item()),
}
SIZES: dict[str, Body] = {
    "length": _first,
    "mask": lambda h, m: h[m],
    "two outputs": lambda h, m: (h[m].exp(), h.sum()),
    "nonzero": _selected,
    "assigned": _written,
    "repeated": lambda h, m: torch.repeat_interleave(h, m.long() + 1, dim=0),
    "product": lambda h, m: h[m] @ h[m].t(),
    "joined": lambda h, m: torch.cat([h[m], h]),
    "size": lambda h, m: h[m].sum() / h[m].shape[0],
}


@pytest.mark.parametrize("name", [*NUMBERS, *SIZES])
def test_steps_are_eager_s(name: str) -> None:
    assert_same_steps(Model((NUMBERS | SIZES)[name]), _calls())


@pytest.mark.parametrize("name", [*NUMBERS, *SIZES])
def test_graphs_keep_the_invariants(name: str) -> None:
    verify(capture(Model((NUMBERS | SIZES)[name]), _calls()[2]).graph)


@pytest.mark.parametrize("name", list(NUMBERS))
def test_texts_hold_numbers(name: str) -> None:
    text = print_graph(capture(Model(NUMBERS[name]), _calls()[2]).graph)
    assert print_graph(parse_graph(text)) == text


def test_output_of_unknown_size_without_tangent() -> None:
    plain, graph = twins(Model(lambda h, m: (h[m], h)))
    for args in _calls():
        for loss in (squares, lambda out: out[1].sum(), lambda out: out[0].sum()):
            expected = step(plain, plain, *args, loss=loss)
            assert_equal(expected, step(graph, graph.model, *args, loss=loss))


def test_backward_of_a_custom_function_reads_a_number() -> None:
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g / max(1.0, g.norm().item())

    assert_same_steps(Model(lambda h, m: Clip.apply(h)), _calls())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logged", "divides", "mask", "assigned"])
def test_inductor(name: str) -> None:
    plain, graph = twins(Model((NUMBERS | SIZES)[name]), backend="inductor")
    for args in _calls():
        expected = step(plain, plain, *args, loss=squares)
        actual = step(graph, graph.model, *args, loss=squares)
        torch.testing.assert_close(actual, expected)
