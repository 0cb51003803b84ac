"""The class of an optimized model stays the user's: instances, registries, pickles, wrappers."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import types
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.model.controller import controller_of
from graphopt.model.surface import restore


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.lin = nn.Linear(width, 2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Logits."""
        return self.lin(x) * scale

    @classmethod
    def small(cls) -> Net:
        return cls(4)


X = torch.randn(3, 4)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return graphopt.optimize(Net(), backend="eager")


def test_the_class_stays(net: Net) -> None:
    assert type(net) is Net
    assert {Net: 1}[type(net)] == 1
    assert list(inspect.signature(net.forward).parameters) == ["x", "scale"]
    assert net.forward.__doc__ == "Logits."


def test_new_instances_of_the_class_are_plain(net: Net) -> None:
    net(X)
    for other in (type(net)(4), net.small()):
        other.load_state_dict(net.state_dict())
        assert controller_of(other) is None
        assert torch.equal(other(X), net(X))


def test_the_class_itself_can_be_saved(net: Net) -> None:
    buffer = io.BytesIO()
    torch.save(type(net), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) is Net


def test_copies_and_pickles(net: Net) -> None:
    net(X)
    shallow = copy.copy(net)
    assert controller_of(shallow) is None
    assert shallow.lin is net.lin
    loaded = pickle.loads(pickle.dumps(nn.ModuleList([net])))[0]
    assert vars(loaded).keys() == vars(Net()).keys()
    twin = copy.deepcopy(nn.ModuleList([net]))[0]
    assert controller_of(twin) not in (None, controller_of(net))
    assert twin.forward.__self__ is twin


def test_a_class_with_a_deepcopy_of_its_own() -> None:
    class Own(Net):
        def __deepcopy__(self, memo: dict[int, Any]) -> Own:
            twin = Own.__new__(Own)
            twin.__dict__.update(self.__dict__)
            twin._parameters, twin._modules = {}, {"lin": copy.deepcopy(self.lin, memo)}
            return twin

    net = graphopt.optimize(Own(), backend="eager")
    net(X)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.lin.weight.zero_()
        twin.lin.bias.zero_()
    assert not twin(X).any()
    assert net(X).any()


def test_a_class_that_gets_another_forward_later() -> None:
    """By assignment, as in a notebook, or because the model gets another class."""

    class Own(Net):
        pass

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * 5.0

    net: Any = graphopt.optimize(Own(), backend="eager")
    plain = Own()
    plain.load_state_dict(net.state_dict())

    def check() -> None:
        assert torch.equal(net(X), plain(X))
        assert net.explain().count("specialisation:") == 1

    check()
    Own.forward = lambda self, x: self.lin(x) * 3.0  # type: ignore[method-assign]
    check()
    net.__class__ = plain.__class__ = Other
    check()
    net.__class__ = plain.__class__ = Own
    check()


def test_forward_called_by_name_is_optimized(net: Net) -> None:
    """As adapters do (peft), which pass ``__call__`` by."""
    net.forward(X).sum().backward()
    assert controller_of(net).made == 1


def test_a_wrapper_around_forward_before_and_after() -> None:
    def wrap(model: nn.Module) -> None:
        inner = model.forward

        @functools.wraps(inner)
        def doubled(*args: Any, **kwargs: Any) -> Tensor:
            return inner(*args, **kwargs) * 2

        model.forward = doubled

    plain, before, after = Net(), Net(), Net()
    for model in (before, after):
        model.load_state_dict(plain.state_dict())
    wrap(before)
    graphopt.optimize(before, backend="eager")
    graphopt.optimize(after, backend="eager")
    wrap(after)
    for model in (before, after):
        for _ in range(2):
            assert torch.equal(model(X), plain(X) * 2)
        assert controller_of(model).made == 1
    assert list(inspect.signature(before.forward).parameters) == ["x", "scale"]
    own = controller_of(before).own
    restore(before)
    assert before.forward is own


def test_unwrapping_as_accelerate_does(net: Net) -> None:
    inner = net.forward
    net.forward = types.MethodType(torch.autocast("cpu", enabled=False)(inner.__func__), net)
    forward: Any = net.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    net.forward = types.MethodType(forward, net)
    net(X)
    assert controller_of(net).made == 1


def test_unwrapping_a_model_that_was_optimized_in_its_wrapping() -> None:
    """As accelerate does it; what is inside of the wrapping is the plain forward."""
    model = Net()
    inner: Any = model.forward
    model.forward = types.MethodType(torch.autocast("cpu", enabled=False)(inner.__func__), model)
    graphopt.optimize(model, backend="eager")
    expected = model(X)
    forward: Any = model.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    model.forward = types.MethodType(forward, model)
    assert torch.equal(model(X), expected)


def test_other_programs_see_the_plain_forward(net: Net) -> None:
    net(X)
    assert torch.equal(torch.jit.trace(net, (X,), check_trace=False)(X), net(X))
    assert "lin" in fx.symbolic_trace(net).code
    for strict in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(torch.export.export(net, (X,), strict=strict).module()(X), net(X))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        assert torch.autograd.forward_ad.unpack_dual(net(dual)).tangent is not None
    assert controller_of(net).made == 1


def test_torch_compile_around_it_is_said_once(net: Net) -> None:
    compiled = torch.compile(net, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (3, 2):
            assert torch.allclose(compiled(X[:batch]), Net.forward(net, X[:batch]))
    assert sum("graphopt does nothing there" in str(w.message) for w in caught) == 1
    assert "torch.compile" in net.explain()


def test_replicas_of_data_parallel_are_plain(net: Net) -> None:
    replica = net._replicate_for_data_parallel()
    assert "forward" not in vars(replica)
    assert controller_of(replica) is None


def test_restore(net: Net) -> None:
    names = vars(Net()).keys()
    restore(net)
    assert vars(net).keys() == names


def test_a_deleted_model_and_its_captures_are_freed() -> None:
    def graphs() -> int:
        gc.collect()
        return sum(isinstance(o, fx.GraphModule) for o in gc.get_objects())

    def once() -> weakref.ref[nn.Module]:
        model = graphopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.GELU()), backend="eager")
        model(X).sum().backward()
        return weakref.ref(model)

    once()
    before, there = graphs(), set(vars(nn.modules.container))
    references = [once() for _ in range(3)]
    assert graphs() <= before
    assert all(reference() is None for reference in references)
    assert set(vars(nn.modules.container)) == there
