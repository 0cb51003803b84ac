"""How long a layer takes with a weight and with its factors: measured, or from a roofline."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from graphopt.analysis.gradient_order import ASSUMED
from graphopt.passes.low_rank.sites import Use, Weight
from graphopt.structured import Form
from graphopt.structured.form import Product
from graphopt.structured.toeplitz import Toeplitz

Times = Mapping[Form | None, float]

# Vectors that are timed; more of them are taken to cost in proportion.
MOST_COLUMNS = 8192
# Forward, and the two products of a backward.
_STEP = 3
# Of the peak that a transform reaches; of what it moves, how often.
_TRANSFORM_EFFICIENCY, _TRANSFORM_PASSES = 0.1, 6


def assumed_times(weight: Weight, forms: Iterable[Form]) -> dict[Form | None, float]:
    """Seconds of forward and backward on an assumed device of the weight's class; None is dense."""
    value = weight.value
    rows, cols = value.shape
    found: dict[Form | None, float] = {}
    for form in (None, *forms):
        found[form] = 0.0
        for columns in [use.columns for use in weight.uses]:
            dense = [Product(1, rows, cols, columns)]
            products = dense if form is None else form.products(columns)
            found[form] += _STEP * sum(_product(p, value) for p in products)
            if isinstance(form, Toeplitz):
                found[form] += _STEP * _transforms(form, columns, value)
    return found


def _product(product: Product, like: Tensor) -> float:
    device = ASSUMED.get(like.device.type, ASSUMED["cuda"])
    blocks, m, k, n = product
    short = like.element_size() < 4
    work = 2 * blocks * m * k * n / (device.half_flops if short else device.flops)
    moved = like.element_size() * blocks * (m * k + k * n + m * n) / device.bandwidth
    return max(work, moved) + device.overhead


def _transforms(form: Toeplitz, columns: int, like: Tensor) -> float:
    device = ASSUMED.get(like.device.type, ASSUMED["cuda"])
    points = form.points
    work = 2 * columns * 2.5 * points * math.log2(points) / device.flops / _TRANSFORM_EFFICIENCY
    moved = _TRANSFORM_PASSES * 4 * columns * points / device.bandwidth
    return max(work, moved) + 4 * device.overhead


def measured_times(
    weight: Weight, dense: Tensor, factors: Mapping[Form, Sequence[Tensor]], rounds: int = 5
) -> dict[Form | None, float]:
    """The same on this machine: each in turn, the shortest of some rounds."""
    found: dict[Form | None, float] = dict.fromkeys((None, *factors), 0.0)
    for use in weight.uses:
        columns = min(use.columns, MOST_COLUMNS)
        steps: dict[Form | None, Callable[[], object]] = {
            None: _step(None, [dense.detach()], use, columns)
        }
        steps |= {form: _step(form, tensors, use, columns) for form, tensors in factors.items()}
        best = dict.fromkeys(steps, math.inf)
        for number in range(rounds + 1):
            for form, step in steps.items():
                seconds = _timed(step, dense.device)
                if number:  # the first round warms up
                    best[form] = min(best[form], seconds)
        for form, seconds in best.items():
            found[form] += seconds * use.columns / max(columns, 1)
    return found


def _step(
    form: Form | None, tensors: Sequence[Tensor], use: Use, columns: int
) -> Callable[[], object]:
    """Forward and backward of one use with random numbers."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    given = _given(leaves[0] if form is None else form, use)
    shape = (given, columns) if use.left else (columns, given)
    x = torch.randn(shape, dtype=leaves[0].dtype, device=leaves[0].device, requires_grad=True)

    def product() -> Tensor:
        if form is None:
            w = leaves[0].mT if use.transposed else leaves[0]
            return w @ x if use.left else torch.nn.functional.linear(x, w)
        said = (form.name, list(form.sizes))
        if use.left:
            made: Tensor = torch.ops.graphopt.structured_matmul(leaves, x, *said, use.transposed)
        else:
            made = torch.ops.graphopt.structured_linear(x, leaves, *said, None, use.transposed)
        return made

    def step() -> object:
        with torch.enable_grad():
            result = product()
            return torch.autograd.grad(result, [x, *leaves], torch.ones_like(result))

    return step


def _given(weight: Tensor | Form, use: Use) -> int:
    """The size of the vectors that are multiplied."""
    rows, cols = weight.shape if isinstance(weight, Tensor) else (weight.rows, weight.cols)
    return rows if use.transposed else cols


def _timed(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
