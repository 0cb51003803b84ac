"""The number formats that are compared: each is a spec of passes, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import graphopt
from examples.flexpoint.half_on_cpu import HalfOnCpu
from graphopt import Pipeline


@dataclass(frozen=True)
class Format:
    """How a model is trained.

    Attributes:
        passes: what rewrites its steps.
        exponent: exponent that every tensor keeps; ``None`` where Autoflex chooses them.
        nudge: relative change of the first weights.
    """

    passes: str
    exponent: int | None = None
    nudge: float = 0.0


# This policy lowers every operator that the rules allow, whether or not that is faster here.
_ALL = "policy=tf,cost=roofline"
FORMATS = {
    "fp32": Format("cleanup"),
    "bf16": Format(f"cleanup,precision{{format=bf16,{_ALL}}}"),
    "fp16-scaled": Format(f"cleanup,precision{{format=fp16,{_ALL}}}"),
    "fp16": Format(f"cleanup,precision{{format=fp16,loss_scale=none,{_ALL}}}"),
    "flex16+5": Format("cleanup,flexpoint{exponent=5}"),
    "flex16+8": Format("cleanup,flexpoint{exponent=8}"),
}
# What these are held against. Two trainings in float32 whose first weights differ in their last
# bits show how far any rounding moves a loss. Weights that are flex tensors themselves are what the
# publication has. 8 bits behind the point for every tensor show what Autoflex is for.
CONTROLS = {
    "fp32-nudged": Format("cleanup", nudge=2.0**-22),
    "flex16+5-weights": Format("cleanup,flexpoint{exponent=5,master_weights=false}"),
    "fixed-8.8": Format("cleanup,flexpoint{exponent=8}", exponent=-8),
}
ALL = {**FORMATS, **CONTROLS}


def prepare(model: nn.Module, format: Format, *examples: Tensor) -> None:
    """Rewrite the model's steps in place.

    Args:
        model: in train mode.
        format: how.
        examples: the model's arguments in a step.
    """
    if format.nudge:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + format.nudge * torch.randn(p.shape, generator=draw))
    passes = Pipeline.parse(format.passes).passes
    if "fp16" in format.passes:
        passes += (HalfOnCpu(),)
    graphopt.optimize(model, examples, passes=passes, backend="eager", verify="structure")


def hold_exponents(model: nn.Module, format: Format) -> None:
    """Before a step, undo what Autoflex has chosen, where the format has one exponent for all."""
    if format.exponent is None:
        return
    state = graphopt.state_dict(model)
    for name, values in state.items():
        if name.startswith("flexpoint/exponents/"):
            values.fill_(format.exponent)
    graphopt.load_state_dict(model, state)


def statistics(*models: nn.Module) -> Mapping[str, float]:
    """What flexpoint has counted in these models; empty for other formats.

    Returns:
        ``saturated``, the share of all rounded elements; ``overflows``, the share of tensors and
        steps in which any was; ``bits``, the mean of log2 of the largest mantissa, of 15; ``NaN``,
        their number.
    """
    states = [graphopt.state_dict(model) for model in models]
    counted = [v for s in states for k, v in s.items() if k.startswith("flexpoint/counters/")]
    if not counted:
        return {}
    bits = sum(v.sum() for s in states for k, v in s.items() if k.startswith("flexpoint/bits/"))
    _, saturated, nan, elements, seen, overflows = torch.cat(counted).sum(0).tolist()
    return {
        "saturated": saturated / max(1, elements),
        "overflows": overflows / max(1, seen),
        "bits": float(bits) / max(1, seen),
        "NaN": nan,
    }
