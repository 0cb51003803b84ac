"""What was done to a model: the steps of the pipeline, the backend, the verification, in words.

Everything here is frozen data. `Report.explain` is for a terminal, `Report.to_json` for programs,
and a notebook shows the same with sections that fold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from graphopt.model.entries import PlainKind, Specialisation
from graphopt.model.explain import explain, to_html

if TYPE_CHECKING:
    from graphopt.runtime.validation import Form


@dataclass(frozen=True)
class Report:
    """What was done to one model.

    Attributes:
        model: the class of the model.
        spec: the pipeline in the spec language.
        specialisations: the captured variants, oldest first.
        notes: what concerns the model as a whole.
        plain: the kinds of calls that run as plain PyTorch, oldest first.
        forms: of steps that send, add up or compute statistics, and whether they were compared.
    """

    model: str
    spec: str
    specialisations: tuple[Specialisation, ...] = ()
    notes: tuple[str, ...] = ()
    plain: tuple[PlainKind, ...] = ()
    forms: tuple[Form, ...] = ()

    def explain(self) -> str:
        """The report as text for a terminal."""
        return explain(
            self.model, self.spec, self.specialisations, self.notes, self.plain, self.forms
        )

    def to_json(self) -> str:
        """The report as JSON with sorted keys; keys are those of the dataclasses.

        Numbers that JSON does not have (infinities) are strings.
        """
        data: Any = _strict(asdict(self))
        for one, entry in zip(data["specialisations"], self.specialisations, strict=True):
            one["plan"] = json.loads(entry.plan.to_json())
        return json.dumps(data, sort_keys=True, indent=1, allow_nan=False)

    def _repr_html_(self) -> str:
        return to_html(
            self.model, self.spec, self.specialisations, self.notes, self.plain, self.forms
        )


def _strict(value: object) -> object:
    """The value with only what strict JSON has."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return value
