"""Engines that turn the halves of a step into callables: one module per backend."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from torch import Tensor, fx

from graphopt.plan import Plan
from graphopt.runtime.engine import InferenceEngine, TrainingEngine

BACKENDS = ("eager", "inductor")


def build(
    module: fx.GraphModule, plan: Plan, state: Mapping[str, Tensor]
) -> TrainingEngine | InferenceEngine:
    """An engine for `plan.backend`; the module is copied, not changed."""
    assert plan.backend in BACKENDS
    backend = import_module(f"graphopt.runtime.backends.{plan.backend}")
    engine: TrainingEngine | InferenceEngine = backend.build(module, plan, state)
    return engine
