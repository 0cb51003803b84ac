"""A trial cannot be seen outside: after a first call all is as after one call of eager."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.model import streams
from graphopt.model.caller import finally_all
from graphopt.model.comparison import compare, same
from graphopt.model.copies import StandIns
from graphopt.model.trial import Trial
from graphopt.testing import Layer, Scenario, Step, check_scenario
from graphopt.testing.fuzz.around import AROUND
from tests.support.observing import identities, traces

# -- models that keep and change things ------------------------------------------------------------


class Stores(nn.Module):
    """Writes everywhere that a module can: attributes, containers, buffers, parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))
        self.log: list[Any] = []
        self.recent: collections.deque[Any] = collections.deque(maxlen=2)
        self.table: dict[str, Any] = {"kept": torch.ones(2)}
        self.names: set[str] = set()
        self.own = SimpleNamespace(last=None, nested={"list": [1]})
        self.last: Tensor | None = None
        self.array = np.zeros(3)
        self.ids = itertools.count()
        self.random = random.Random(3)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.l(x)
        with torch.no_grad():
            self.slow.weight.mul_(0.9)
            self.slow.weight.data = self.slow.weight.data + 0.1
            self.count.add_(1)
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        self.log.append(h)
        self.recent.append(h.detach())
        self.table["new"] = h
        self.table.pop("kept", None)
        self.names.add(str(len(self.log)))
        self.own.last = h
        self.own.nested["list"].append(2)
        self.last = h
        self.array += next(self.ids) + self.random.random() + random.random() + np.random.rand()
        return h + torch.rand(4) + torch.rand(4, generator=self.generator)


@dataclass
class Cache:
    """An object of the call that forward fills."""

    keys: list[Tensor] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)


def _contents(value: Any) -> Any:
    """Containers as plain values, tensors by identity."""
    if isinstance(value, dict):
        return {k: _contents(v) for k, v in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [_contents(v) for v in value]
    if isinstance(value, SimpleNamespace | Cache):
        return _contents(vars(value))
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, itertools.count):
        return repr(value)
    return value if isinstance(value, int | float | str | set) else id(value)


# -- the property ----------------------------------------------------------------------------------


KEEPS = (("Average", "Remembers"), ("History", "Momentum"), ("Carries", "Named", "Logs"))
AROUNDS = [name for name in AROUND if name != "backward_hook"]
USES = ["once", "checkpointed", "inference_mode", "itself", "autocast"]


@pytest.mark.parametrize("around", AROUNDS)
@pytest.mark.parametrize("use", USES)
def test_a_first_call_of_what_keeps_things_changes_what_eager_changes(
    around: str, use: str
) -> None:
    """Two or three layers that keep something, and what is around each of them.

    Every pair of a use, of surroundings and of layers occurs, and a third of all triples.
    """
    kinds = KEEPS[(AROUNDS.index(around) + USES.index(use)) % len(KEEPS)]
    layers = tuple(Layer(kind, around) for kind in kinds)
    check_scenario(Scenario(layers, (Step(use, "nothing"),), output="tuple"))


def test_a_trial_puts_everything_back() -> None:
    torch.manual_seed(0)
    model, x = Stores(), torch.randn(3, 4)
    model(x)  # not empty
    names = set(model.names)
    before = traces(model, x), identities(model), _contents(vars(model))
    seen = [Trial(model, (x,), {}).observe(Stores.forward) for _ in range(2)]
    assert (traces(model, x), identities(model), _contents(vars(model))) == before
    assert model.names == names
    assert seen[0].values.keys() == seen[1].values.keys()
    for name, value in seen[0].values.items():
        other = seen[1].values[name]
        assert value is other is None or same(value, other), name  # type: ignore[arg-type]
    assert {"Python's random", "numpy.random", "torch's random stream"} <= seen[0].moved
    assert "parameter slow.weight" in seen[0].values
    assert "parameter l.weight" not in seen[0].values


def test_arguments_of_a_call_are_not_touched() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor, cache: Cache, options: dict[str, Any]) -> Tensor:
            options["out"] = x.mul_(2)
            cache.keys.append(self.l(x))
            cache.seen["calls"] = cache.seen.get("calls", 0) + 1
            options["pair"][0].add_(1)
            return torch.cat(cache.keys)

    leaf = torch.randn(3, 4, requires_grad=True)
    x, cache = leaf * 2, Cache([torch.ones(1, 4)])
    options: dict[str, Any] = {"pair": (torch.zeros(2), 1)}
    model = Uses()
    before = _contents([cache, options]), x.tolist(), x.grad_fn, x._version
    observed = Trial(model, (x, cache), {"options": options}).observe(Uses.forward)
    assert (_contents([cache, options]), x.tolist(), x.grad_fn, x._version) == before
    assert options["pair"][0].tolist() == [0, 0]
    gradient = observed.values["gradient of input x"]
    assert gradient is not None
    assert gradient.shape == x.shape
    leaf_graph = torch.autograd.grad(x.sum(), leaf)  # its graph is still there
    assert leaf_graph[0].tolist() == torch.full((3, 4), 2.0).tolist()


