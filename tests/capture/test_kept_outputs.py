"""Captures of forwards that return objects of classes, as a later process finds them again."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.capture.kept import Misfit, Store, Unreadable, classes
from graphopt.capture.kept.building import logs_around
from graphopt.capture.kept.fingerprints import Fingerprints
from graphopt.capture.kept.logs import read_logs
from graphopt.capture.kept.results import maker
from graphopt.model.surface import report
from tests.capture.test_kept import Process, route
from tests.capture.test_kept_damaged import body, signed

# The base class behaves like that of transformers: a dictionary and its fields at once.
CLASSES = """
import collections
import dataclasses
import inspect
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple
import torch
from torch import nn

NOTES = []
LOGGER = logging.getLogger("kept_outputs")

class Base(OrderedDict):
    def __post_init__(self):
        for each in dataclasses.fields(self):
            value = self.__dict__.get(each.name)
            if value is not None:
                self[each.name] = value
    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]
    def __setattr__(self, name, value):
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)
    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)
    def to_tuple(self):
        return tuple(self[key] for key in self.keys())

class Mixed:
    pass

@dataclass
class Output(Base):
    loss: Any = None
    logits: Any = None
    states: Any = None
    inner: Any = None

@dataclass
class Plain:
    out: Any
    number: float = 1.5
    names: list = field(default_factory=lambda: ["a", "b"])
    def twice(self):
        return self.out * 2

@dataclass(frozen=True)
class Frozen:
    out: Any
    same: Any = None

@dataclass(slots=True)
class Slots:
    out: Any
    more: Any = ()

@dataclass
class Counting:
    out: Any
    total: Any = dataclasses.field(init=False)
    def __post_init__(self):
        self.total = self.out.sum()

class Pair(NamedTuple):
    first: Any
    second: Any = None

Old = collections.namedtuple("Old", "a b")

@dataclass
class Extra:
    out: Any
    def __post_init__(self):
        self.hidden = 1

@dataclass
class Closing:
    out: Any
    def __del__(self):
        NOTES.append("closed")

@dataclass
class Talking:
    out: Any
    def __post_init__(self):
        print("made")

@dataclass
class Noting:
    out: Any
    def __post_init__(self):
        NOTES.append(1)

class Counted(dict):
    pass

def _made():
    @dataclass
    class Inner:
        out: Any
    return Inner

Inner = _made()

def __getattr__(name):
    print("made", name)
    raise AttributeError(name)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.old = Plain(None)
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        y = self.linear(x)
        RETURN
