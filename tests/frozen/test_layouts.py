"""Layouts of values between packed convolutions: rules against real kernels, results' strides."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.runtime.frozen import layouts
from graphopt.runtime.frozen.fusions import fuse
from graphopt.runtime.frozen.layouts import FAMILIES, follows, keep_layouts
from graphopt.runtime.frozen.prologue import hoist

aten = torch.ops.aten
C = 4
ARGUMENTS: dict[Any, Callable[[Tensor], tuple[Any, ...]]] = {
    aten.cat.default: lambda x: ([x, x], 1),
    aten._native_batch_norm_legit_no_training.default: lambda x: (
        *(x, None, None, torch.zeros(C), torch.ones(C), 0.1, 1e-5),
    ),
    aten.native_batch_norm.default: lambda x: (
        *(x, None, None, torch.zeros(C), torch.ones(C), False, 0.1, 1e-5),
    ),
    aten.native_group_norm.default: lambda x: (x, None, None, 2, C, 64, 2, 1e-5),
    aten.max_pool2d_with_indices.default: lambda x: (x, [2, 2]),
    aten.avg_pool2d.default: lambda x: (x, [2, 2]),
    aten._adaptive_avg_pool2d.default: lambda x: (x, [3, 3]),
    aten.adaptive_max_pool2d.default: lambda x: (x, [3, 3]),
    aten.constant_pad_nd.default: lambda x: (x, [1, 1, 1, 1]),
    aten.reflection_pad2d.default: lambda x: (x, [1, 1, 1, 1]),
    aten.replication_pad2d.default: lambda x: (x, [1, 1, 1, 1]),
    aten.upsample_nearest2d.default: lambda x: (x, [16, 16]),
    aten.upsample_nearest2d.vec: lambda x: (x, [16, 16], None),
    aten._upsample_nearest_exact2d.default: lambda x: (x, [16, 16]),
    aten.upsample_bilinear2d.default: lambda x: (x, [16, 16], False),
    aten.upsample_bilinear2d.vec: lambda x: (x, [16, 16], False, None),
    aten.upsample_bicubic2d.default: lambda x: (x, [16, 16], False),
    aten.hardswish.default: lambda x: (x,),
    aten._to_copy.default: lambda x: (x,),
    aten.convolution.default: lambda x: (
        *(x, torch.ones(6, C, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    ),
    aten.relu.default: lambda x: (x,),
    aten.add.Tensor: lambda x: (x, x),
    aten.mul.Tensor: lambda x: (x, torch.ones(1, C, 1, 1)),
    aten.gelu.default: lambda x: (x,),
}


def test_every_family_is_tried() -> None:
    assert {target for family in FAMILIES.values() for target in family} <= set(ARGUMENTS)


@pytest.mark.parametrize("target", ARGUMENTS, ids=str)
@torch.no_grad()
def test_what_follows_gives_the_layout_it_gets(target: Any) -> None:
    graph = fx.Graph()
    assert follows(graph.call_function(target, (graph.placeholder("x"),)))
    x = torch.randn(2, C, 8, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        results = target(*ARGUMENTS[target](x.to(memory_format=layout)))
        for result in results if isinstance(results, tuple) else (results,):
            if result.dim() == 4:
                assert result.is_contiguous(memory_format=layout)


class Tail(nn.Module):
    """Convolutions whose results meet operators that depend on the layout."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.tail = tail

    def forward(self, x: Tensor) -> object:
        h = F.hardswish(self.bn(self.conv(x)))
        y = self.bn2(self.last(h)) + h
        return TAILS[self.tail](self, x, y)


TAILS: dict[str, Callable[[Any, Tensor, Tensor], object]] = {
    "flatten": lambda m, x, y: y.flatten(1),
    "output": lambda m, x, y: y,
    "both": lambda m, x, y: (y, y.relu().reshape(len(x), 2, -1)),
    "pool": lambda m, x, y: F.max_pool2d(y, 2).mean((2, 3)),
    "cat": lambda m, x, y: torch.cat([y, x], 1).transpose(1, 2),
    "cat with itself": lambda m, x, y: torch.cat([y, F.elu(y)], 1),
    "gate": lambda m, x, y: y * m.gate(y.mean((2, 3), keepdim=True)).sigmoid(),
    "small": lambda m, x, y: m.gate(y.mean((2, 3), keepdim=True)),
    "norm": lambda m, x, y: F.group_norm(y, 2),
    "resampled": lambda m, x, y: F.interpolate(y, scale_factor=2.0, mode="bilinear"),
    "permuted": lambda m, x, y: y.permute(0, 2, 3, 1),
    "padded": lambda m, x, y: F.pad(F.elu(y), (1, 1, 1, 1)) + 1,
    "shuffled": lambda m, x, y: y.view(len(x), 2, 4, 6, 6).transpose(1, 2).reshape(len(x), 8, 6, 6),
}


