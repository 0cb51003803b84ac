"""The differential fuzzer: daily training code is as in eager, and what is not is found."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from graphopt.errors import MismatchError
from graphopt.model import surface
from graphopt.model.controller import Controller
from graphopt.testing import Layer, Scenario, Step, check_scenario, scenarios
from graphopt.testing.fuzz.around import AROUND
from graphopt.testing.fuzz.between import AFTER
from graphopt.testing.fuzz.scenario import KINDS, OUTPUTS, REFUSED_KINDS
from graphopt.testing.fuzz.uses import USES

# 2,000 take about twenty minutes: python -m graphopt.testing.fuzz --examples 2000
EXAMPLES = int(os.environ.get("GRAPHOPT_FUZZ_EXAMPLES", "20"))


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(scenarios())
def test_scenarios_are_equal_or_refused(scenario: Scenario) -> None:
    check_scenario(scenario)


# -- every habit once ------------------------------------------------------------------------------

ORDINARY = (Step("once", "sgd"), Step("once", "nothing", batch=2), Step("without_gradients"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str) -> None:
    layers = (Layer("Checks"), Layer(kind), Layer("Linear"))
    verdict = check_scenario(Scenario(layers, ORDINARY))
    assert (verdict.kind, verdict.steps, verdict.plain) == ("equal", 3, [])
    assert verdict.captures >= 2


@pytest.mark.parametrize("around", [name for name in AROUND if name != "backward_hook"])
def test_everything_around_a_layer(around: str) -> None:
    layers = (Layer("Linear"), Layer("Linear", around), Layer("Drops"))
    verdict = check_scenario(Scenario(layers, ORDINARY))
    assert (verdict.kind, verdict.steps, verdict.plain) == ("equal", 3, [])


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_what_is_refused(kind: str) -> None:
    verdict = check_scenario(Scenario((Layer(kind),), ORDINARY))
    assert verdict.kind == "refused"
    assert verdict.reason.startswith("[GO-C01] ")


@pytest.mark.parametrize("use", USES)
def test_every_use(use: str) -> None:
    layers = (Layer("Linear"), Layer("Normalised"), Layer("Drops"), Layer("CountsOnly"))
    steps = (Step("once"), Step(use, "nothing"), Step(use, "sgd", batch=2))
    # Every form of output with some of them; the random scenarios put all together.
    output = OUTPUTS[list(USES).index(use) % len(OUTPUTS)]
    assert check_scenario(Scenario(layers, steps, output)).kind == "equal"


@pytest.mark.parametrize("after", AFTER)
def test_everything_that_happens_between_steps(after: str) -> None:
    layers = (Layer("Linear"), Layer("Average"), Layer("Linear", "residual"))
    steps = (Step("once", after), Step("two_calls", after), Step("once"))
    for tied in (False, True):
        assert check_scenario(Scenario(layers, steps, tied=tied)).kind == "equal"


# -- faults are found ------------------------------------------------------------------------------

Call = Controller.__call__


class Faults:
    """What could go wrong; each takes the place of the controller's call."""

    @staticmethod
    def wrong_output(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        output = Call(self, model, args, kwargs)  # type: ignore[arg-type]
        return output * (1 + 1e-6) if isinstance(output, Tensor) else output

    @staticmethod
    def draws(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        torch.rand(1)
        return Call(self, model, args, kwargs)  # type: ignore[arg-type]

    @staticmethod
    def writes(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        model.parts[0].mean += 1  # type: ignore[union-attr, index, operator]
        return Call(self, model, args, kwargs)  # type: ignore[arg-type]

    @staticmethod
    def gives_gradients(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return Call(self, model, args, kwargs)  # type: ignore[arg-type]

    @staticmethod
    def keeps(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        model.parts[0].kept = 1  # type: ignore[union-attr, index, operator]
        return Call(self, model, args, kwargs)  # type: ignore[arg-type]

    @staticmethod
    def raises(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        raise AttributeError("'int' object has no attribute 'view'")

    @staticmethod
    def refuses_late(self: Controller, model: nn.Module, args: object, kwargs: object) -> object:
        Call(self, model, args, kwargs)  # type: ignore[arg-type]
        raise surface.ArgumentError("no")


@pytest.mark.parametrize("fault", [name for name in vars(Faults) if not name.startswith("_")])
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Scenario((Layer("Average"),), (Step(),))
    check_scenario(scenario)
    monkeypatch.setattr(Controller, "__call__", vars(Faults)[fault].__func__)
    with pytest.raises(MismatchError, match=r"(?s)step 0 of a scenario.*Scenario\(layers="):
        check_scenario(scenario)