"""
# What is returned, by what it is.
RETURNS = {
    "output": "return Output(loss=y.sum(), logits=y)",
    "nested": "return Output(y, states=(y, x), inner=Output(logits=y, states={'x': x}))",
    "assigned": "out = Output(logits=y); out['states'] = (y + 1,); out.loss = y.sum(); return out",
    "dataclass": "return Plain(y)",
    "frozen": "return Frozen(y, x)",
    "slots": "return Slots(out=y, more=[x, None])",
    "fields that are computed": "return Counting(y)",
    "named tuple": "return Pair(y, Old(x, b=(y * 3,)))",
    "return type": "return torch.max(y, 1)",
    "return types in a list": "return [y.sort(dim=1), torch.topk(y, 2)]",
    "ordered": "return OrderedDict([('z', y), ('a', OrderedDict(b=x))])",
    "dtype and device": "return Plain(y, number=y.dtype, names=[y.device])",
}
X = torch.ones(2, 4)


def net(folder: Path, returned: str, old: str = "", new: str = "") -> Any:
    """A model as a new process reads it."""
    text = CLASSES.replace("RETURN", returned)
    assert old in text
    return Process(folder).net(text.replace(old, new, 1))


def called(model: nn.Module) -> tuple[Any, Any]:
    """What a call of the optimized model returns, and what is said of its capture."""
    graphopt.optimize(model, backend="eager", cache="captures", verify="off")
    return model(X), report(model).specialisations[-1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def described(value: Any) -> Any:
    """Everything of a value: classes by name, order, and tensors by their elements."""
    if isinstance(value, Tensor):
        return value.requires_grad, value.tolist()
    if not isinstance(value, tuple | list | dict) and not dataclasses.is_dataclass(value):
        return repr(value)
    told: list[Any] = [type(value).__module__, type(value).__qualname__]
    if isinstance(value, OrderedDict):
        told += [(key, described(OrderedDict.__getitem__(value, key))) for key in value]
    elif isinstance(value, dict):
        told += [(key, described(item)) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        told += map(described, value)
    if dataclasses.is_dataclass(value):
        told += [(f.name, described(getattr(value, f.name))) for f in dataclasses.fields(value)]
    return [*told, *getattr(value, "__dict__", ())]


@pytest.mark.parametrize("name", RETURNS)
def test_objects_of_a_class_are_made_again(folder: Path, name: str) -> None:
    _, first = called(net(folder, RETURNS[name]))
    assert (first.route, first.unkept) == ("dynamo", "")
    model = net(folder, RETURNS[name])
    eager = model(X)
    value, again = called(model)
    assert again.route == "kept"
    assert type(value) is type(eager)
    assert described(value) == described(eager)
    assert model(X) is not value


def test_items_and_fields_of_an_object_are_the_same_ones(folder: Path) -> None:
    """Later writes reach both, as in eager."""
    returned = "return Output(logits=y, states=(y, [x]))"
    called(net(folder, returned))
    model = net(folder, returned)
    value, again = called(model)
    assert again.route == "kept"
    assert value["states"] is value.states
    assert value.logits is value[0] is value.states[0]
    assert value.states[1][0] is X
    value["loss"] = 1
    assert value.loss == 1
    assert list(value) == ["logits", "states", "loss"]
    value.logits.sum().backward()
    assert model.linear.weight.grad.tolist() == [[2.0] * 4] * 4


# In one line each, so that no other code is another one.
CHANGES = [
    ("dataclass", "number: float = 1.5", "number: float = 2.5"),  # a default
    ("dataclass", '["a", "b"]', '["a", "c"]'),  # what makes one
    ("dataclass", "number: float = 1.5", "number: float = 1.5; more: Any = None"),  # a field
    ("dataclass", "return self.out * 2", "return self.out * 3"),  # a method
    ("output", "    states: Any = None", "    states: Any = 0"),
    ("output", "return tuple(self[key]", "return list(self[key]"),  # one of a base
    ("output", "class Output(Base)", "class Output(Base, Mixed)"),  # a base
    ("frozen", "@dataclass(frozen=True)", "@dataclass(frozen=True, eq=False)"),
    ("named tuple", "second: Any = None", "second: Any = 1"),
    ("named tuple", '"Old", "a b"', '"Old", "c b"'),
]


@pytest.mark.parametrize(("name", "old", "new"), CHANGES, ids=str)
def test_a_changed_class_is_another_call(folder: Path, name: str, old: str, new: str) -> None:
    x = (X,)
    assert capture(net(folder, RETURNS[name]), x, store=Store()).unkept == ""
    assert route(net(folder, RETURNS[name]), X) == "kept"
    assert route(net(folder, RETURNS[name], old, new), X) == "dynamo"


@pytest.mark.parametrize(("name", "old", "new"), CHANGES, ids=str)
def test_a_changed_class_is_told_by_itself(folder: Path, name: str, old: str, new: str) -> None:
    """Whether or not forward has a condition on it."""
    kinds = {"output": "Output", "dataclass": "Plain", "frozen": "Frozen", "named tuple": "Pair"}
    kind = "Old" if "Old" in old else kinds[name]
    net(folder, "pass")
    row = classes.row_of(getattr(sys.modules["kept_module"], kind), Fingerprints())
    net(folder, "pass")
    assert classes.read_classes([row], Fingerprints())[0].__name__ == kind
    net(folder, "pass", old, new)
    with pytest.raises(Misfit, match=f"kept_module.{kind} has changed"):
        classes.read_classes([row], Fingerprints())


def _class(entry: Any, *row: object) -> Any:
    told = list(row) + entry["classes"][0][len(row) :]
    return {**entry, "classes": [told, *entry["classes"][1:]]}


def _returned(entry: Any, data: object) -> Any:
    return {**entry, "returns": data}


ONE = {"constant": 1}
POISONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a class of another kind": (
        lambda e: _class(e, "subprocess", "Popen"),
        "subprocess.Popen is no class of results",
    ),
    "a function": (lambda e: _class(e, "os", "system"), "os.system is no class of results"),
    "a module that is not there": (
        lambda e: _class(e, "antigravity", "Output"),
        "antigravity.Output is no class of results",
    ),
    "a name within a function": (
        lambda e: _class(e, "kept_module", "Net.forward.x"),
        "kept_module.Net.forward.x is no class of results",
    ),
    "what a module makes when asked": (
        lambda e: _class(e, "kept_module", "Lazy"),
        "kept_module.Lazy is no class of results",
    ),
    "other fields": (
        lambda e: _class(e, *e["classes"][0][:2], ["out", "more"]),
        "kept_module.Plain has other fields",
    ),
    "no name": (lambda e: _class(e, 1), "a class without a name"),
    "no row": (lambda e: {**e, "classes": [["os"]]}, "a class that cannot be read"),
    "no classes": (lambda e: {**e, "classes": None}, "it has no classes"),
    "an attribute that is no field": (
        lambda e: _returned(e, {"object": [0, [["twice", ONE]], []]}),
        "it returns a Plain with other fields",
    ),
    "a field twice": (
        lambda e: _returned(e, {"object": [0, [["out", ONE], ["out", ONE]], []]}),
        "it returns a Plain with other fields",
    ),
    "items of no dictionary": (
        lambda e: _returned(e, {"object": [0, [["out", ONE]], ["out"]]}),
        "it returns a Plain with other items",
    ),
    "a tuple of a class of another kind": (
        lambda e: _returned(e, {"fields": [0, [ONE]]}),
        "it returns a Plain with other fields",
    ),
    "an object of no class": (
        lambda e: _returned(e, {"object": [1, [], []]}),
        "it returns an object of no class",
    ),
    "a type that is none": (
        lambda e: _returned(e, {"dtype": "load"}),
        "what forward returns cannot be read",
    ),
    "a device that is none": (
        lambda e: _returned(e, {"device": "abacus"}),
        "what forward returns cannot be read",
    ),
}


@pytest.mark.parametrize("name", POISONS)
def test_a_poisoned_class_is_a_miss_and_imports_nothing(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = RETURNS["dataclass"]
    assert capture(net(folder, returned), (X,), store=Store()).unkept == ""
    (file,) = (folder / "cache").rglob("*.json")
    poison, reason = POISONS[name]
    file.write_text(signed(file, poison(body(file))))
    model = net(folder, returned)
    before = set(sys.modules)
    with pytest.warns(RuntimeWarning, match="a kept capture is damaged") as said:
        assert capture(model, (X,), store=Store()).route == "dynamo"
    assert len(said) == 1
    assert reason in str(said[0].message)
    assert capsys.readouterr().out == ""
    assert set(sys.modules) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was replaced
        assert capture(net(folder, returned), (X,), store=Store()).route == "kept"


@dataclasses.dataclass
class Failed(Exception):
    """Not made by `object.__new__`."""

    out: Any = None


def test_an_object_that_is_made_otherwise_is_seen_before_a_call() -> None:
    data = {"object": [0, [["out", ONE]], []]}
    with pytest.raises(Unreadable, match="it returns a Failed, which is not made so"):
        maker(data, 0, {}, [Failed])


OBJECT = "forward returns an object of class"
AROUND = "forward does more around its graph than take inputs and return results"


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("return Extra(y)", f"{OBJECT} Extra with 'hidden', which is no plain field"),
        ("return Closing(y)", f"{OBJECT} Closing"),
        ("return Counted(out=y)", f"{OBJECT} Counted"),
        ("return Inner(y)", "forward returns an object of _made.<locals>.Inner, which is in no "
         "module"),
        ("return Talking(y)", AROUND),
        ("return Noting(y)", "forward changes Python objects"),
        ("return y, self.old", "forward returns a list, a dictionary or an object that was there "
         "before"),
        ("z = [y]; return z, z", "forward returns the same list twice"),
        ("z = Plain(y); return z, z", "forward returns the same Plain twice"),
        ("out = Output(y); OrderedDict.__setitem__(out, 'x', y); return out",
         f"{OBJECT} Output with items that are no fields"),
    ],
)  # fmt: skip
def test_what_is_no_such_object_says_why(folder: Path, returned: str, reason: str) -> None:
    made = capture(net(folder, returned), (X,), store=Store())
    assert (made.route, made.unkept) == ("dynamo", reason)


def test_what_is_logged_is_logged_by_a_kept_call(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    returned = "LOGGER.warning('use %s', 'another'); return Plain(y)"
    said = []
    for wanted in ("dynamo", "kept"):
        model = net(folder, returned)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="kept_outputs"):
            graphopt.optimize(model, backend="eager", cache="captures", verify="off")
            for _ in range(2):
                model(X)
        assert report(model).specialisations[-1].route == wanted
        said.append([r.getMessage() for r in caplog.records if r.name == "kept_outputs"])
    assert said == [["use another"] * 2] * 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["kept_outputs", "setLevel", [0]], "a message of no logger"),
        (["kept_outputs", "warning", [["x"]]], "a message of no logger"),
        (["nobody", "warning", ["x"]], "a message of no logger"),
        (["kept_outputs", "warning"], "a message that cannot be read"),
    ],
)
def test_only_loggers_log(row: list[Any], reason: str) -> None:
    logging.getLogger("kept_outputs")
    with pytest.raises(Misfit, match=reason):
        read_logs([row])
    assert "nobody" not in logging.root.manager.loggerDict


def test_functions_of_python_are_the_same_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo has no conditions on them."""
    returned = "return y * len(inspect.signature(self.linear.forward).parameters)"
    assert capture(net(folder, returned), (X,), store=Store()).unkept == ""
    assert route(net(folder, returned), X) == "kept"
    model = net(folder, returned)
    own = inspect.isfunction
    monkeypatch.setattr(inspect, "isfunction", lambda value: own(value))
    assert route(model, X) == "dynamo"


def _code(text: str) -> CodeType:
    scope: dict[str, Any] = {}
    exec(f"def f(x):\n    {text}", scope)
    return scope["f"].__code__  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "builds"),
    [
        ("return graph(x)", True),
        ("y = graph(x); z = object.__new__(x); z.a = y[0]; return z", True),
        # As it fills the dictionary of an object whose class has a `__setitem__`.
        ("y = graph(x); d = type(x); d.clear(x); return (y[0], [1], {'a': y[1]})", True),
        ("for k, v in {}.items(): (1, 2).clear(k)\n    return (graph(x), 1)", True),
        ("return x", False),
        ("return graph(graph(x))", False),
        ("print(x); return graph(x)", False),
        ("return graph(x), x.clear()", False),
        ("y = graph(x); x[0] = y; return y", False),
        ("f = print; f(1); return graph(x)", False),
        ("return graph(*x)", False),
        ("return graph(x, y=1)", False),
    ],
)
def test_bytecode_that_does_more_is_seen(text: str, builds: bool) -> None:
    assert logs_around(_code(text), "graph", {}) == ([] if builds else None)