def test_writes_to_inputs_are_observed() -> None:
    def writes(model: nn.Module, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 0

    model, x = nn.Linear(1, 1), torch.ones(2)
    seen = [Trial(model, (x,), {}).observe(call) for call in (writes, lambda _, x: x * 2)]
    assert compare(*seen).name == "what input input becomes"
    assert "what input input becomes" not in seen[1].values
    assert x.tolist() == [1, 1]


def test_shared_and_tied_tensors_stay_so() -> None:
    memory = torch.zeros(8)
    first, second = memory[:4], memory[2:6]
    parameter = nn.Parameter(torch.ones(3))
    stand_ins = StandIns()
    stand_ins.make([first, second, parameter, parameter])
    a, b, p = (stand_ins.of(t) for t in (first, second, parameter))
    assert a is not None
    assert b is not None
    assert p is not None
    a.value.fill_(1)
    assert b.value.tolist() == [1, 1, 0, 0]
    assert memory.tolist() == [0] * 8
    assert isinstance(p.value, nn.Parameter)
    assert p.value is not parameter
    assert torch._C._is_cow_tensor(p.value)
    assert not p.written


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.from_numpy(np.ones(3)),
        torch.randn(3, dtype=torch.cfloat).conj(),
        torch.randn(3).share_memory_(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.randn(3, 1).expand(3, 4),
        torch.zeros(0),
    ],
    ids=["sparse", "csr", "numpy", "conjugate", "shared", "nested", "expanded", "empty"],
)
def test_what_has_no_lazy_copy_has_a_real_one(tensor: Tensor) -> None:
    stand_ins = StandIns()
    stand_ins.make([tensor])
    found = stand_ins.of(tensor)
    assert found is not None
    dense = [t.to_padded_tensor(0) if t.is_nested else t for t in (found.value, tensor)]
    assert same(*dense)


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[:, 1:2],
        lambda t: t[..., -1],
        lambda t: t.transpose(0, 1),
        lambda t: t[:, :1].expand(-1, 3, -1),
    ],
    ids=["slice", "select", "transposed", "expanded"],
)
def test_a_stand_in_for_a_computed_input_keeps_its_strides(cut: Callable[[Tensor], Tensor]) -> None:
    tensor = cut(torch.randn(4, 3, 2, requires_grad=True) * 2)
    stand_ins = StandIns()
    stand_ins.make([tensor])
    found = stand_ins.of(tensor)
    assert found is not None
    assert found.value.stride() == tensor.stride()
    assert same(found.value, tensor)
    (gradient,) = torch.autograd.grad(found.value.sum(), found.leaf)
    assert same(gradient, torch.ones_like(tensor))


@pytest.mark.slow
def test_generated_code_takes_slices_of_what_was_computed() -> None:
    model = graphopt.optimize(nn.Linear(2, 2), backend="inductor")
    whole = torch.randn(4, 3, 2, requires_grad=True) * 2
    for part in whole.split(1, 1):
        assert torch.allclose(model(part), nn.functional.linear(part, model.weight, model.bias))


# -- what surrounds the call -----------------------------------------------------------------------


class CountsOperators(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        type(self).calls += 1
        return function(*args, **(kwargs or {}))


class CountsFunctions(TorchFunctionMode):
    calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        type(self).calls += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def _surrounded(seen: list[str]) -> Iterator[None]:
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append("pack") or t, lambda t: seen.append("unpack") or t
    )
    with hooks, CountsOperators(), CountsFunctions(), torch.autograd.detect_anomaly(False):
        yield


