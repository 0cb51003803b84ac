"""The number formats that are compared: each is a spec of passes, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import graphopt

LOWER = "cleanup,precision{format=%s,policy=tf,cost=roofline%s}"
FIXED = -8  # exponent of the control: 8 bits behind the point, for every tensor


@dataclass(frozen=True)
class Format:
    """How a model is trained.

    Attributes:
        passes: what rewrites its step.
        scaled: whether the loss is scaled, by a `torch.amp.GradScaler`.
        exponent: exponent that every tensor keeps; ``None`` where Autoflex chooses them.
        nudge: relative change of the first weights.
    """

    passes: str
    scaled: bool = False
    exponent: int | None = None
    nudge: float = 0.0


# The policy lowers every operator that the rules allow, whether or not that is faster here.
FORMATS = {
    "fp32": Format("cleanup"),
    "bf16": Format(LOWER % ("bf16", "")),
    "fp16-scaled": Format(LOWER % ("fp16", ""), scaled=True),
    "fp16": Format(LOWER % ("fp16", "")),
    "flex16+5": Format("cleanup,flexpoint{exponent=5}"),
    "flex16+8": Format("cleanup,flexpoint{exponent=8}"),
}
# What the comparison is held against. Two trainings in float32 whose first weights differ in their
# last bits show how far any rounding moves a loss; one exponent for all shows what Autoflex is for.
CONTROLS = {
    "fp32-nudged": Format("cleanup", nudge=2.0**-22),
    "fixed-8.8": Format("cleanup,flexpoint{exponent=8}", exponent=FIXED),
}
ALL = {**FORMATS, **CONTROLS}


def prepare(model: nn.Module, format: Format) -> None:
    """Rewrite the model's steps."""
    if format.nudge:
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + format.nudge * torch.randn(p.shape, generator=draw))
    graphopt.optimize(model, passes=format.passes, backend="eager", verify="structure")


def hold_exponents(model: nn.Module, format: Format) -> None:
    """Undo what Autoflex has chosen, where the format has a fixed exponent; call before a step."""
    if format.exponent is None:
        return
    state = graphopt.state_dict(model)
    for name, values in state.items():
        if "exponents" in name:
            values.fill_(format.exponent)
    graphopt.load_state_dict(model, state)


def scaler_of(format: Format) -> torch.amp.GradScaler:
    """The scaler of the loss; it does nothing for formats without one."""
    return torch.amp.GradScaler("cpu", enabled=format.scaled)
