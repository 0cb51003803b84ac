"""Which backward a plan asks for: plain, reducing over ranks, preconditioning, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.plan import Plan
from graphopt.runtime import kernels
from graphopt.runtime.accumulation import Accumulation, Alone
from graphopt.runtime.engine.partition import Halves
from graphopt.runtime.group_gradients.reduction import Backwards, Run, backwards
from graphopt.runtime.kfac.backward import Preconditioning
from graphopt.runtime.kfac.share import share


def backward_of(
    halves: Halves,
    plan: Plan,
    state: dict[str, Tensor],
    workers: Any,
    compile: Callable[[fx.GraphModule], Run],
) -> Backwards:
    """What the engine calls for the backward of a step.

    Args:
        halves: of the step.
        plan: what to obey.
        state: tensors that passes own; preconditioning keeps its own there.
        workers: the ranks, or what counts micro-batches on one.
        compile: makes an executable of a form of the backward half.
    """
    if plan.curvature is None:
        return backwards(halves, plan, workers, compile)
    if torch.cuda.is_available():
        kernels.register()
    accumulation: Accumulation = workers or Alone()
    return Preconditioning(
        halves,
        plan,
        accumulation,
        share(plan, accumulation),
        state,
        lambda halves, plan, compile: backwards(halves, plan, workers, compile),
        compile,
    )