def test_the_callers_modes_and_hooks_see_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    seen: list[str] = []
    grads = [p.register_hook(lambda g: seen.append("gradient")) for p in model.parameters()]
    model[0].register_full_backward_hook(lambda *_: seen.append("module"))
    trial = Trial(model, (x,), {})
    CountsOperators.calls = CountsFunctions.calls = 0
    with _surrounded(seen):
        CountsOperators.calls = CountsFunctions.calls = 0
        seen.clear()
        trial.observe(type(model).forward)
        assert torch._C._len_torch_function_stack() == 1
        assert torch._C._len_torch_dispatch_stack() == 1
        assert torch.is_anomaly_enabled()
    assert not seen
    assert CountsOperators.calls == CountsFunctions.calls == 0
    assert len(grads) == 2
    model(x).sum().backward()
    assert seen.count("gradient") == 2
    assert seen.count("module") == 1


def test_the_default_device_and_autocast_are_part_of_the_call() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(2), x @ x

    trial = Trial(Makes(), (torch.randn(2, 2),), {})
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        observed = trial.observe(Makes.forward)
    first, second = observed.values["output 0"], observed.values["output 1"]
    assert first is not None
    assert second is not None
    assert first.device.type == "meta"
    assert second.dtype is torch.bfloat16


def test_a_trial_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            print("step")
            return super().forward(x)

    Trial(Prints(2, 2), (torch.ones(1, 2),), {}).observe(Prints.forward)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_first_call_within_a_backward(reentrant: bool) -> None:
    gradients = []
    for optimize in (lambda m: m, lambda m: graphopt.optimize(m, backend="eager")):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())
        x = torch.randn(3, 4, requires_grad=True)
        optimize(block)
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        gradients.append([t.grad for t in (x, *block.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_with_checkpoints_inside(reentrant: bool) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.l = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.l, self.i(x), use_reentrant=reentrant)
            return result

    model = Inside()
    observed = Trial(model, (torch.randn(2, 4),), {}).observe(Inside.forward)
    assert all(observed.values[f"gradient of {n}"] is not None for n, _ in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_leaf_that_only_a_global_name_knows_gets_no_gradient() -> None:
    model = UsesGlobal()
    Trial(model, (torch.randn(2, 4),), {}).observe(UsesGlobal.forward)
    assert GLOBAL.grad is None
    assert COUNTS == [1]
    assert GLOBAL_STATE.tolist() == [0, 0, 0, 0]


GLOBAL = torch.ones(4, requires_grad=True)
GLOBAL_STATE = torch.zeros(4)
COUNTS = [1]


class UsesGlobal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        COUNTS.append(2)
        GLOBAL_STATE.add_(1)
        h: Tensor = self.l(x)
        return h * GLOBAL


def test_closures_of_hooks_are_put_back() -> None:
    model, calls = nn.Linear(4, 4), []
    total = 0

    def hook(*_: object) -> None:
        nonlocal total
        total += 1
        calls.append(total)

    outer = nn.Sequential(model)
    model.register_forward_hook(hook)
    Trial(outer, (torch.ones(1, 4),), {}).observe(nn.Sequential.forward)
    assert (total, calls) == (0, [])


def test_what_a_raising_forward_has_changed_is_put_back() -> None:
    class Raises(Stores):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("the user's own")

    model, x = Raises(), torch.randn(3, 4)
    before = traces(model, x), identities(model), _contents(vars(model))
    with pytest.raises(ValueError, match="the user's own"):
        Trial(model, (x,), {}).observe(Raises.forward)
    assert (traces(model, x), identities(model), _contents(vars(model))) == before


def test_an_interrupt_does_not_stop_what_puts_things_back() -> None:
    done: list[int] = []

    def interrupted() -> None:
        done.append(1)
        if len(done) == 1:
            raise KeyboardInterrupt

    def last() -> None:
        done.append(2)

    with pytest.raises(KeyboardInterrupt):
        finally_all(interrupted, last)
    assert done == [1, 1, 2]


def test_memory_is_shared_until_it_is_written() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    shared = []

    def forward(model: nn.Module, ids: Tensor) -> Any:
        shared.extend(torch._C._is_cow_tensor(p) for p in model.parameters())
        return nn.Sequential.forward(model, ids)  # type: ignore[arg-type]

    pointers = [p.data_ptr() for p in model.parameters()]
    Trial(model, (torch.tensor([1, 2]),), {}).observe(forward)
    assert all(shared)
    assert len(shared) == 3
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_all_streams_begin_at_one_place_and_go_back() -> None:
    draw: Callable[[], tuple[float, ...]] = lambda: (  # noqa: E731
        torch.rand(()).item(),
        random.random(),
        np.random.rand(),
    )
    before = streams.marks()
    drawn = []
    for _ in range(2):
        with streams.isolated():
            drawn.append(draw())
    assert drawn[0] == drawn[1]
    assert streams.marks() == before
