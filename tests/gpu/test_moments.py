"""The kernels of the moment operators on a GPU, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

import graphopt.ops.moments  # noqa: F401  (defines the operators)
from graphopt.runtime import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

operators = torch.ops.graphopt


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    assert kernels.register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1000, 129), (3, 257, 64), (1, 4096, 1024)])
@pytest.mark.parametrize("ones", [False, True])
def test_second_moment(shape: tuple[int, int, int], dtype: torch.dtype, ones: bool) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = operators.second_moment(rows.double(), ones, 1, 1 / shape[1])
    found = operators.second_moment(rows.cuda(), ones, 1, 1 / shape[1]).cpu()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "groups"),
    [
        ((8, 16, 32, 32), [3, 3], [1, 1], [1, 1], [1, 1], 1),
        ((8, 16, 15, 9), [3, 3], [2, 2], [1, 1], [1, 1], 1),
        ((4, 8, 20, 20), [3, 3], [1, 1], [2, 2], [2, 2], 2),
        ((4, 6, 50), [5], [1], [2], [1], 1),
    ],
)
def test_patch_moment(
    shape: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    geometry = (kernel, stride, padding, dilation, groups, False, [0] * len(kernel), True, 1, 0.1)
    expected = operators.patch_moment(x.double(), *geometry)
    found = operators.patch_moment(x.cuda(), *geometry).cpu()
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=1e-4)
