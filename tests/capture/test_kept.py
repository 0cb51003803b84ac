"""Captures that a later process finds again, and what makes a call another one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.capture.kept import Store

TEXT = """
import functools
import torch
from torch import nn
from torch.nn import functional as F

SCALE = 2.0
WORDS = {"gain": 1.5}

def helper(x, power=2):
    return inner(x) ** power

def inner(x):
    return x + 1.0

def noted(function):
    @functools.wraps(function)
    def call(self, x):
        return function(self, x) * 1.0
    return call

def made(factor):
    return lambda x: x * factor

outer = made(3.0)

class Block(nn.Module):
    slope = 0.5
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.p = 0.25
    @noted
    def forward(self, x):
        x = F.leaky_relu(self.norm(self.linear(x)), self.slope)
        return F.dropout(x, self.p, self.training)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()
        self.bias = nn.Parameter(torch.zeros(4))
        self.gain = 1.0
        self.names = ["first", "second"]
        self.use = helper
    def forward(self, x, extra=None):
        y = self.second(self.first(x)) * self.gain * WORDS["gain"]
        if len(self.names) > 2:
            y = y * 2.0
        y = self.use(y) * SCALE + outer(self.bias)
        return {"out": y, "same": x, "two": (y.sum(), 3)}
"""


class Process:
    """A module of source code, read as a new process reads it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "kept_module.py"

    def module(self, text: str = TEXT) -> ModuleType:
        self.file.write_text(text)
        spec = importlib.util.spec_from_file_location("kept_module", self.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["kept_module"] = module
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            code = compile(text, str(self.file), "exec")
            exec(code, module.__dict__)
        finally:
            sys.dont_write_bytecode = before
        return module

    def net(self, text: str = TEXT) -> nn.Module:
        torch.manual_seed(0)
        return self.module(text).Net()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process, and a folder in which it has kept its capture."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        process = Process(folder)
        made = capture(process.net(), (torch.ones(2, 4),), store=Store())
        assert (made.route, made.unkept) == ("dynamo", "")
    return process, folder / "cache"


@pytest.fixture
def process(kept: Any, monkeypatch: pytest.MonkeyPatch) -> Process:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept[1]))
    return kept[0]  # type: ignore[no-any-return]


class Captured(Exception):
    """Nothing was found."""


def route(net: nn.Module, *args: Any) -> str:
    """Where the capture of a call comes from; one by Dynamo is not carried out."""
    with pytest.MonkeyPatch.context() as patch:

        def by_dynamo(*args: object, **kwargs: object) -> object:
            raise Captured

        patch.setattr(sys.modules[capture.__module__], "by_dynamo", by_dynamo)
        try:
            return capture(net, args or (torch.ones(2, 4),), store=Store()).route
        except Captured:
            return "dynamo"


def test_an_equal_call_is_found(process: Process) -> None:
    assert route(process.net()) == "kept"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = y * 2.0", "y = y * 4.0"),  # a line of forward, even one that does not run
        ("        return F.dropout", "\n        return F.dropout"),  # its lines move
        ("self.gain * WORDS", "self.gain + WORDS"),
        ("return inner(x) ** power", "return inner(x) * power"),  # a function that it calls
        ("return x + 1.0", "return x + 1.5"),  # and one that this one calls
        ("power=2", "power=3"),  # a default
        ("SCALE = 2.0", "SCALE = 2.5"),  # a global number
        ('"gain": 1.5', '"gain": 1.25'),
        ("slope = 0.5", "slope = 0.75"),  # an attribute of a class
        ("self.p = 0.25", "self.p = 0.5"),  # one of a module within
        ("self.gain = 1.0", "self.gain = 1"),  # another type
        ('["first", "second"]', '["first", "second", "third"]'),
        ("made(3.0)", "made(4.0)"),  # a variable that a function closes over
        ("* 1.0\n    return call", "* 2.0\n    return call"),  # a decorator
        ("nn.Linear(4, 4)", "nn.Linear(4, 4, bias=False)"),
        ("nn.BatchNorm1d(4)", "nn.LayerNorm(4)"),
        ("Block(), Block()", "Block(), nn.Identity()"),
        ("self.use = helper", "self.use = inner"),
    ],
)
def test_changed_code_is_captured_again(process: Process, old: str, new: str) -> None:
    assert old in TEXT
    assert route(process.net(TEXT.replace(old, new, 1))) == "dynamo"


