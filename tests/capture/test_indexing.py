"""Indexing where sizes are symbols: the operators that eager runs, and its bits."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import Capture, capture
from graphopt.capture.sizes import Dimensions
from graphopt.model.controller import controller_of

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x[:],
    "select": lambda x: x[:, 0],
    "new dimensions": lambda x: x[:, None, :, None],
    "ellipsis": lambda x: x[..., None, :, 1],
    "a part": lambda x: x[:, 1:, ::2],
    "up to its size": lambda x: x[: x.shape[0], :, : x.shape[2] + 3],
    "tensors": lambda x: x[:, torch.tensor([1, 0, 1])],
    "tensors apart": lambda x: x[None, torch.tensor([1, 0]), :, torch.tensor([0, 2])],
    "last": lambda x: x[-1, :, :],
}


class Indexed(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.form = nn.Linear(4, 4), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.lin(x)).sin()


def _views(found: Capture) -> Counter[str]:
    names = (str(node.target) for node in found.graph.operators)
    kinds = ("slice", "alias", "select", "index", "unsqueeze", "squeeze")
    return Counter(name for name in names if name.partition(".")[2].startswith(kinds))


@pytest.mark.parametrize("name", FORMS)
def test_as_many_operators_as_without_symbols(name: str) -> None:
    model, x = Indexed(FORMS[name]), torch.randn(6, 3, 4)
    names = {0: "x.0", 1: "x.1"}
    symbolic = capture(model, (x,), dimensions=Dimensions({id(x): names}))
    assert any(not size.fixed for size in symbolic.sizes)
    assert _views(symbolic) == _views(capture(model, (x,)))


def test_bits_at_other_sizes() -> None:
    def all_of_them(h: Tensor) -> Tensor:
        return torch.stack([form(h).sin().sum() for form in FORMS.values()])

    plain = Indexed(all_of_them)
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for n in (4, 7, 3):
        x = torch.randn(n, 3, 4)
        results = []
        for m in (model, plain):
            m.zero_grad()
            y = m(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in m.parameters())])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert controller_of(model).made == 2
