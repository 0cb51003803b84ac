"""Sizes as symbols of a graph: bits of eager at every size, and guards that tell the range."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._sympy.functions import Mod

from graphopt.analysis.cost import cost
from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.analysis.linearity import linear_in_tangents
from graphopt.analysis.liveness import liveness
from graphopt.capture import Capture, capture
from graphopt.capture.sizes import Dimensions
from graphopt.errors import TextError
from graphopt.plan import Plan, Role
from graphopt.runtime.backends import build
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify


class Dense(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4)
        )


class Resampled(nn.Module):
    """Convolutions, batch norm, pooling and bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = F.max_pool2d(self.down(x), 2)
        large = F.interpolate(small, scale_factor=2, mode="bilinear")
        return self.out(torch.cat([large, x], 1))


class Transposed(nn.Module):
    """Its output is laid out in another order than its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x).t()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embed(ids), src_key_padding_mask=ids == 0).mean(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def _captured(model: nn.Module, x: Tensor, *dimensions: int) -> Capture:
    names = {number: f"x.{number}" for number in dimensions}
    return capture(model, (x,), dimensions=Dimensions({id(x): names} if names else {}))


def _step(call: Callable[..., Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = call(model, x)
    y.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), *grads, *(b.clone() for b in model.buffers())]


def _same(found: Capture, model: nn.Module, x: Tensor) -> None:
    graph = found.graph
    plan = Plan(
        "", graph.signature, gradient_sources=graph.get(gradient_sources), aliases=found.aliases
    )
    call = found.bind(build(graph.module, plan))
    twin = copy.deepcopy(model)
    expected = _step(lambda m, x: m(x), twin, x)
    actual = _step(call, model, x)
    model.load_state_dict(twin.state_dict())
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b), tuple(x.shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor], tuple[int, ...]]] = {
    "dense": (Dense, lambda n, _: torch.randn(n, 8), (0,)),
    "images": (Resampled, lambda n, k: torch.randn(n, 2, 4 * k, 6 * k), (0, 2, 3)),
    "tokens": (Attention, lambda n, k: torch.randint(0, 16, (n, 3 * k)), (0, 1)),
    "recurrent": (Recurrent, lambda n, k: torch.randn(n, 3 * k, 8), (0, 1)),
}
SIZES = ((4, 2), (7, 3), (3, 5), (20, 2))


@pytest.mark.parametrize("name", MODELS)
def test_bits_of_eager_at_every_size(name: str) -> None:
    make, data, dimensions = MODELS[name]
    torch.manual_seed(0)
    model = make()
    found = _captured(model, data(4, 2), *dimensions)
    names = {f"x.{number}" for number in dimensions}
    assert {size.name for size in found.sizes} == names
    assert not any(size.fixed for size in found.sizes)
    assert set(found.graph.signature.names(Role.SIZE)) >= names
    for n, k in SIZES:
        x = data(n, k)
        assert found.holds(model, x), found.failure(model, x)
        _same(found, model, x)


@pytest.mark.parametrize("name", MODELS)
def test_texts_and_the_verifier_know_symbols(name: str) -> None:
    make, data, dimensions = MODELS[name]
    model, x = make(), data(4, 2)
    graph = _captured(model, x, *dimensions).graph
    static = capture(model, (x,)).graph
    verify(graph, full=True)
    text = print_graph(graph)
    assert "symbol s0 = " in text
    assert "[s0," in text
    for typed in (False, True):
        read = parse_graph(text, dict(graph.module.named_buffers()), typed=typed)
        assert print_graph(read) == text
        verify(read, full=True)
    # Analyses work with the sizes of the captured call.
    assert liveness(graph).saved_bytes == liveness(static).saved_bytes
    assert cost(graph).of(graph.operators).flops == cost(static).of(static.operators).flops
    assert linear_in_tangents(graph) == linear_in_tangents(static)


def test_sizes_zero_and_one_are_other_graphs() -> None:
    model, x = Dense(), torch.randn(4, 8)
    found = _captured(model, x, 0)
    assert str(found.sizes[0]) == "x.0 2.."
    for n in (0, 1):
        assert not found.holds(model, torch.randn(n, 8))
        assert "2 <= L['input'].size()[0]" in found.failure(model, torch.randn(n, 8))


def test_tangents_have_the_layout_of_outputs() -> None:
    graph = _captured(Transposed(), torch.randn(4, 8), 0).graph
    tangent = graph.input(Role.TANGENT, "0").meta["val"]
    assert tangent.stride() == graph.outputs[0].meta["val"].stride() == (1, 5)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.lin(x), x.view(-1), x[1:], x


@pytest.mark.parametrize("dimensions", [(), (0,)])
def test_outputs_that_are_views_of_inputs(dimensions: tuple[int, ...]) -> None:
    data, model = torch.randn(30, 8), Views()
    found = _captured(model, data[3:7], *dimensions)
    graph = found.graph
    plan = Plan(
        "", graph.signature, gradient_sources=graph.get(gradient_sources), aliases=found.aliases
    )
    assert Plan.from_json(plan.to_json()) == plan
    call = found.bind(build(graph.module, plan))
    sizes = (4, 9, 2) if dimensions else (4,)
    for x in (data[8 : 8 + n] for n in sizes):
        for actual, expected in zip(call(model, x)[1:], model(x)[1:], strict=True):
            assert torch.equal(actual, expected)
            assert actual.data_ptr() == expected.data_ptr()


def test_equal_sizes_may_part() -> None:
    model, x = Attention(), torch.randint(0, 16, (6, 6))
    found = _captured(model, x, 0, 1)
    assert found.holds(model, torch.randint(0, 16, (3, 8)))


def test_a_view_is_not_bound_by_what_it_is_a_view_of() -> None:
    data = torch.randn(10, 8)
    model = Dense()
    found = _captured(model, data[3:7], 0)
    for x in (data[:2], data[1:9], torch.randn(50, 8)):
        assert found.holds(model, x), found.failure(model, x)
        _same(found, model, x)


def test_a_size_that_the_model_fixes() -> None:
    class Fixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x.reshape(-1, 12))

    class Exact(Fixes):
        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    model, x = Exact(), torch.randn(3, 12)
    found = _captured(model, x, 0, 1)
    fixed = {size.name: size for size in found.sizes if size.fixed}
    assert list(fixed) == ["x.1"]
    assert fixed["x.1"].hint == 12
    assert not found.holds(model, torch.randn(3, 24))
    divided = _captured(Fixes(), torch.randn(4, 6), 0)
    assert not divided.holds(Fixes(), torch.randn(5, 6))


def test_a_range_that_a_branch_decides() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) if x.shape[0] < 10 else -self.lin(x)

    model = Branches()
    found = _captured(model, torch.randn(4, 8), 0)
    assert str(found.sizes[0]) == "x.0 2..9"
    assert found.holds(model, torch.randn(9, 8))
    assert not found.holds(model, torch.randn(10, 8))


def test_what_is_asked_after_the_capture_holds_too() -> None:
    model, x = Dense(), torch.randn(4, 8)
    found = _captured(model, x, 0)
    value = found.graph.outputs[0].meta["val"]
    assert value.shape[0] < 100  # as a pass may ask
    found.finish()
    assert found.holds(model, torch.randn(99, 8))
    assert not found.holds(model, torch.randn(100, 8))
    assert "100" in found.failure(model, torch.randn(100, 8))


def test_nothing_of_tracing_is_left() -> None:
    x = torch.randn(4, 2, 8, 12)
    _captured(Resampled(), x, 0, 2, 3)
    key = torch._C.DispatchKey.PythonDispatcher
    assert not torch._C._dispatch_tls_is_dispatch_key_included(key)
    assert not x.__dict__


def test_the_verifier_finds_a_wrong_symbol() -> None:
    from graphopt.errors import InvariantError

    graph = _captured(Dense(), torch.randn(4, 8), 0).graph
    node = next(n for n in graph.operators if "gelu.default" in str(n.target))
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = torch.empty(value.shape[0] + 1, 16)
    graph.changed()
    with pytest.raises(InvariantError, match="true-values"):
        verify(graph, full=True)


def test_what_is_known_of_symbols_is_told_before_anything_is_made_of_them() -> None:
    graph = _captured(Dense(), torch.randn(4, 8), 0).graph
    text = print_graph(graph)

    def even(shape_env: Any, symbols: Mapping[str, Any]) -> None:
        assert list(symbols) == ["s0"]
        assert shape_env.evaluate_expr(sympy.Eq(Mod(symbols["s0"], 2), 0))

    read = parse_graph(text, known=even)
    size = read.inputs[[slot.role for slot in read.signature.inputs].index(Role.SIZE)].meta["val"]
    asked = len(size.node.shape_env.guards)
    assert size % 2 == 0
    assert len(size.node.shape_env.guards) == asked

    def odd(shape_env: Any, symbols: Mapping[str, Any]) -> None:
        raise ValueError("it is odd")

    with pytest.raises(TextError, match="torch has no such symbols: it is odd"):
        parse_graph(text, known=odd)
