"""What the runtime obeys: frozen data, convertible to JSON, decided before anything runs.

`Signature` names every input and output of a graph. `Plan` is what `optimize` decided for one
specialisation. Both are plain data, so a plan can be read, compared and hashed without a GPU and
without the model.
"""

from graphopt.plan.part import PlanPart
from graphopt.plan.plan import Plan
from graphopt.plan.signature import (
    INPUT_ROLES,
    OUTPUT_ROLES,
    OutputAlias,
    Phase,
    Role,
    Signature,
    Slot,
)

__all__ = [
    "INPUT_ROLES",
    "OUTPUT_ROLES",
    "OutputAlias",
    "Phase",
    "Plan",
    "PlanPart",
    "Role",
    "Signature",
    "Slot",
]
