"""What was done to a model: the steps of the pipeline, the backend, the verification, in words.

Everything here is frozen data. `Report.explain` is for a terminal, `Report.to_json` for programs,
and a notebook shows the same with sections that fold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from graphopt.passbase import Numerics, Outcome
from graphopt.plan import Plan
from graphopt.report_text import explain, to_html


@dataclass(frozen=True)
class Step:
    """What one pass of a pipeline did.

    Attributes:
        spec: the pass in the spec language.
        numerics: how far it may move the results.
        outcome: what was applied and what was declined.
        seconds: time of the pass itself.
        verify_seconds: time of checking the graph afterwards; on the first pass that ran, also of
            checking it before.
        nodes_before: size of the graph before.
        nodes_after: size of the graph after.
        skipped: why the pass did not run at all; empty if it ran.
    """

    spec: str
    numerics: Numerics
    outcome: Outcome
    seconds: float
    verify_seconds: float
    nodes_before: int
    nodes_after: int
    skipped: str = ""


@dataclass(frozen=True)
class BackendChoice:
    """What runs the graph, and why.

    Attributes:
        backend: ``"eager"`` or ``"inductor"``.
        requested: what the user asked for (``"auto"``).
        reason: one sentence.
        seconds: measured time of a step per backend; empty when nothing was measured.
    """

    backend: str
    requested: str
    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """How the graph's results compare with those of PyTorch eager.

    Attributes:
        level: what was asked for: ``"off"``, ``"structure"``, ``"eager"`` or ``"full"``.
        result: ``"bit-equal"``, ``"within tolerance"`` or ``"not run"``.
        worst_name: the output or gradient that is farthest off.
        worst_error: its error, relative to its largest magnitude.
        seconds: how long the comparison took.
    """

    level: str
    result: str
    worst_name: str = ""
    worst_error: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Specialisation:
    """One captured variant of a model.

    Attributes:
        signature: the inputs that it was captured for, in words.
        level: the level of its graph (``"joint"``).
        route: how it was captured (``"dynamo"``).
        capture_seconds: how long that took.
        steps: one per pass of the pipeline, in order.
        backend: what runs it.
        verification: how it was compared with eager.
        plan: what the runtime obeys.
        notes: what else the user should know.
    """

    signature: str
    level: str
    route: str
    capture_seconds: float
    steps: tuple[Step, ...]
    backend: BackendChoice
    verification: Verification
    plan: Plan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was done to one model.

    Attributes:
        model: the class of the model.
        spec: the pipeline in the spec language.
        specialisations: the captured variants, oldest first.
        notes: what concerns the model as a whole.
    """

    model: str
    spec: str
    specialisations: tuple[Specialisation, ...] = ()
    notes: tuple[str, ...] = ()

    def explain(self) -> str:
        """The report as text for a terminal."""
        return explain(self)

    def to_json(self) -> str:
        """The report as JSON with sorted keys; keys are those of the dataclasses.

        Numbers that JSON does not have (infinities) are strings.
        """
        return json.dumps(_strict(asdict(self)), sort_keys=True, indent=1, allow_nan=False)

    def _repr_html_(self) -> str:
        return to_html(self)


def _strict(value: object) -> object:
    """The value with only what strict JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return value
