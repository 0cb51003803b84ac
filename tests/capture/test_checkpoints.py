"""Checkpoints within forward and around a call are as in eager, or refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.errors import CaptureError
from graphopt.model import surface
from graphopt.model.controller import controller_of


class Blocks(nn.Module):
    """Two parts, each in a checkpoint; `between` comes after the first."""

    def __init__(self, reentrant: bool, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant, self.between = reentrant, between

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(checkpoint(self.one, x, use_reentrant=self.reentrant))
        result: Tensor = checkpoint(self.two, h, use_reentrant=self.reentrant)
        return result


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.bias


def _gradients(model: nn.Module, x: Tensor) -> list[Any]:
    y = model(x)
    if y.requires_grad:
        y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), x.grad, y.requires_grad]


def _same(make: Callable[[], nn.Module], needs_grad: bool) -> None:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend="eager")
    x = torch.randn(3, 4)
    found, expected = (_gradients(m, x.clone().requires_grad_(needs_grad)) for m in (model, plain))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a is b
    assert controller_of(model).made == 1


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_end_where_those_of_eager_end(reentrant: bool, needs_grad: bool) -> None:
    _same(lambda: Blocks(reentrant), needs_grad)


def test_a_gradient_may_begin_between_two_checkpoints() -> None:
    _same(lambda: Blocks(True, Adds()), needs_grad=False)


def test_a_checkpoint_within_no_grad() -> None:
    class Under(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = checkpoint(self.one, x, use_reentrant=True)
            result: Tensor = checkpoint(self.two, h + self.one.bias, use_reentrant=True)
            return result

    _same(lambda: Under(True), needs_grad=False)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.lin(h)
        if not torch.isfinite(y).all():
            raise ValueError("not finite")
        return y.sigmoid()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_checks_on_values_within_a_checkpoint(backend: str) -> None:
    class Checked(Blocks):
        def __init__(self) -> None:
            super().__init__(False)
            self.one = Asks()  # type: ignore[assignment]

    torch.manual_seed(0)
    model = Checked()
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend=backend)
    x = torch.randn(3, 4)
    torch.testing.assert_close(_gradients(model, x)[1:3], _gradients(plain, x)[1:3])
    with pytest.raises(ValueError, match="not finite"):
        model(x / 0)
    assert controller_of(model).made == 1


# -- around a call ---------------------------------------------------------------------------------


def test_a_first_call_saves_nothing_by_the_callers_hooks() -> None:
    """Two parts of the capture build graphs of autograd; a checkpoint would count their tensors."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x) + self.b(x)

    torch.manual_seed(0)
    for model in (Sums(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())):
        plain = copy.deepcopy(model)
        graphopt.optimize(model, backend="eager")
        x = torch.randn(3, 4, requires_grad=True)
        for m in (model, plain):
            y = checkpoint(m, x, use_reentrant=False)
            assert isinstance(y, Tensor)
            y.square().sum().backward()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        assert controller_of(model).made == 1

    seen: list[type] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(type(t)) or t,
        lambda t: t,  # type: ignore[func-returns-value]
    )
    with hooks:
        graphopt.optimize(Sums(), backend="eager")(torch.randn(3, 4)).sum().backward()
    assert seen
    assert all("Fake" not in kind.__name__ for kind in seen)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.lin(x)
        return y


def test_a_variant_that_counts_is_not_used_within_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = Counts()
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend="eager")
    x = torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    plain(x).sum().backward()
    with pytest.warns(UserWarning, match="changes Python objects"):
        checkpoint(model, x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
    checkpoint(plain, x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
    assert model.calls == plain.calls == 3
    model(x)
    assert "plain PyTorch" in model.explain()
    assert controller_of(model).made == 1  # the counter is an input


def test_a_refused_lazy_module_keeps_waiting() -> None:
    model = graphopt.optimize(nn.Sequential(nn.LazyLinear(4), nn.Tanh()), backend="eager")
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(CaptureError, match="lazy module"):
        checkpoint(model, x, use_reentrant=False)
    assert model[0].has_uninitialized_params()
    model(x)
    checkpoint(model, x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
    surface.restore(model)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin(x) * random.uniform(0.5, 1.5)
        return y


def test_draws_of_python_within_a_checkpoint_are_refused() -> None:
    """Eager draws again in the backward, and only what is saved then changes."""
    model = graphopt.optimize(Draws(), backend="eager")
    x = torch.randn(3, 4, requires_grad=True)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="plain PyTorch"):
        checkpoint(model, x, use_reentrant=False)