def assert_same(expected: Any, actual: Any) -> None:
    pairs = (
        zip(expected, actual, strict=True) if isinstance(expected, tuple) else [(expected, actual)]
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed kernels are taken however slow they are, and plain ones are out."""
    monkeypatch.setattr("graphopt.runtime.frozen.sites.is_faster", lambda what, make: True)
    monkeypatch.setattr("graphopt.runtime.backends.eager._plain", lambda module: None)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("form", ["contiguous", "channels-last input", "channels-last model"])
def test_results_keep_values_and_strides(tail: str, form: str) -> None:
    torch.manual_seed(0)
    model, x = Tail(tail).eval(), torch.randn(2, 3, 6, 6)
    if form == "channels-last input":
        x = x.to(memory_format=torch.channels_last)
    if form == "channels-last model":
        model = model.to(memory_format=torch.channels_last)
    folded = graphopt.optimize(
        copy.deepcopy(model), passes="cleanup,fold_inference", backend="eager"
    )
    with torch.no_grad():
        assert_same(model(x), folded(x))


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["both", "permuted", "small", "resampled"])
def test_inductor_keeps_them_too(tail: str) -> None:
    torch.manual_seed(0)
    model, x = Tail(tail).eval(), torch.randn(2, 3, 6, 6)
    folded = graphopt.optimize(
        copy.deepcopy(model), passes="cleanup,fold_inference", backend="inductor"
    )
    with torch.no_grad():
        assert_same(model(x), folded(x))


# -- the cut ---------------------------------------------------------------------------------------


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    with torch.no_grad():
        graph = capture(model.eval(), (x,)).graph
    graphopt.Pipeline.parse("cleanup,fold_inference").run(graph)
    hoisted = hoist(graph.module)
    fuse(hoisted.main.graph, hoisted.kept)
    return hoisted.main


class Chain(nn.Module):
    """Convolutions, functions, concatenations and views in a generated order."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        old = x
        for step, conv in zip(self.steps, self.convs, strict=True):
            before = x
            if step == "conv":
                x = conv(x)
            elif step == "function":
                x = F.elu(x)
            elif step == "join":
                x = torch.cat([x[:, :2] * 1, old[:, 2:] * 1], 1)
            elif step == "sum":
                x = x + old
            else:
                x = x.reshape(len(x), 4, -1).cumsum(2).view(x.shape)
            old = before
        return x


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from(["conv", "function", "join", "sum", "view"]), min_size=2, max_size=7
    ).filter(lambda steps: "conv" in steps)
)
def test_no_choice_of_layouts_copies_less(steps: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6)
    model = Chain(steps)
    module = traced(model, x)
    best = cheapest(module.graph)
    nodes = set(module.graph.nodes)
    keep_layouts(module.graph)
    copies = [n for n in module.graph.nodes if n not in nodes and n.target is aten.clone.default]
    assert sum(2 * n.args[0].meta["val"].numel() * 4 for n in copies) == best


def cheapest(graph: fx.Graph) -> int:
    """By trying every choice; what each operator wants is asked of the module under test."""
    sides = {node: layouts._side(node) for node in graph.nodes}
    free = [node for node in graph.nodes if sides[node] is node]
    found = []
    for choice in itertools.product((False, True), repeat=len(free)):
        last = dict(zip(free, choice, strict=True))
        total = 0
        for value in graph.nodes:
            if not layouts._converts(value):
                continue
            lies = last.get(value, sides[value] is layouts.SOURCE)
            wants = {
                last.get(side, side is layouts.SOURCE)
                for reader in value.users
                if (side := layouts._needs(reader, value, sides)) is not None
            }
            total += 2 * value.meta["val"].numel() * 4 * ((not lies) in wants)
        found.append(total)
    return min(found)
