"""`low_rank` in front of passes on the joint graph, in one process."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model.surface import report
from graphopt.passbase import Outcome
from tests.low_rank.models import ANY, Mixer, all_forms, batch


def _optimized(spec: str, model: nn.Module | None = None, **options: Any) -> Any:
    options = {"backend": "eager", "verify": "eager"} | options
    return graphopt.optimize(model or all_forms(), (batch(),), passes=spec, **options)


def _outcome(model: nn.Module, step: int) -> Outcome:
    return report(model).specialisations[0].steps[step].outcome


def _losses(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@functools.cache
def _wide() -> tuple[float, ...]:
    return tuple(_losses(_optimized(f"{ANY},cleanup", verify="off")))


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_precision_lowers_products_in_factors_and_no_transform(format: str) -> None:
    wide = _wide()
    lowered = f"precision{{format={format},cost=roofline,policy=tf}}"
    model = _optimized(f"{ANY},cleanup,{lowered}")
    forms = {a.what.split()[3].rstrip(",") for a in _outcome(model, 0).applied}
    assert forms == {"flat", "toeplitz", "hodlr"}
    # fp16 begins with a scale at which gradients may overflow: such steps change nothing.
    losses = _losses(model, 8)
    assert losses[-1] < wide[0]
    moved = [losses[0], *(b for a, b in itertools.pairwise(losses) if a != b)]
    assert moved[:5] == pytest.approx(wide, rel=2e-2)
    whats = [a.what for a in _outcome(model, 2).applied]
    assert any(what == f"aten.bmm.default runs in {format}" for what in whats)
    assert not any("fft" in what for what in whats)
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_micro_batches_add_up_to_the_batch_that_kfac_sees() -> None:
    x = torch.cat([batch(), batch(seed=1)])[:4]
    spec = f"{ANY},kfac{{damping=0.02,interval=1}}"
    whole, parts = (_optimized(spec, Mixer(), verify="off") for _ in range(2))
    whole(x).square().mean().backward()
    with parts.no_sync():
        (parts(x[:2]).square().mean() / 2).backward()
    (parts(x[2:]).square().mean() / 2).backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        off = float((p.grad - q.grad).abs().max())
        assert off <= 1e-3 * float(p.grad.abs().max()), name


# -- calibration -----------------------------------------------------------------------------------


def test_a_model_in_factors_is_calibrated_in_factors(tmp_path: Path) -> None:
    """By the names of its steps, so that `precision` finds what the file says."""
    model, file = _optimized(f"{ANY},cleanup", Mixer(), verify="off"), tmp_path / "c.json"
    calibration = graphopt.calibrate(model, [batch(), batch(seed=1)])
    calibration.save(file)
    operators = {s.operator for s in calibration.sensitivities.values()}
    assert {"aten.bmm.default", "aten.baddbmm.default"} <= operators
    assert "aten.stack.default" not in operators  # as of a weight that is put together
    lowered = f"precision{{cost=roofline,policy=tf,calibration={file}}}"
    _optimized(f"{ANY},cleanup,{lowered}", model, verify="off")
    ran = {a.site: a.what.split()[0] for a in _outcome(model, 2).applied if " runs in " in a.what}
    products = {n: o for n, o in ran.items() if o in ("aten.bmm.default", "aten.baddbmm.default")}
    assert products.keys() <= calibration.tensors.keys()
    known = {n: s.operator for n, s in calibration.sensitivities.items() if n in products}
    assert len(known) >= 5
    assert known.items() <= products.items()


# -- K-FAC -----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A layer in factors as one linear layer per block, and nothing batched."""

    def __init__(self, layer: nn.Module, shapes: list[tuple[int, int, int]]) -> None:
        super().__init__()
        weights = [p.detach() for p in layer.parametrizations.weight.parameters()]  # type: ignore[union-attr]
        bias: Tensor = layer.bias.detach()  # type: ignore[operator, assignment, union-attr]
        self.parts = nn.ModuleList()
        for number, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
            made = nn.ModuleList()
            for index, matrix in enumerate(weight.reshape(shape)):
                one = nn.Linear(*matrix.mT.shape, bias=number == 0, dtype=matrix.dtype)
                one.weight.data.copy_(matrix)
                if number == 0:
                    one.bias.data.copy_(bias.view(shape[0], -1)[index])
                made.append(one)
            self.parts.append(made)


