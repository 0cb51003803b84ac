"""Deques of limited length in a model: histories and queues of the last few values."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.variables.builder import VariableBuilder

import graphopt
from graphopt.errors import CaptureError
from graphopt.model.controller import controller_of


class History(nn.Module):
    """Keeps something of the last few steps."""

    def __init__(self, limit: int | None = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.last: collections.deque[Tensor] = collections.deque(maxlen=limit)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.keep(h.detach())
        return h + len(self.last) + sum(self.last) + 2 * self.last[0]

    def keep(self, h: Tensor) -> None:
        self.last.append(h.sum())


class Front(History):
    def keep(self, h: Tensor) -> None:
        self.last.appendleft(h.sum())


class Two(History):
    def keep(self, h: Tensor) -> None:
        self.last.extend([h.sum(), h.mean()])


class TwoInFront(History):
    def keep(self, h: Tensor) -> None:
        self.last.extendleft([h.sum(), h.mean()])


class Replaces(History):
    def keep(self, h: Tensor) -> None:
        if len(self.last) == self.last.maxlen:
            self.last.popleft()
        self.last += [h.sum(), h.mean()]


class Anew(History):
    def keep(self, h: Tensor) -> None:
        self.last = collections.deque([*self.last, h.sum()], maxlen=2)


def _made(model: nn.Module) -> int:
    controller = controller_of(model)
    assert controller is not None
    return controller.made


@pytest.mark.parametrize("kind", [History, Front, Two, TwoInFront, Replaces, Anew])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_full_deque_drops_what_is_at_its_other_end(kind: type[History], limit: int) -> None:
    plain = kind(limit)
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    own, made = model.last, 0
    for step in range(5):
        x = torch.randn(2, 4)
        outputs = [m(x) for m in (plain, model)]
        assert torch.equal(*outputs)
        assert model.last.maxlen == plain.last.maxlen
        assert [*map(float, model.last)] == [*map(float, plain.last)]
        assert kind is Anew or model.last is own
        if step == 3:
            made = _made(model)
    # Nothing changes any more when the deque is full.
    assert _made(model) == made


def test_another_limit_is_another_kind_of_call() -> None:
    plain = History(2)
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for limit in (2, 2, 3, None):
        for m in (plain, model):
            m.last = collections.deque(m.last, maxlen=limit)
        x = torch.randn(2, 4)
        assert torch.equal(plain(x), model(x))
        assert len(model.last) == len(plain.last)


def test_a_deque_that_holds_nothing_is_refused() -> None:
    class Empty(History):
        def forward(self, x: Tensor) -> Tensor:
            self.keep(x)
            return self.layer(x) + len(self.last)

    model = graphopt.optimize(Empty(0), backend="eager")
    with pytest.raises(CaptureError, match="A deque with maxlen=0 is used") as caught:
        model(torch.randn(2, 4))
    assert "test_deques.py" in caught.value.where


def test_dynamo_may_have_been_in_use_before() -> None:
    VariableBuilder._type_dispatch_impl.cache_clear()
    items = [torch.ones(2)]
    torch.compile(lambda x: x + items[0], backend="eager")(torch.ones(2))
    table = dict(VariableBuilder._type_dispatch())
    test_a_full_deque_drops_what_is_at_its_other_end(History, 2)
    assert VariableBuilder._type_dispatch() == table
