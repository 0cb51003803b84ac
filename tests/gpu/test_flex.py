"""The kernels of flex tensors on a GPU: the bits of the reference, and no synchronisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphopt.ops import flex
from graphopt.ops import int16_mm as products
from graphopt.ops.flex import UNKNOWN
from graphopt.runtime import kernels
from tests.support.flex import exponent, hard_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ops = torch.ops.graphopt
SEED = torch.tensor([-5, 2**33 + 7])


@pytest.fixture(autouse=True)
def registered() -> None:
    kernels.register_flex()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("e", [UNKNOWN, -126, -20, 0, 100, 126])
def test_no_bit_differs_from_the_reference(e: int, stochastic: bool) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e-42, -0.0, 3.4e38])
    for mantissa in (8, 16):
        hard = hard_bits(max(-126, min(126, e)), mantissa, 20_000).view(np.float32)
        for x in (torch.from_numpy(hard), torch.randn(70, 33).t(), special, torch.zeros(0, 3)):
            random = (3, SEED) if stochastic else ()
            there = (3, SEED.cuda()) if stochastic else ()
            for operator in ("flex_quantise", "flex_round"):
                wanted = getattr(flex, operator)(x, exponent(e), mantissa, *random)
                found = getattr(ops, operator)(x.cuda(), exponent(e, "cuda"), mantissa, *there)
                for mine, theirs in zip(found, wanted, strict=True):
                    assert torch.equal(mine.cpu(), theirs)
                    assert mine.stride() == theirs.stride()
                assert torch.equal(found[0].signbit().cpu(), wanted[0].signbit())
            mantissas, _ = flex.flex_quantise(x, exponent(e), mantissa)
            values = ops.flex_dequantise(mantissas.cuda(), exponent(e, "cuda"))
            assert torch.equal(values.cpu(), flex.flex_dequantise(mantissas, exponent(e)))


def test_a_step_can_be_captured_in_a_cuda_graph() -> None:
    x, e = torch.randn(5000, device="cuda"), exponent(UNKNOWN, "cuda")
    ops.flex_quantise(x, e, 16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # raises at any synchronisation with the host
        found, statistics = ops.flex_quantise(x, e, 16)
        values = ops.flex_dequantise(found, statistics.select(0, 3))
    x.mul_(37.0)
    graph.replay()
    wanted, same = flex.flex_quantise(x.cpu(), exponent(UNKNOWN), 16)
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(statistics.cpu(), same)
    assert torch.equal(values.cpu(), flex.flex_dequantise(wanted, same[3]))


@pytest.mark.parametrize("shape", [(3, 5, 4), (130, 70_000, 66), (256, 512, 384), (1, 64, 1)])
def test_products_are_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = (torch.randint(-(2**15), 2**15, size, dtype=torch.int16) for size in ((m, k), (n, k)))
    found = ops.int16_mm(a.cuda(), b.cuda().t())
    assert torch.equal(found.cpu(), products.int16_mm(a, b.t()))
