"""Products of float8 matrices: the definition, torch's own product, and the order of scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops import scaled_mm

ops = torch.ops.graphopt
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Parts = tuple[Tensor, Tensor]


def matrices(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)


def mx(x: Tensor, axis: int) -> Parts:
    parts: Parts = ops.mx_quantise(x, axis, "floor")
    return parts


def float8(x: Tensor, axis: int | None, dtype: torch.dtype = E4M3) -> Parts:
    parts: Parts = ops.float8_quantise(x, dtype, axis, axis is not None)
    return parts


@pytest.mark.parametrize(("m", "k", "n"), [(3, 40, 5), (16, 64, 32), (1, 1, 1), (0, 4, 2)])
def test_the_definition(m: int, k: int, n: int) -> None:
    a, b = matrices(m, k, n)
    for left, right in ((mx(a, 1), mx(b, 0)), (float8(a, 1), float8(b, 0))):
        is_mx = left[1].dtype is torch.float8_e8m0fnu
        wide = [
            ops.mx_dequantise(*part, axis) if is_mx else ops.float8_dequantise(*part)
            for part, axis in ((left, 1), (right, 0))
        ]
        assert torch.equal(ops.scaled_mm(*left, *right), wide[0] @ wide[1])


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(3, 40, 5), (16, 64, 32), (1, 1, 1), (0, 4, 2), (4, 0, 2)]
)
def test_torchs_product_is_the_definition(axis: int | None, m: int, k: int, n: int) -> None:
    """On the CPU, which has torch's product of float8 too; sizes that it does not take as well."""
    a, b = matrices(m, k, n)
    left = float8(a, axis, E5M2 if axis is None else E4M3)
    right = float8(b, None if axis is None else 0)
    found, wanted = scaled_mm.native(*left, *right), scaled_mm.emulated(*left, *right)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_two_gradients_are_multiplied_by_the_definition() -> None:
    a, b = matrices(4, 32, 4)
    left, right = float8(a, None, E5M2), float8(b, None, E5M2)
    assert torch.equal(scaled_mm.native(*left, *right), scaled_mm.emulated(*left, *right))


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (130, 5), (300, 9)])
def test_the_order_of_scales(rows: int, blocks: int) -> None:
    scales = (torch.arange(rows * blocks) % 251 + 1).to(torch.uint8).view(rows, blocks)
    found = scaled_mm.swizzled(scales.view(torch.float8_e8m0fnu)).view(torch.uint8)
    tiles = -(-blocks // 4)
    wanted = torch.zeros(-(-rows // 128) * tiles * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(blocks):
            tile = (r // 128) * tiles + c // 4
            wanted[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scales[r, c]
    assert torch.equal(found, wanted)


def test_which_devices_multiply_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    has = scaled_mm.has_scaled_mm
    assert not has(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, float8_too, mx_too in (((8, 0), 0, 0), ((9, 0), 1, 0), ((10, 0), 1, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        device = torch.device("cuda", 0)
        assert has(device, torch.float32) == bool(float8_too)
        assert has(device, torch.float8_e8m0fnu) == bool(mx_too)


def test_shapes_that_do_not_multiply_and_tracing() -> None:
    a, b = matrices(3, 32, 5)
    with pytest.raises(ArgumentError, match="do not multiply"):
        ops.scaled_mm(*mx(a, 1), *mx(b.t().contiguous(), 1))
    call = (*mx(a, 1), *mx(b, 0))
    torch.library.opcheck(ops.scaled_mm.default, call, test_utils=("test_faketensor",))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["tensor", "row", "mx"])
def test_on_a_gpu(kind: str) -> None:
    a, b = (x.cuda() for x in matrices(48, 160, 80))
    left, right = {
        "tensor": lambda: (float8(a, None), float8(b, None)),
        "row": lambda: (float8(a, 1), float8(b, 0)),
        "mx": lambda: (mx(a, 1), mx(b, 0)),
    }[kind]()
    wanted = scaled_mm.emulated(*left, *right)
    error = (ops.scaled_mm(*left, *right) - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 1e-3