def _tied(net: Any) -> None:
    net.second.linear.weight = net.first.linear.weight


def _patched(net: Any) -> None:
    type(net.first).forward = lambda self, x: self.linear(x)


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda net: setattr(net, "gain", 2.0),
    "new attribute on a module": lambda net: setattr(net.first, "forward", net.second.forward),
    "hook": lambda net: net.first.register_forward_hook(lambda *a: None),
    "hook on a submodule": lambda net: net.second.norm.register_forward_pre_hook(lambda *a: None),
    "frozen parameter": lambda net: net.bias.requires_grad_(False),
    "eval": lambda net: net.eval(),
    "a part in eval": lambda net: net.first.norm.eval(),
    "dtype": lambda net: net.double() and None,
    "tied": _tied,
    "patched class": _patched,
    "replaced function": lambda net: setattr(net, "use", torch.relu),
    "longer list": lambda net: net.names.append("third"),
    "momentum": lambda net: setattr(net.first.norm, "momentum", 0.2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_captured_again(process: Process, name: str) -> None:
    net = process.net()
    CHANGES[name](net)
    x = torch.ones(2, 4, dtype=net.bias.dtype)  # type: ignore[arg-type]
    assert route(net, x) == "dynamo"


def test_a_patched_function_of_torch_is_captured_again(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = process.net()
    monkeypatch.setattr(nn.functional, "leaky_relu", lambda x, slope: x * slope)
    assert route(net) == "dynamo"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (torch.ones(3, 4),),
        lambda x: (torch.ones(4, 2).t(),),
        lambda x: (x.requires_grad_(),),
        lambda x: (x, torch.ones(1)),
        lambda x: (x, 1),
    ],
    ids=["size", "strides", "gradient", "another tensor", "another number"],
)
def test_another_call_is_captured(
    process: Process, change: Callable[[Tensor], tuple[Any, ...]]
) -> None:
    assert route(process.net(), *change(torch.ones(2, 4))) == "dynamo"


@pytest.mark.parametrize("mode", ["no_grad", "autocast", "default dtype", "deterministic"])
def test_another_mode_is_captured(process: Process, mode: str) -> None:
    net = process.net()
    try:
        if mode == "default dtype":
            torch.set_default_dtype(torch.float64)
        elif mode == "deterministic":
            torch.use_deterministic_algorithms(True)
        if mode == "no_grad":
            with torch.no_grad():
                assert route(net) == "dynamo"
        elif mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                assert route(net) == "dynamo"
        else:
            assert route(net) == "dynamo"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_another_kernel_of_torch_is_captured_again(process: Process) -> None:
    with torch.library._scoped_library("aten", "IMPL") as library:
        kind = "CompositeImplicitAutograd"
        library.impl("leaky_relu_", lambda x, slope: x.mul_(slope), kind, allow_override=True)
        made = capture(process.net(), (torch.ones(2, 4),), store=Store())
    assert (made.route, made.unkept) == (
        "dynamo",
        f"aten::leaky_relu_ has another kernel for {kind}",
    )
    assert route(process.net()) == "kept"


@pytest.mark.parametrize(
    ("place", "other"),
    [
        ("torch.__version__", "2.13.0+other"),
        ("torch.backends.cpu.get_cpu_capability", lambda: "other"),
    ],
)
def test_another_torch_or_processor_finds_nothing(
    process: Process, monkeypatch: pytest.MonkeyPatch, place: str, other: object
) -> None:
    from graphopt.capture.kept import key

    net, forward = process.net(), process.module().Net.forward
    before = key.key_of(net, forward, (torch.ones(2, 4),), {})
    key._installed.cache_clear()
    monkeypatch.setattr(place, other)
    try:
        assert key.key_of(net, forward, (torch.ones(2, 4),), {}) != before
    finally:
        key._installed.cache_clear()


