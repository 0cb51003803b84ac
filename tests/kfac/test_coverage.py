"""Every parameter of 22 kinds of models is preconditioned, and rightly, in double precision."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import graphopt
from graphopt.model.surface import report
from tests.kfac.brute_force import expected
from tests.kfac.cases import NAMES, case
from tests.kfac.explicit import compute

DAMPING = 1e-3
SPEC = "kfac{damping=1e-3,interval=1,solver=factored}"


def trained(name: str, spec: str = SPEC) -> nn.Module:
    """The optimized model after one backward."""
    one = case(name)
    model = graphopt.optimize(copy.deepcopy(one.model), passes=spec, backend="eager")
    one.loss(model(one.x)).backward()
    return model


def preconditioned(model: nn.Module) -> set[str]:
    """Names of parameters that the report lists as preconditioned."""
    (only,) = report(model).specialisations
    (step,) = [s for s in only.steps if s.spec.startswith("kfac")]
    return {a.site for a in step.outcome.applied if a.what.startswith("preconditioned by")}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dense_solution(name: str) -> None:
    wanted = expected(*compute(case(name)), DAMPING)
    model = trained(name)
    assert set(wanted) == dict(model.named_parameters()).keys()
    for parameter, p in model.named_parameters():
        assert p.grad is not None
        error = (p.grad - wanted[parameter]).norm() / wanted[parameter].norm()
        assert error < 1e-8, f"{parameter}: relative error {error:.1e}"


# Those of matrix products alone; `attention` has positions first within.
REDUCIBLE = ("mlp", "checkpoint", "in_place", "shared_linear", "raw_parameters", "fused_attention")


@pytest.mark.parametrize("name", [*REDUCIBLE, "attention", "layer_norm"])
def test_positions_are_reduced_first(name: str) -> None:
    wanted = expected(*compute(case(name)), DAMPING, reduce=True)
    model = trained(name, SPEC.replace("solver=", "sharing=reduce,solver="))
    for parameter, p in model.named_parameters():
        assert p.grad is not None
        error = (p.grad - wanted[parameter]).norm() / wanted[parameter].norm()
        assert error < 1e-8, f"{parameter}: relative error {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_listed(name: str) -> None:
    model = trained(name)
    assert preconditioned(model) == dict(model.named_parameters()).keys()
    text = model.explain()  # type: ignore[operator]
    assert all(parameter in text for parameter, _ in model.named_parameters())
