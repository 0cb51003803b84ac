"""The packed convolution against its reference, and the layouts around it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.ops.convolution import reference


@settings(max_examples=40)
@given(
    channels=st.sampled_from([(3, 8), (8, 8), (4, 12)]),
    size=st.integers(5, 9),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    grouped=st.booleans(),
    bias=st.booleans(),
    added=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_its_reference(
    channels: tuple[int, int],
    size: int,
    stride: int,
    padding: int,
    dilation: int,
    grouped: bool,
    bias: bool,
    added: bool,
    relu: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs, outputs = channels
    groups = 4 if grouped and inputs % 4 == 0 else 1
    x = torch.randn(2, inputs, size, size)
    weight = torch.randn(outputs, inputs // groups, 3, 3)
    call = [x, weight, torch.randn(outputs) if bias else None]
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    other = torch.randn_like(reference(*call, *geometry, None, False)) if added else None
    expected = reference(*call, *geometry, other, relu)
    for _ in range(2):  # the second call uses the kept weight
        actual = torch.ops.graphopt.packed_convolution(*call, *geometry, other, relu)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        if min(expected.shape) > 1:  # the stride of a single element means nothing
            assert actual.stride() == expected.stride()


class Tail(nn.Module):
    """Convolutions whose results meet operators that depend on the layout."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.tail = tail

    def forward(self, x: Tensor) -> object:
        h = self.bn(self.conv(x)).relu()
        y = self.bn2(self.last(h)) + h
        if self.tail == "flatten":
            return y.flatten(1)
        if self.tail == "output":
            return y
        if self.tail == "both":
            return y, y.relu().view(len(x), 2, -1)
        if self.tail == "pool":
            return nn.functional.max_pool2d(y, 2).mean((2, 3))
        return torch.cat([y, x], 1).transpose(1, 2)


@pytest.mark.parametrize("tail", ["flatten", "output", "both", "pool", "cat"])
def test_results_keep_values_and_strides(tail: str) -> None:
    torch.manual_seed(0)
    model = Tail(tail).eval()
    x = torch.randn(2, 3, 6, 6)
    folded = graphopt.optimize(
        copy.deepcopy(model), passes="cleanup,fold_inference", backend="eager"
    )
    with torch.no_grad():
        expected, actual = model(x), folded(x)
    pairs = zip(expected, actual, strict=True) if tail == "both" else [(expected, actual)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.stride() == b.stride()
