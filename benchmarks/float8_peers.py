"""Bits of our float8 quantisers against those of torchao and of exact arithmetic.

    python -m benchmarks.float8_peers

Peers are not needed by graphopt; install them beside it (``pip install torchao``). Data: blocks at
every exponent of float32 (normal, uniform in mantissa, ties, subnormals, zeros of either sign), and
blocks with NaN and infinity apart from them. For each rule it counts the elements and scales that
differ from torchao's and the elements of either that differ from an oracle in integers. Nothing is
timed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from benchmarks.float8_oracle import rounded_bytes
from benchmarks.harness import keep

ops = torch.ops.graphopt
BLOCK = 32


def rows_at_every_exponent(per_exponent: int = 10) -> Tensor:
    """float32 [rows, 128]: each row has its largest exponent at another place of the range."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for exponent in range(-149, 128):
        scale = torch.tensor(2.0, dtype=torch.float64) ** exponent
        for kind in range(per_exponent):
            row = torch.randn(128, generator=generator, dtype=torch.float64)
            if kind % 5 == 1:  # all mantissas alike
                row = 1 + torch.rand(128, generator=generator, dtype=torch.float64)
            elif kind % 5 == 2:  # halves between neighbours of four bits, and their neighbours
                ties = torch.randint(16, 32, (128,), generator=generator) * 2 + 1
                below = torch.randint(0, 12, (128,), generator=generator)
                row = ties.double() / 64 / 2.0**below
            elif kind % 5 == 3:  # wide ranges with zeros
                row = row * 2.0 ** torch.randint(-24, 1, (128,), generator=generator)
                row[::7], row[::11] = 0.0, -0.0
            elif kind % 5 == 4:  # the largest element is the next number above 448 units
                row = row.clamp(-1.7, 1.7)
                row[::BLOCK] = 1.75 + 2.0**-23
            limit = torch.finfo(torch.float32).max
            rows.append((row * scale).clamp(-limit, limit).float())
    return torch.stack(rows)


def rows_not_finite() -> Tensor:
    """float32 [rows, 128] with one NaN or infinity each."""
    rows = rows_at_every_exponent(1).clone()
    rows[:, 40] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(len(rows))[
        : len(rows)
    ]
    return rows


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Which bytes differ, other than by the sign of a NaN."""
    differ = one.view(torch.uint8) != other.view(torch.uint8)
    return differ & ~(one.float().isnan() & other.float().isnan())


def compare_mx(x: Tensor, rule: str, to_mx: Callable[..., Any], modes: Any) -> dict[str, object]:
    """Ours and torchao's ``to_mx`` on the same rows."""
    theirs_scale, theirs = to_mx(x, torch.float8_e4m3fn, BLOCK, modes[rule.upper()])
    values, scales = ops.mx_quantise(x, 1, rule)
    back = ops.mx_dequantise(values, scales, 1)
    peer_back = ops.mx_dequantise(theirs, theirs_scale, 1)
    same = (scales.view(torch.uint8) == theirs_scale.view(torch.uint8)).repeat_interleave(BLOCK, 1)
    differ = apart(values, theirs)
    lowest = (scales.view(torch.uint8) == 0).repeat_interleave(BLOCK, 1)
    found: dict[str, object] = {
        "elements": x.numel(),
        "blocks": scales.numel(),
        "scales that differ": int(apart(scales, theirs_scale).sum()),
        "elements that differ": int(differ.sum()),
        "of them at the lowest scale": int((differ & lowest).sum()),
        "of them elsewhere, at equal scales": int((differ & ~lowest & same).sum()),
        "values read back that differ": int(
            ((back != peer_back) & ~(back.isnan() & peer_back.isnan())).sum()
        ),
    }
    if bool(x.isfinite().all()):
        for name, elements, factor in (
            ("ours", values, scales),
            ("torchao", theirs, theirs_scale),
        ):
            units = factor.float().double().repeat_interleave(BLOCK, 1)
            wrong = rounded_bytes(x.double() / units, "e4m3") != elements.view(torch.uint8)
            found[f"mis-rounded by {name} under its own scale"] = int(wrong.sum())
    return found


