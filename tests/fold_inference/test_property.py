"""Folding against the closed form in double precision, and within the error that it promises."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from graphopt.graph import Graph, Level
from graphopt.passbase import PassContext
from graphopt.passes.fold_inference import FoldInference
from graphopt.plan import Role
from graphopt.testing import check_pass, run_graph
from graphopt.verify import verify
from tests.support.graphs import Builder, aten, output

UNIT = 2.0**-24


@dataclass(frozen=True)
class Layer:
    """A convolution, transposed or not, and the batch norm after it."""

    dims: int
    groups: int
    inputs: int
    outputs: int
    kernel: int
    transposed: bool
    biased: bool
    affine: bool
    eps: float
    variance: float
    mean: float
    seed: int

    @property
    def weight_shape(self) -> list[int]:
        ends = (self.groups * self.inputs, self.outputs)
        if not self.transposed:
            ends = (self.groups * self.outputs, self.inputs)
        return [*ends, *[self.kernel] * self.dims]

    def tensors(self) -> dict[str, Tensor]:
        """Every input of the graph by name, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        channels = self.groups * self.outputs

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        found = {"w": normal(*self.weight_shape)}
        if self.biased:
            found["b"] = normal(channels)
        if self.affine:
            found |= {"gamma": normal(channels), "beta": normal(channels)}
        found["mean"] = self.mean * normal(channels)
        found["var"] = self.variance * normal(channels).square()
        found["x"] = normal(2, self.groups * self.inputs, *[4] * self.dims)
        return found


LAYERS = st.builds(
    Layer,
    dims=st.integers(1, 2),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    transposed=st.booleans(),
    biased=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 1e-12]),
    variance=st.sampled_from([0.0, 1e-8, 1.0, 1e8]),
    mean=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 3),
)


def graph_of(layer: Layer, tensors: dict[str, Tensor]) -> Graph:
    b = Builder()
    roles = {"x": Role.INPUT, "mean": Role.BUFFER, "var": Role.BUFFER}
    nodes = {n: b.input(roles.get(n, Role.PARAM), n, v.shape) for n, v in tensors.items()}
    zeros, ones = [0] * layer.dims, [1] * layer.dims
    settings = (ones, zeros, ones, layer.transposed, zeros, layer.groups)
    y = b.call(aten.convolution.default, nodes["x"], nodes["w"], nodes.get("b"), *settings)
    norm = aten._native_batch_norm_legit_no_training.default
    affine = (nodes.get("gamma"), nodes.get("beta"))
    result = b.call(norm, y, *affine, nodes["mean"], nodes["var"], 0.1, layer.eps)
    return b.build({output(): b.call(operator.getitem, result, 0)}, Level.INFERENCE)


def closed_form(layer: Layer, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The exact result, and the magnitude that rounding errors are relative to."""
    exact = {name: value.double() for name, value in tensors.items()}
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d}
    convolve = (transposed if layer.transposed else {1: F.conv1d, 2: F.conv2d})[layer.dims]

    def spread(value: Tensor) -> Tensor:
        return value.view(-1, *[1] * layer.dims)

    none = torch.zeros(layer.groups * layer.outputs, dtype=torch.float64)
    gamma, beta = exact.get("gamma", none + 1), exact.get("beta", none)
    bias, mean = exact.get("b", none), exact["mean"]
    scale = gamma / torch.sqrt(exact["var"] + layer.eps)
    products = convolve(exact["x"], exact["w"], groups=layer.groups)
    sizes = convolve(exact["x"].abs(), exact["w"].abs(), groups=layer.groups)
    result = (products + spread(bias) - spread(mean)) * spread(scale) + spread(beta)
    offset = spread(bias.abs() + mean.abs())
    return result, (sizes + offset) * spread(scale.abs()) + spread(beta.abs())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYERS)
def test_both_orders_keep_the_promised_error(layer: Layer) -> None:
    tensors = layer.tensors()
    graph = graph_of(layer, tensors)
    exact, magnitude = closed_form(layer, tensors)
    count = layer.inputs * math.prod([layer.kernel] * layer.dims)
    before = run_graph(graph, list(tensors.values()))[0]
    outcome = FoldInference().apply(graph, PassContext())
    verify(graph, full=True)
    assert not outcome.declined
    after = run_graph(graph, list(tensors.values()))[0]
    for result in (before, after):
        assert bool(((result.double() - exact).abs() <= (count + 8) * UNIT * magnitude).all())


@pytest.mark.hypothesis  # examples are generated within
def test_pass_is_proved() -> None:
    check_pass(FoldInference(), max_examples=40)
