"""Forward changes objects whose changes Dynamo does not follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from tests.support.refusals.example import Example, Refusal, Small, Way, small, train


def takes_next(s: Small, h: Tensor) -> Tensor:
    return h * next(s.values)  # type: ignore[call-overload,no-any-return]


def _iterating(kind: Callable[[list[float]], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = small(takes_next)()
        model.values = kind([2.0, 3.0])  # type: ignore[assignment]
        return model

    return make


_TAKEN = Way(small(lambda s, h, value: h * value), lambda model: train(model, 2.0))
_NEXT = "^take the next value outside of the model"

ITERATORS = Refusal(
    "iterators",
    "calls `next()` on an iterator that is not its own",
    "Dynamo does not know what comes next",
    "take the value outside and pass it",
    tuple(
        Example(name, _iterating(kind), "tp_iternext", "next(s.values)", _NEXT, way=_TAKEN)
        for name, kind in (("list", iter), ("cycle", itertools.cycle))
    ),
)


class Words(dict[str, Any]):
    """A dictionary whose items are attributes."""

    __getattr__ = dict.__getitem__


SPACE, WORDS = SimpleNamespace(calls=0), Words(factor=2)


def writes_space(s: Small, h: Tensor) -> Tensor:
    SPACE.calls += 1
    return h * 2


def calls(h: Tensor) -> Tensor:
    calls.count += 1  # type: ignore[attr-defined]
    return h * 2


calls.count = 0  # type: ignore[attr-defined]


class Own:
    def __init__(self) -> None:
        self.calls = 0


OWN = Own()


def writes_own(s: Small, h: Tensor) -> Tensor:
    OWN.calls += 1
    return h * 2


_OWN = Way(small(writes_own))

STATES = Refusal(
    "states",
    "changes a `SimpleNamespace` or an attribute of a function, or reads a dictionary by "
    "`__getattr__ = dict.__getitem__`",
    "Dynamo does not follow these",
    "a small class; an attribute of the model",
    (
        Example(
            "space", small(writes_space), "method call", "SPACE.calls", "^use a small", way=_OWN
        ),
        Example(
            "function",
            small(lambda s, h: calls(h)),
            r"setattr\(\)",
            "calls.count",
            "attribute of the model",
            way=_OWN,
        ),
        Example(
            "dictionary",
            small(lambda s, h: h * WORDS.factor),
            "__getattr__",
            "WORDS.factor",
            "^use a small",
            way=_OWN,
        ),
    ),
)

ALL = (ITERATORS, STATES)
