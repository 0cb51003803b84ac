"""The operators of the int32 wire: corner cases, layouts, tracing and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.errors import ArgumentError
from graphopt.ops.wire import MOST_CONTRIBUTIONS, exponents

wire = torch.ops.graphopt
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (), (0, 2), (5,), (2, 3, 4, 4)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def there_and_back(tensors: list[Tensor], contributions: int = 4, divisor: int = 1) -> list[Tensor]:
    magnitudes = wire.magnitudes(tensors)
    flat = wire.to_wire(tensors, magnitudes, contributions)
    return list(wire.from_wire(flat, magnitudes, tensors, contributions, divisor))


def as_bits(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.int32).tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_dtypes_and_accuracy(dtype: torch.dtype, device: str) -> None:
    tensors = [g.to(device) for g in gradients(dtype)]
    for mine, found in zip(tensors, there_and_back(tensors, contributions=1), strict=True):
        assert (found.shape, found.dtype, found.device) == (mine.shape, mine.dtype, mine.device)
        if dtype is not torch.float64 and mine.numel():
            # 31 bits below the largest hold all 8 or 11 bits of halves at these sizes.
            assert torch.allclose(found, mine, rtol=0, atol=mine.abs().max().item() * 2**-30)


def test_known_integers() -> None:
    tensor = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.0, 1.5 * 2**-29, 2.5 * 2**-29, 2**-30])
    magnitudes = wire.magnitudes([tensor])
    # floor((2^31 - 1) / 2) = 2^30 - 1 is just below 2^30, so one half of 2^30 is the best for 1.
    assert exponents(magnitudes, 2).tolist() == [-29]
    expected = [2**29, -(2**29), 2**28, 0, 0, 2, 2, 0]  # 1.5 and 2.5 go to 2, 0.5 to 0
    assert wire.to_wire([tensor], magnitudes, 2).tolist() == expected


def test_powers_of_two_and_their_neighbours() -> None:
    for exponent in range(-90, 128):
        value = 2.0**exponent
        below, above = (
            torch.nextafter(torch.tensor(value), torch.tensor(to)).item() for to in (0.0, math.inf)
        )
        found = exponents(torch.tensor([below, value, above]), 2).tolist()
        assert found == [exponent - 30, exponent - 29, exponent - 29]


@pytest.mark.parametrize("contributions", [1, 2, 3, 4, 1000, MOST_CONTRIBUTIONS])
def test_largest_and_smallest_numbers(contributions: int) -> None:
    info = torch.finfo(torch.float32)
    largest = torch.tensor([info.max, -info.max])
    magnitudes = wire.magnitudes([largest])
    flat = wire.to_wire([largest], magnitudes, contributions)
    # In float64, since rounding to the unit may lead beyond float32, and then to infinity.
    (found,) = wire.from_wire(flat, magnitudes, [largest.double()], contributions, 1)
    unit = 2.0 ** exponents(magnitudes, contributions).item()
    assert ((found - largest.double()).abs() <= unit / 2).all()
    assert unit <= 2.0**122
    (single,) = wire.from_wire(flat, magnitudes, [largest], contributions, 1)
    assert torch.equal(single, found.float())
    # The unit is never below 2^-126, the least normal number.
    small = torch.tensor([info.smallest_normal, 2**-127, 1.5 * 2**-127, 1e-45, 0.0])
    expected = [info.smallest_normal, 0.0, info.smallest_normal, 0.0, 0.0]
    assert there_and_back([small], contributions)[0].tolist() == expected


def test_double_magnitudes_round_up() -> None:
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (1 / 3, 1 + 2**-40, 1e300, 1e-300)]
    found = wire.magnitudes(tensors).double()
    assert found.tolist()[2] == math.inf
    assert all(high >= tensor for high, tensor in zip(found, tensors, strict=True))
    assert found[1] == 1 + 2**-23
    assert found[3] == 2.0**-149


@pytest.mark.parametrize("divisor", [1, 3, 7, 8, 49, 27600])
def test_double_means_are_correctly_rounded(divisor: int) -> None:
    integers = [1, 3, -5, 2**31 - 1, 123456789, -987654321]
    flat, like = torch.tensor(integers, dtype=torch.int32), torch.zeros(6, dtype=torch.float64)
    (found,) = wire.from_wire(flat, torch.tensor([1.0]), [like], 2, divisor)
    # The unit is 2^-29; Python divides integers with one rounding.
    assert found.tolist() == [integer / (divisor << 29) for integer in integers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_is_seen_wherever_it_is(dtype: torch.dtype, poison: float) -> None:
    for size in (1, 7, 64, 257):
        for place in {0, size // 2, size - 1}:
            tensor = torch.ones(size, dtype=dtype)
            tensor[place] = poison
            magnitudes = wire.magnitudes([tensor, torch.ones(3, dtype=dtype)])
            assert magnitudes.tolist() == [math.inf, 1.0]
            bad, good = there_and_back([tensor, torch.ones(3, dtype=dtype)])
            assert bad.isnan().all()
            assert good.tolist() == [1.0] * 3


def test_what_the_magnitude_hides_saturates() -> None:
    tensor = torch.tensor([5.0, -5.0, math.inf, math.nan, 1.0])
    for contributions in (1, 4, 100):
        limit = (2**31 - 1) // contributions
        sent = wire.to_wire([tensor], torch.tensor([1.0]), contributions).tolist()
        assert max(map(abs, sent)) <= limit
        assert sent[0] == sent[2] == -sent[1] > limit - 128
        assert sent[3] == 0


def test_strides_follow_like_and_values_the_logical_order() -> None:
    (image,) = gradients()[-1:]
    last = image.contiguous(memory_format=torch.channels_last)
    magnitudes = wire.magnitudes([last, image])
    sent = wire.to_wire([last, image], magnitudes, 4)
    assert torch.equal(*sent.chunk(2))
    found, plain = wire.from_wire(sent, magnitudes, [last, image], 4, 1)
    assert found.stride() == last.stride()
    assert plain.stride() == image.stride()
    assert torch.equal(found, plain)


def test_parameters_serve_as_like() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    gradient = gradients()[0]
    magnitudes = wire.magnitudes([gradient])
    flat = wire.to_wire([gradient], magnitudes, 1)
    with torch.no_grad():
        (found,) = wire.from_wire(flat, magnitudes, [weight], 1, 1)
    assert torch.equal(found, there_and_back([gradient], 1)[0])
    assert not weight.any()


def test_no_tensors() -> None:
    magnitudes = wire.magnitudes([])
    flat = wire.to_wire([], magnitudes, 4)
    assert (magnitudes.dtype, magnitudes.shape) == (torch.float32, (0,))
    assert (flat.dtype, flat.shape) == (torch.int32, (0,))
    assert wire.from_wire(flat, magnitudes, [], 4, 2) == []


def step(a: Tensor, b: Tensor) -> list[Tensor]:
    """One group on one rank; the doublings stand for the reductions."""
    magnitudes = wire.magnitudes([a, b]) * 1.0
    flat = wire.to_wire([a, b], magnitudes, 4)
    return list(wire.from_wire(flat + flat, magnitudes, [a, b], 4, 3))


def test_traced_step_is_bit_equal() -> None:
    a, b, *_ = gradients()
    traced = make_fx(step, tracing_mode="fake")(a, b)
    targets = [node.target for node in traced.graph.nodes if "graphopt" in str(node.target)]
    assert targets == [wire.magnitudes.default, wire.to_wire.default, wire.from_wire.default]
    for fresh in ((a, b), (a * 3, b / 7)):
        for found, expected in zip(traced(*fresh), step(*fresh), strict=True):
            assert as_bits(found) == as_bits(expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_step_is_bit_equal(dynamic: bool) -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    a, b, *_ = gradients()
    for found, expected in zip(compiled(a, b), step(a, b), strict=True):
        assert as_bits(found) == as_bits(expected)


@pytest.mark.parametrize("name", ["magnitudes", "to_wire", "from_wire"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_are_well_formed(name: str, dtype: torch.dtype) -> None:
    tensors = gradients(dtype)
    tensors[-1] = tensors[-1].contiguous(memory_format=torch.channels_last)
    magnitudes = wire.magnitudes(tensors)
    flat = wire.to_wire(tensors, magnitudes, 4)
    arguments: dict[str, tuple[Any, ...]] = {
        "magnitudes": (tensors,),
        "to_wire": (tensors, magnitudes, 4),
        "from_wire": (flat, magnitudes, tensors, 4, 3),
    }
    torch.library.opcheck(getattr(wire, name).default, arguments[name])


def test_fake_results_match() -> None:
    tensors = [gradients()[0].t(), *gradients()[1:]]
    magnitudes = wire.magnitudes(tensors)
    flat = wire.to_wire(tensors, magnitudes, 4)
    real = [magnitudes, flat, *wire.from_wire(flat, magnitudes, tensors, 4, 3)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        magnitudes = wire.magnitudes(fakes)
        flat = wire.to_wire(fakes, magnitudes, 4)
        fake = [magnitudes, flat, *wire.from_wire(flat, magnitudes, fakes, 4, 3)]
    for found, expected in zip(fake, real, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.stride() == expected.stride()


@pytest.mark.skipif(len(DEVICES) == 1, reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES)
def test_devices_agree_to_the_bit(dtype: torch.dtype) -> None:
    host = [g * 2.0**k for k, g in zip((0, 3, 0, -9, 5), gradients(dtype), strict=True)]
    device = [g.cuda() for g in host]
    magnitudes = wire.magnitudes(host)
    assert torch.equal(wire.magnitudes(device).cpu(), magnitudes)
    flat = wire.to_wire(host, magnitudes, 7)
    assert torch.equal(wire.to_wire(device, magnitudes.cuda(), 7).cpu(), flat)
    pairs = zip(there_and_back(host, 7, 3), there_and_back(device, 7, 3), strict=True)
    assert all(torch.equal(a, b.cpu()) for a, b in pairs)


@pytest.mark.parametrize("contributions", [0, -1, MOST_CONTRIBUTIONS + 1])
def test_bad_contributions(contributions: int) -> None:
    tensors = gradients()
    magnitudes = wire.magnitudes(tensors)
    flat = wire.to_wire(tensors, magnitudes, 1)
    with pytest.raises(ArgumentError, match=f"contributions={contributions} "):
        wire.to_wire(tensors, magnitudes, contributions)
    with pytest.raises(ArgumentError, match=f"contributions={contributions} "):
        wire.from_wire(flat, magnitudes, tensors, contributions, 1)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64), torch.eye(2)],
    ids=["integer", "complex", "sparse"],
)
def test_bad_gradients(tensor: Tensor) -> None:
    tensor = tensor.to_sparse() if tensor.dim() == 2 else tensor
    with pytest.raises(ArgumentError, match="dense real gradients"):
        wire.magnitudes([tensor])


def test_sizes_that_do_not_fit() -> None:
    tensors = gradients()
    magnitudes = wire.magnitudes(tensors)
    flat = wire.to_wire(tensors, magnitudes, 4)
    for bad in (magnitudes[:-1], magnitudes.double(), magnitudes[:, None]):
        with pytest.raises(ArgumentError, match="5 tensors need as many float32 magnitudes"):
            wire.to_wire(tensors, bad, 4)
        with pytest.raises(ArgumentError, match="5 tensors need as many float32 magnitudes"):
            wire.from_wire(flat, bad, tensors, 4, 1)
    for bad in (flat[:-1], flat.long(), flat[None]):
        with pytest.raises(ArgumentError, match="expected as flat int32"):
            wire.from_wire(bad, magnitudes, tensors, 4, 1)
    with pytest.raises(ArgumentError, match="divisor=0"):
        wire.from_wire(flat, magnitudes, tensors, 4, 0)
