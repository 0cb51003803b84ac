"""Dropout of the eager backend draws and rounds as eager does, and keeps a byte per number."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.runtime.backends.dropout import expand_dropout

aten = torch.ops.aten
SHARES = st.floats(0.001, 0.999).map(lambda p: round(p, 3))
DTYPES = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))
INPUTS = ("dense", "transposed", "row", "special")


def _input(kind: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    if kind == "special":
        x[0] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -1.0])
    return {"transposed": x.t(), "row": x[:1].expand(3, 7)}.get(kind, x)


def _graph(x: Tensor, p: Any, is_training: bool = True) -> fx.GraphModule:
    """Both operators, as a captured graph has them."""
    graph = fx.Graph()
    given, gradient = graph.placeholder("x"), graph.placeholder("gradient")
    dropped = graph.call_function(aten.native_dropout.default, (given, p, is_training))
    result, mask = (graph.call_function(operator.getitem, (dropped, i)) for i in (0, 1))
    scale = 1 / (1 - p) if 0 < p < 1 else 1.0
    back = graph.call_function(aten.native_dropout_backward.default, (gradient, mask, scale))
    graph.output((result, mask, back))
    module = fx.GraphModule({}, graph)
    values = aten.native_dropout.default(x, p, is_training)
    for node, value in ((given, x), (gradient, x), (result, values[0]), (mask, values[1])):
        node.meta["val"] = value
    back.meta["val"] = values[0]
    return module


@given(p=SHARES, dtype=DTYPES, kind=st.sampled_from(INPUTS), seed=st.integers(0, 9))
def test_bits_are_those_of_eager(p: float, dtype: torch.dtype, kind: str, seed: int) -> None:
    x = _input(kind, dtype)
    module = _graph(x, p)
    (back,) = module.graph.find_nodes(
        op="call_function", target=aten.native_dropout_backward.default
    )
    scale = torch.ones((), dtype=dtype).div_(1 - p).item()  # as capture rounds it
    back.args = (*back.args[:2], scale)
    expand_dropout(module.graph)
    module.recompile()
    assert "native_dropout" not in module.code
    leaf = x.detach().requires_grad_()
    torch.manual_seed(seed)
    expected = torch.dropout(leaf, p, True)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    result, mask, gradient = module(x, x)
    assert torch.equal(torch.get_rng_state(), after)
    (wanted,) = torch.autograd.grad(expected, leaf, x)
    for a, b in ((result, expected), (gradient, wanted)):
        assert a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0))
    assert mask.dtype is torch.bool


@pytest.mark.parametrize(("p", "is_training"), [(0.0, True), (1.0, True), (0.5, False)])
def test_without_numbers_to_draw_it_stays(p: float, is_training: bool) -> None:
    module = _graph(torch.ones(3), p, is_training)
    before = len(module.graph.nodes)
    (node,) = module.graph.find_nodes(op="call_function", target=aten.native_dropout.default)
    expand_dropout(module.graph)
    assert node in module.graph.nodes
    assert len(module.graph.nodes) > before  # its backward is products all the same


@pytest.mark.parametrize("p", [0.1, 0.021, 0.5])
def test_a_model_trains_as_in_eager(p: float) -> None:
    """1 / (1 - 0.021) is rounded another way by a division in float32 than from float64."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 8), nn.Dropout(p))
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify="off")
    x = torch.randn(16, 8)
    for model in (plain, ours):
        for seed in range(2):
            torch.manual_seed(seed)
            model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
