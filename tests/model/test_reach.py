"""State that classes, functions, threads and iterators keep: a trial leaves it as it was."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import GraphoptError
from graphopt.model.iterators import copy_of_iterator
from graphopt.model.trial import Trial

# What forward asks for a number, and what shows how often it has been asked.
Kind = tuple[Callable[[], float], Callable[[], object]]


class Scales(nn.Module):
    """Multiplies by what `number` gives; cannot be captured if it `branches`."""

    def __init__(self, number: Callable[[], float], branches: bool = False) -> None:
        super().__init__()
        self.l = nn.Linear(2, 2)
        self.number, self.branches = number, branches

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x) * self.number()
        if self.branches and h.sum() > 1e9:
            return h * 2
        return h


def _attribute_of_a_class() -> Kind:
    class Base:
        calls = 0

    class Derived(Base):
        pass

    def number() -> float:
        Base.calls += 1
        Derived.own = getattr(Derived, "own", 0) + 2  # type: ignore[attr-defined]
        return Base.calls + Derived.own  # type: ignore[attr-defined, no-any-return]

    return number, lambda: (Base.calls, vars(Derived).get("own"))


def _class_method() -> Kind:
    class Stats:
        n = 0

        @classmethod
        def tick(cls) -> float:
            cls.n += 1
            return cls.n

    return lambda: Stats.tick(), lambda: Stats.n


def _dictionary_of_a_class() -> Kind:
    class Stats:
        table: ClassVar[dict[str, int]] = {}

        @staticmethod
        def tick() -> float:
            Stats.table["n"] = Stats.table.get("n", 0) + 1
            return Stats.table["n"]

    return lambda: Stats.tick(), lambda: dict(Stats.table)


def _singleton() -> Kind:
    class One:
        made: ClassVar[Any] = None
        n: int

        def __new__(cls) -> One:
            if cls.made is None:
                cls.made = object.__new__(cls)
                cls.made.n = 0
            return cls.made  # type: ignore[no-any-return]

    def number() -> float:
        one = One()
        one.n += 1
        return one.n

    return number, lambda: None if One.made is None else One.made.n


def _local_of_a_thread() -> Kind:
    local = threading.local()
    local.n = 0

    def number() -> float:
        local.n += 1
        return local.n  # type: ignore[no-any-return]

    return number, lambda: local.n


def _weak_dictionary() -> Kind:
    key = nn.Linear(1, 1)
    table: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

    def number() -> float:
        table[key] = table.get(key, 0) + 1
        return table[key]

    return number, lambda: [*table.values()]


def _iterator_in_a_closure() -> Kind:
    numbers = iter(range(1, 100))
    return lambda: next(numbers), lambda: numbers.__reduce__()[2:]  # type: ignore[index]


class Counts:
    n = 0


def _class_of_a_module() -> Kind:
    Counts.n = 0

    def number() -> float:
        Counts.n += 1
        return Counts.n

    return number, lambda: Counts.n


NUMBERS = iter(range(0))


class Holds:
    n = 0


HOLDS = Holds()


def _object_of_a_module() -> Kind:
    HOLDS.n = 0
    return _helper, lambda: HOLDS.n


def _helper() -> float:
    return _another()


def _another() -> float:
    HOLDS.n += 1
    return HOLDS.n


def _iterator_of_a_module() -> Kind:
    global NUMBERS
    NUMBERS = iter(range(1, 100))
    return lambda: next(NUMBERS), lambda: NUMBERS.__reduce__()[2:]  # type: ignore[index]


COUNT = 0


def _global_variable() -> Kind:
    global COUNT
    COUNT = 0

    def number() -> float:
        global COUNT
        COUNT += 1
        return COUNT

    return number, lambda: COUNT


KINDS = {
    make.__name__.strip("_"): make
    for make in (
        *(_attribute_of_a_class, _class_method, _dictionary_of_a_class, _singleton),
        *(_local_of_a_thread, _weak_dictionary, _iterator_in_a_closure, _class_of_a_module),
        *(_object_of_a_module, _iterator_of_a_module, _global_variable),
    )
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@each_kind
def test_calls_give_what_eager_gives(kind: Callable[[], Kind]) -> None:
    found = []
    for optimize in (lambda m: m, lambda m: graphopt.optimize(m, backend="eager")):
        torch.manual_seed(0)
        number, state = kind()
        model = optimize(Scales(number))
        found.append([(model(torch.ones(1, 2)).tolist(), state()) for _ in range(4)])
    assert found[0] == found[1]


@each_kind
def test_a_refused_call_changes_nothing(kind: Callable[[], Kind]) -> None:
    number, state = kind()
    before = state()
    model = graphopt.optimize(Scales(number, branches=True), backend="eager")
    for _ in range(2):
        with pytest.raises(GraphoptError):
            model(torch.ones(1, 2))
    assert state() == before


@each_kind
def test_a_trial_changes_nothing(kind: Callable[[], Kind]) -> None:
    number, state = kind()
    before = state()
    Trial(Scales(number), (torch.ones(1, 2),), {}).observe(Scales.forward)
    assert state() == before


def test_classes_of_modules_and_attributes_of_functions_are_put_back() -> None:
    def number() -> float:
        number.calls += 1  # type: ignore[attr-defined]
        return 1.0

    number.calls = 0  # type: ignore[attr-defined]

    class Counted(Scales):
        calls = 0
        mean = torch.zeros(2)

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            type(self).new = 1  # type: ignore[attr-defined]
            self.mean.add_(1)
            return super().forward(x)

    model = Counted(number)
    Trial(model, (torch.ones(1, 2),), {}).observe(Counted.forward)
    assert number.calls == 0  # type: ignore[attr-defined]
    assert (Counted.calls, hasattr(Counted, "new")) == (0, False)
    assert Counted.mean.tolist() == [0, 0]


def test_what_a_registry_of_a_class_knows_too_is_still_exchanged() -> None:
    class Registered(Scales):
        made: ClassVar[list[nn.Module]] = []

    model = Registered(lambda: 1.0)
    Registered.made.append(model.l)
    outer = nn.Sequential(nn.Sequential(nn.Sequential(model)))
    observed = Trial(outer, (torch.ones(1, 2),), {}).observe(nn.Sequential.forward)
    assert "gradient of 0.0.0.l.weight" in observed.values
    assert model.l.weight.grad is None


def _generator() -> Iterator[int]:
    yield from range(3)


ITERATORS: dict[str, Callable[[], Iterator[Any]]] = {
    "list": lambda: iter([1, 2, 3]),
    "tuple": lambda: iter((1, 2, 3)),
    "dict": lambda: iter({1: 2, 3: 4}.items()),
    "range": lambda: iter(range(4)),
    "enumerate": lambda: enumerate("abc"),
    "zip": lambda: zip([1, 2, 3], iter("abc"), strict=True),
    "map": lambda: map(float, (1, 2, 3)),
    "reversed": lambda: reversed([1, 2, 3]),
    "cycle": lambda: itertools.cycle(zip("ab", "cd", strict=True)),
    "chain": lambda: itertools.chain([1], iter((2, 3))),
    "islice": lambda: itertools.islice(itertools.count(), 4),
    "repeat": lambda: itertools.repeat(1, 3),
}


@pytest.mark.parametrize("make", ITERATORS.values(), ids=ITERATORS)
@pytest.mark.parametrize("advance", [0, 1, 2, 3])
def test_a_copy_of_an_iterator_goes_on_alone(make: Callable[[], Any], advance: int) -> None:
    original, expected = make(), make()
    for iterator in (original, expected):
        [next(iterator, None) for _ in range(advance)]
    copy = copy_of_iterator(original, {})
    assert copy is not original
    first, second, third = ([*itertools.islice(i, 7)] for i in (copy, original, expected))
    assert first == second == third


def test_iterators_over_one_iterator_stay_so() -> None:
    numbers = iter([1, 2, 3, 4])
    pairs = zip(numbers, numbers, strict=True)
    memo: dict[int, Any] = {}
    copies = copy_of_iterator(pairs, memo), copy_of_iterator(numbers, memo)
    assert next(copies[0]) == (1, 2)
    assert next(copies[1]) == 3
    assert next(numbers) == 1


def test_what_only_goes_forward_is_left_alone() -> None:
    for iterator in (_generator(), map(float, _generator())):
        assert copy_of_iterator(iterator, {}) is iterator
        assert next(iterator) == 0