class Flat(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        left, right = self.parts
        made: Tensor = left[0](right[0](x))
        return made


class Tiles(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        diagonal, left, right = self.parts
        pieces = x.chunk(4, -1)
        inner = [one(piece).chunk(3, -1) for one, piece in zip(right, pieces, strict=True)]
        rows = []
        for i in range(4):
            far = torch.cat([inner[(i + d + 1) % 4][d] for d in range(3)], -1)
            rows.append(diagonal[i](pieces[i]) + left[i](far))
        return torch.cat(rows, -1)


class Halves(Blocks):
    def forward(self, x: Tensor) -> Tensor:
        leaves, left, right = self.parts
        pieces = x.chunk(4, -1)
        seen = [one(piece).chunk(2, -1) for one, piece in zip(right, pieces, strict=True)]
        halves = [seen[0][0] + seen[1][0], seen[2][0] + seen[3][0]]
        rows = []
        for i in range(4):
            inner = torch.cat([halves[1 - i // 2], seen[i ^ 1][1]], -1)
            rows.append(leaves[i](pieces[i]) + left[i](inner))
        return torch.cat(rows, -1)


KFAC = "kfac{damping=0.02,interval=1}"
EXPLICIT: dict[str, tuple[type[Blocks], list[tuple[int, int, int]]]] = {
    "flat": (Flat, [(1, 8, 2), (1, 2, 12)]),
    "blr": (Tiles, [(4, 2, 3), (4, 2, 3), (4, 3, 3)]),
    "hodlr": (Halves, [(4, 2, 3), (4, 2, 2), (4, 2, 3)]),
}
SIZES = {"flat": [8, 12, 2], "blr": [8, 12, 4, 1], "hodlr": [8, 12, 2, 1], "toeplitz": [8, 12]}


def _layer(form: str) -> nn.Linear:
    from graphopt.structured import StructuredWeight, form_of

    made = form_of(form, SIZES[form])
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in made.shapes]
    layer = nn.Linear(12, 8, dtype=torch.float64)
    by = StructuredWeight(made, 1e-6, [0.5 * f for f in draw])
    nn.utils.parametrize.register_parametrization(layer, "weight", by, unsafe=True)
    return layer


def _preconditioned(layer: nn.Module, spec: str) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 3, dtype=torch.float64))
    x, y = torch.randn(7, 12, dtype=torch.float64), torch.arange(7) % 3
    verify: Any = "eager" if "low_rank" in spec else "off"
    graphopt.optimize(model, (x,), passes=spec, backend="eager", verify=verify)
    nn.functional.cross_entropy(model(x), y).backward()
    return model


@pytest.mark.parametrize("form", EXPLICIT)
def test_kfac_sees_one_linear_layer_per_block(form: str) -> None:
    """By a model that has these layers, one by one."""
    torch.manual_seed(2)
    layer = _layer(form)
    kind, shapes = EXPLICIT[form]
    explicit = kind(layer, shapes)
    model = _preconditioned(layer, f"low_rank,{KFAC}")
    _preconditioned(explicit, KFAC)
    factors: Any = layer.parametrizations
    for factor, parts, shape in zip(
        factors.weight.parameters(), explicit.parts, shapes, strict=True
    ):
        wanted = torch.stack([one.weight.grad for one in parts])  # type: ignore[union-attr]
        torch.testing.assert_close(factor.grad.reshape(shape), wanted, rtol=1e-9, atol=1e-12)
    wanted = torch.cat([one.bias.grad for one in explicit.parts[0]])  # type: ignore[union-attr]
    torch.testing.assert_close(layer.bias.grad, wanted, rtol=1e-9, atol=1e-12)
    assert not _outcome(model, 1).declined


def test_kfac_leaves_diagonals_of_a_convolution_alone() -> None:
    layer = _layer("toeplitz")
    model = _preconditioned(layer, f"low_rank,{KFAC}")
    (declined,) = _outcome(model, 1).declined
    assert declined.site == "0.parametrizations.weight.original0"
    assert declined.reason == "unsupported-use"
    plain = _preconditioned(_layer("toeplitz"), "low_rank")
    for name in ("parametrizations.weight.original0", "bias"):
        (mine, theirs) = (m[0].get_parameter(name).grad for m in (model, plain))  # type: ignore[index]
        assert torch.allclose(mine, theirs) == (name != "bias")