def test_a_kept_call_has_guards_as_strict(process: Process) -> None:
    net = process.net()
    x = torch.ones(2, 4)
    found = capture(net, (x,), store=Store())
    assert found.route == "kept"
    assert found.holds(net, x)
    assert not found.holds(net, torch.ones(3, 4))
    assert not found.holds(net.eval(), x)
    net.train()
    assert found.holds(net, x)
    net.gain = 3.0  # type: ignore[assignment]
    assert not found.holds(net, x)
    assert "self'].gain" in found.failure(net, x)
    net.gain = 1.0  # type: ignore[assignment]
    assert found.holds(net, x)
    handle = net.first.norm.register_forward_hook(lambda *_: None)  # type: ignore[union-attr,operator]
    assert not found.holds(net, x)
    handle.remove()
    sys.modules["kept_module"].SCALE = 5.0  # type: ignore[attr-defined]
    assert not found.holds(net, x)


def _step(net: nn.Module, optimized: bool, **kwargs: Any) -> list[Tensor]:
    if optimized:
        graphopt.optimize(net, backend="eager", cache="captures", **kwargs)
    found = []
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        x = torch.randn(2, 4)
        result = net(x)
        assert result["same"] is x
        assert result["two"][1] == 3
        (result["two"][0] * result["out"].mean()).backward()
        found += [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *net.state_dict().values(), torch.get_rng_state()]


def test_steps_of_a_kept_capture_are_eagers_bit_for_bit(process: Process) -> None:
    net = process.net()
    kept = _step(net, optimized=True)
    assert "by kept" in net.explain()  # type: ignore[operator]
    eager = _step(process.net(), optimized=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, eager, strict=True))


CHILD = """
import sys, torch, graphopt, hashlib
sys.path.insert(0, {folder!r})
import kept_module
torch.manual_seed(0)
net = graphopt.optimize(kept_module.Net(), backend="eager")
torch.manual_seed(1)
result = net(torch.randn(2, 4))
result["out"].square().sum().backward()
values = [result["out"], *(p.grad for p in net.parameters()), *net.buffers(), torch.get_rng_state()]
print(hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values)).hexdigest())
print([line for line in net.explain().splitlines() if "captured" in line or "verified" in line])
"""


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    """In it, nothing is captured or compared, and all bits are those of the first one."""
    (tmp_path / "kept_module.py").write_text(TEXT)
    child = [sys.executable, "-c", CHILD.format(folder=str(tmp_path))]
    first, second = (
        subprocess.run(child, capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(2)
    )
    assert "by dynamo" in first[1]
    assert "by an earlier process" not in first[1]
    assert "by kept" in second[1]
    assert "by an earlier process" in second[1]
    assert first[0] == second[0]


class Printing(nn.Linear):
    """Says something at each call."""

    def forward(self, input: Tensor) -> Tensor:
        """Print once."""
        print("called")
        return super().forward(input)


def test_a_call_that_prints_prints_once_per_call(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        net = graphopt.optimize(Printing(2, 2), backend="eager", verify="off")
        net(torch.ones(1, 2))
        assert capsys.readouterr().out == "called\n"


def test_nothing_is_kept_where_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graphopt.optimize(nn.Linear(2, 2), (torch.ones(1, 2),), backend="eager", cache="off")
    assert not list(tmp_path.rglob("*.json"))
    with pytest.raises(graphopt.errors.ArgumentError, match="cache='on' is none of"):
        graphopt.optimize(nn.Linear(2, 2), cache="on")  # type: ignore[call-overload]


def test_no_warning_without_a_reason(process: Process) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert route(process.net()) == "kept"
