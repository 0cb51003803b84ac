"""A scenario on PyTorch eager and through `optimize`: equal at every step, or clearly refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt.api import optimize
from graphopt.errors import GraphoptError, MismatchError
from graphopt.model.controller import controller_of
from graphopt.testing.fuzz.observe import difference, state_of
from graphopt.testing.fuzz.scenario import Scenario, Step
from graphopt.testing.fuzz.side import Side

# Of the largest gradient of a parameter: sums of a few terms in another order.
_ROUNDING = 1e-5

# Autocast keeps its cast of a weight, so that the gradients of all uses are summed in bfloat16.
_ROUNDING_OF_AUTOCAST = 2**-6


@dataclass
class Verdict:
    """How a scenario ended, where it did not fail.

    Attributes:
        kind: ``"equal"`` in every step; ``"refused"`` at one of them by an error of graphopt.
        reason: what it was refused with, its first line.
        steps: that were compared.
        rounded: steps whose gradients were off by rounding.
        captures: made by the model that the run ended with.
        plain: the warnings that a kind of call runs as plain PyTorch, their first lines.
    """

    kind: Literal["equal", "refused"] = "equal"
    reason: str = ""
    steps: int = 0
    rounded: int = 0
    captures: int = 0
    plain: list[str] = field(default_factory=list)


def check_scenario(scenario: Scenario, **options: Any) -> Verdict:
    """Run every step of a scenario on both sides and compare all that it leaves behind.

    Compared bit for bit: outputs, losses, gradients of parameters and inputs, parameters, buffers,
    what modules hold in their attributes, random streams, and the errors that calls raise. One
    thing may be off by rounding: gradients of parameters, because eager adds what several calls
    and several uses give in another order.

    Args:
        scenario: what is run.
        options: of `graphopt.optimize`; the eager backend is the default.

    Raises:
        MismatchError: a step differs, or graphopt failed in another way than by a refusal that
            leaves the model as it was. The message holds the scenario, as code.
    """
    expected, found = Side(scenario), Side(scenario)
    optimize(found.model, **({"backend": "eager"} | options))
    verdict = Verdict()
    for number, step in enumerate(scenario.steps):
        problem, have = "", None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            want, have = expected.call(step), found.call(step)
            if _more_than_eager(want, have):
                break
            if _refused(have):
                verdict.kind, verdict.reason = "refused", str(have).splitlines()[0]
                problem = found.trace
            else:
                problem = _errors(want, have)
                problem = problem or ("" if have else _left(expected, found, step, verdict))
            if verdict.kind == "equal" and not problem and have is None:
                want, have = expected.after(step), found.after(step)
                problem = _errors(want, have)
                problem = problem or difference(state_of(expected.model), state_of(found.model))
        if problem:
            raise _failure(scenario, number, problem) from have
        said = (str(w.message).splitlines()[0] for w in caught)
        verdict.plain += [text for text in said if "plain PyTorch" in text]
        verdict.steps += 1
        if have is not None:  # what eager's forward had changed by then does not count
            break
    controller = controller_of(found.model)
    verdict.captures = controller.made if controller else 0
    return verdict


def _left(expected: Side, found: Side, step: Step, verdict: Verdict) -> str:
    """What differs after a call; gradients that are off by rounding are made equal."""
    problem = difference(expected.left, found.left)
    rounding = _ROUNDING_OF_AUTOCAST if step.use == "autocast" else _ROUNDING
    if problem and not (problem := difference(expected.left, found.left, rounding)):
        verdict.rounded += 1
        for one, other in zip(expected.model.parameters(), found.model.parameters(), strict=True):
            if one.grad is not None and other.grad is not None:
                other.grad.copy_(one.grad)
    return problem


def _refused(error: Exception | None) -> bool:
    # The whole step is one node of autograd, so that it may need an output that eager does not.
    changed = "modified by an inplace operation" in str(error)
    return changed or (isinstance(error, GraphoptError) and not isinstance(error, MismatchError))


def _more_than_eager(want: Exception | None, have: Exception | None) -> bool:
    """Graphs know no checkpoints of the older kind, and so not what these refuse."""
    return have is None and "torch.utils.checkpoint is incompatible with .grad()" in str(want)


def _errors(want: Exception | None, have: Exception | None) -> str:
    """Whether both sides raised alike; the text of the error counts up to its first line."""
    if want is None and have is None:
        return ""
    if type(want) is type(have) and str(want).splitlines()[:1] == str(have).splitlines()[:1]:
        return ""
    shown = [f"{type(e).__name__}: {e}" if e else "no error" for e in (have, want)]
    return f"raised {shown[0][:800]}\ninstead of {shown[1][:300]}"


def _failure(scenario: Scenario, number: int, problem: str) -> MismatchError:
    return MismatchError(
        f"step {number} of a scenario is not as in PyTorch: {problem}\n{scenario}",
        hint="run check_scenario with this scenario to see it again",
    )
