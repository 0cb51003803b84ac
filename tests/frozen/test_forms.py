"""Every form in which Inductor may run an inference graph computes the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.model.surface import controller_of
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.frozen import contest, sites
from graphopt.runtime.frozen.products import add_biases_apart, is_product_node
from graphopt.runtime.frozen.prologue import hoist

aten = torch.ops.aten


class Block(nn.Module):
    """Convolutions of every kind, a sum, a concatenation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish())
        self.by_channel = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.by_pixel = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.last = nn.Linear(16, 4)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        z = self.by_pixel(y + self.by_channel(y))
        return z, self.last(torch.cat([y, z], 1).mean((2, 3)))


FORMS = ("plain", "tuned", "packed", "packed throughout")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_all_forms_follow_weights_and_keep_layouts(form: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(contest, "_kept", lambda *_: form)
    slower = form == "packed throughout"
    monkeypatch.setattr(sites, "is_faster", lambda what, make: not slower)
    torch.manual_seed(0)
    plain = Block()
    made = graphopt.optimize(
        copy.deepcopy(plain), passes="cleanup,fold_inference", backend="inductor"
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 7, 7).to(memory_format=layout)
        for _ in range(2):
            expected, actual = plain(x), made(x)
            for a, b in zip(expected, actual, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
                assert b.stride() == a.stride()
            for model in (plain, made):
                for value in model.parameters():
                    value.data.mul_(1.2).add_(0.01)
    controller = controller_of(made)
    assert controller is not None
    runs: Any = controller.variants[0].engine
    assert runs._forward._run.choice == form


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from([1, 1, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    groups=st.sampled_from([1, 1, 2]),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_biases_of_products_alone_are_added_apart(
    kernel: int, stride: int, padding: int, groups: int, bias: bool, batch: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 6, kernel, stride, padding, groups=groups, bias=bias)
    x, graph = torch.randn(batch, 4, 5, 5), fx.Graph()
    weights = [layer.weight, *([layer.bias] if bias else [])]
    given_, weight, *rest = (graph.placeholder(f"t{i}") for i in range(1 + len(weights)))
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    arguments = (given_, weight, rest[0] if rest else None, *geometry)
    y = graph.call_function(aten.convolution.default, arguments)
    graph.output([y])
    nodes = (given_, weight, *rest, y)
    for node, value in zip(nodes, (x, *weights, layer(x)), strict=True):
        node.meta["val"] = value
    is_product = (kernel, stride, padding, groups) == (1, 1, 0, 1)
    assert is_product_node(y) == is_product
    add_biases_apart(graph)
    assert bool(graph.find_nodes(op="call_function", target=aten.add.Tensor)) == (
        bias and is_product
    )
    (actual,) = boxed(fx.GraphModule({}, graph))([x, *weights])
    torch.testing.assert_close(actual, layer(x), rtol=1e-5, atol=1e-6)
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor) and node.op == "call_function":
            assert value.shape in ((6, 1, 1), actual.shape)


def test_golden_of_a_bias_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    with torch.no_grad():
        graph = capture(model, (torch.randn(1, 3, 2, 2),)).graph
    graphopt.Pipeline.parse("cleanup,fold_inference").run(graph)
    hoisted = hoist(graph.module)
    add_biases_apart(hoisted.main.graph)
    calls = [str(n.target) for n in hoisted.main.graph.nodes if n.op == "call_function"]
    assert calls == [
        *("aten.convolution.default", "aten.view.default", "aten.add.Tensor"),
        "aten.relu.default",
    ]
