"""The propagation rules of TensorFlow's pass, on the traces that its source describes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.graph import operator_name
from graphopt.passes.precision.formats import FORMATS
from graphopt.passes.precision.problem import find_problem
from graphopt.passes.precision.rules import kinds
from graphopt.passes.precision.tf import propagate


def _lowered(body: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[str, bool]]:
    """Each operator of an inference graph, in order, and whether the rules lower it."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return body(x, self.w)

    with torch.no_grad():
        graph = capture(Body().eval(), (torch.randn(4, 4),)).graph
    problem = find_problem(graph, FORMATS["bf16"], frozenset())
    low = propagate(problem, kinds(graph, FORMATS["bf16"]))
    names = ((operator_name(n).split(".")[1], n in low) for n in graph.operators)
    return [(name, is_low) for name, is_low in names if name != "detach"]


def test_what_is_unsafe_spreads_up_to_a_trailing_run_of_clear_operators() -> None:
    """deny, infer, clear, infer, clear, allow: all but the last two stay in float32."""
    found = _lowered(lambda x, w: ((x.exp() + 1).relu().tanh().relu()) @ w)
    names = ["exp", "add", "relu", "tanh", "relu", "mm"]
    assert found == list(zip(names, [False, False, False, False, True, True], strict=True))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x, w: ((x @ w) + 1).relu() @ w, [True, True, True, True]),
        (lambda x, w: (x + 1) @ w, [False, True]),
        (lambda x, w: x.relu() @ w, [True, True]),
        (lambda x, w: (x @ w).relu(), [True, True]),
        (lambda x, w: (x @ w).tanh(), [True, False]),
        (lambda x, w: (x @ w).exp() @ w, [True, False, True]),
        (lambda x, w: x.exp() + 1, [False, False]),
    ],
    ids=[
        "between allowed ones",
        "infer before",
        "clear before",
        "clear after",
        "infer after",
        "an unsafe one between",
        "nothing to gain",
    ],
)
def test_rules(body: Callable[[Tensor, Tensor], Tensor], expected: list[bool]) -> None:
    assert [low for _, low in _lowered(body)] == expected
