"""Engines that turn the halves of a step into callables: one module per backend."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor, fx

from graphopt.plan import Plan
from graphopt.runtime.engine.inference import InferenceEngine
from graphopt.runtime.engine.training import TrainingEngine
from graphopt.runtime.group_gradients.reduction import Synchronisation

BACKENDS = ("eager", "inductor")


def build(
    module: fx.GraphModule,
    plan: Plan,
    state: Mapping[str, Tensor],
    workers: Synchronisation | None = None,
) -> TrainingEngine | InferenceEngine:
    """An engine for `plan.backend`; the module is copied, not changed.

    Args:
        module: a joint or inference module.
        plan: what to obey.
        state: tensors of ``STATE`` inputs.
        workers: the ranks, where the plan reduces gradients.
    """
    assert plan.backend in BACKENDS
    backend = import_module(f"graphopt.runtime.backends.{plan.backend}")
    engine: TrainingEngine | InferenceEngine = backend.build(module, plan, state, workers)
    return engine