def compare_float8(x: Tensor, axis: int | None, dtype: torch.dtype, power: bool) -> dict[str, int]:
    """Ours and torchao's dynamic cast on the same rows; one tensor per row where no axis is."""
    utils = importlib.import_module("torchao.float8.float8_utils")
    config = importlib.import_module("torchao.float8.config")
    granularity = config.ScalingGranularity
    kind = granularity.TENSORWISE if axis is None else granularity.AXISWISE
    found = {"elements": 0, "scales that differ": 0, "elements that differ": 0}
    for tensor in x.unbind() if axis is None else (x,):
        scale = utils.tensor_to_scale(
            tensor,
            dtype,
            scaling_granularity=kind,
            axiswise_dim=axis,
            round_scales_to_power_of_2=power,
        )
        theirs = utils.to_fp8_saturated(tensor * scale, dtype)
        values, ours = ops.float8_quantise(tensor, dtype, axis, power)
        both_nan = ours.isnan() & scale.isnan()
        found["elements"] += tensor.numel()
        found["scales that differ"] += int(((ours != scale) & ~both_nan).sum())
        found["elements that differ"] += int(apart(values, theirs).sum())
    return found


def torchao_counts() -> dict[str, object]:
    """All comparisons with torchao; the reason where it is not there."""
    try:
        tensors = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
        config = importlib.import_module("torchao.prototype.mx_formats.config")
    except ImportError as error:
        return {"not compared": f"torchao cannot be imported: {error}"}
    finite, others = rows_at_every_exponent(), rows_not_finite()
    found: dict[str, object] = {"version": importlib.metadata.version("torchao")}
    for rule in ("floor", "rceil"):
        for name, x in (("finite", finite), ("NaN and infinity", others)):
            key = f"mxfp8 {rule}, {name}"
            found[key] = compare_mx(x, rule, tensors.to_mx, config.ScaleCalculationMode)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for name, axis, dtype, power in (
        ("tensor, e4m3", None, e4m3, False),
        ("tensor, e5m2", None, e5m2, False),
        ("row, e4m3", -1, e4m3, True),
    ):
        for data, x in (("finite", finite), ("NaN and infinity", others)):
            found[f"float8 {name}, {data}"] = compare_float8(x, axis, dtype, power)
    return found


def microxcaling_counts() -> dict[str, object]:
    """Values read back, against microxcaling's mxfp8, rounding to even; or why it is not there."""
    try:
        mx_ops = importlib.import_module("mx.mx_ops")
    except ImportError as error:
        return {"not compared": f"microxcaling cannot be imported: {error}"}
    x = rows_at_every_exponent()
    theirs = mx_ops._quantize_mx(
        x.clone(), 8, "fp8_e4m3", axes=[1], block_size=BLOCK, round="even", custom_cuda=False
    )
    values, scales = ops.mx_quantise(x, 1, "floor")
    back = ops.mx_dequantise(values, scales, 1)
    normal = (x.abs().amax(1, keepdim=True) >= 2.0**-110).expand_as(x)
    differ = (back != theirs) & ~(back.isnan() & theirs.isnan())
    return {
        "elements": x.numel(),
        "values read back that differ": int(differ.sum()),
        "of them in rows of at least 2^-110": int((differ & normal).sum()),
        "NaN or infinite of finite values": int((~theirs.isfinite()).sum()),
    }


def main() -> None:
    """Count, print and keep."""
    results = {"torchao": torchao_counts(), "microxcaling": microxcaling_counts()}
    for peer, counts in results.items():
        for name, found in counts.items():
            print(f"{peer}: {name}: {found}")
    print(keep("float8_peers", results))


if __name__ == "__main__":
    main()
