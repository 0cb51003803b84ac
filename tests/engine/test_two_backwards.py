"""Outputs that share nothing may be differentiated one after the other, as in eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Heads(nn.Module):
    """Three outputs; the first two have a common trunk where `shared`."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.actor, self.critic, self.other = nn.Linear(4, 2), nn.Linear(4, 1), nn.Linear(4, 3)
        self.shared = shared

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.trunk(x).tanh() if self.shared else x
        return self.actor(h).tanh(), self.critic(h).exp(), self.other(x).sin()


def _both(shared: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Heads(shared)
    return graphopt.optimize(copy.deepcopy(model), backend="eager"), model


def _run(model: nn.Module, order: tuple[int, ...]) -> list[Tensor | None]:
    outputs = model(torch.linspace(-1, 1, 12).view(3, 4))
    for index in order:
        outputs[index].sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1, 2, 0), (1,)])
def test_independent_outputs(order: tuple[int, ...]) -> None:
    found, expected = (_run(model, order) for model in _both(shared=False))
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("order", [(0, 2), (2, 1), (1, 2)])
def test_what_shares_nothing_beside_what_does(order: tuple[int, ...]) -> None:
    found, expected = (_run(model, order) for model in _both(shared=True))
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("order", [(0, 1), (2, 1, 0), (2, 2)])
def test_what_eager_refuses_raises_its_error(order: tuple[int, ...]) -> None:
    for model in _both(shared=True):
        with pytest.raises(RuntimeError, match="a second time"):
            _run(model, order)


def test_the_same_output_twice_is_refused_after_another_one() -> None:
    for model in _both(shared=False):
        with pytest.raises(RuntimeError, match="a second time"):
            _run(model, (0, 1, 0))


def test_what_is_changed_between_two_backwards_is_refused_as_in_eager() -> None:
    class Deep(Heads):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.actor(x), self.critic(self.trunk(x).tanh())

    torch.manual_seed(0)
    plain = Deep(shared=False)
    for model in (graphopt.optimize(copy.deepcopy(plain), backend="eager"), plain):
        for changed in ("actor", "critic"):
            actor, critic = model(torch.ones(3, 4))
            actor.sum().backward()
            with torch.no_grad():
                model.get_submodule(changed).weight.mul_(2)  # type: ignore[operator, union-attr]
            if changed == "actor":
                critic.sum().backward()
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    critic.sum().backward()


def test_what_is_kept_goes_with_the_outputs() -> None:
    ours, _ = _both(shared=False)
    actor, critic, other = ours(torch.ones(3, 4))
    node = actor.grad_fn
    actor.sum().backward()
    assert node.kept
    critic.sum().backward()
    assert node.kept
    other.sum().backward()
    assert not node.kept


def test_a_detached_input_among_the_outputs() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.detach(), x, x.detach().view(-1), self.lin(x)

    torch.manual_seed(0)
    model = Returns()
    gradients = []
    for m in (graphopt.optimize(copy.deepcopy(model), backend="eager"), model):
        leaf = torch.ones(3, 4, requires_grad=True)
        outputs = m(leaf * 2)
        assert [t.requires_grad for t in outputs] == [False, True, False, True]
        sum(t.square().sum() for t in outputs).backward()  # type: ignore[union-attr]
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
