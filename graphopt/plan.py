"""What the runtime obeys: frozen data, convertible to JSON, decided before anything runs.

`Signature` names every input and output of a graph. `Plan` is what `optimize` decided for one
specialisation. Both are plain data, so a plan can be read, compared and hashed without a GPU and
without the model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from graphopt.curvature import Curvature
from graphopt.grouping import Grouping


class Role(StrEnum):
    """What an input or output of a graph is to the model.

    ``LOCAL`` is the gradient of this rank's own batch, beside the reduced ``GRAD``: what a step of
    gradient accumulation that does not communicate returns. ``STATISTIC`` is what the curvature is
    estimated from; only steps that renew the estimate compute it.
    """

    PARAM = "param"
    BUFFER = "buffer"
    INPUT = "input"
    TANGENT = "tangent"
    STATE = "state"
    OUTPUT = "output"
    GRAD = "grad"
    LOCAL = "local"
    MUTATION = "mutation"
    STATISTIC = "statistic"


class Phase(StrEnum):
    """The half of a training step that a node or an output belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


INPUT_ROLES = frozenset({Role.PARAM, Role.BUFFER, Role.INPUT, Role.TANGENT, Role.STATE})
OUTPUT_ROLES = frozenset({Role.OUTPUT, Role.GRAD, Role.LOCAL, Role.MUTATION, Role.STATISTIC})


@dataclass(frozen=True)
class Slot:
    """One input or output of a graph.

    Attributes:
        role: what it is.
        name: the qualified name of a parameter or buffer (``"layer1.conv.weight"``), the position
            of a plain input, output or tangent (``"0"``), the name of a pass's state. A ``GRAD`` or
            ``MUTATION`` output carries the name of the input it belongs to.
        phase: the half of the step that produces (output) or first consumes (input) it.
    """

    role: Role
    name: str
    phase: Phase = Phase.FORWARD

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True)
class Signature:
    """Roles and names of all inputs and outputs of a graph, in order.

    Forward outputs come before backward outputs. A ``MUTATION`` output is written back into the
    input of the same name when its half of the step has run.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    def __post_init__(self) -> None:
        phases = [slot.phase for slot in self.outputs]
        if phases != sorted(phases, key=list(Phase).index):
            raise ValueError("forward outputs must come before backward outputs")

    @property
    def num_forward_outputs(self) -> int:
        """Outputs of the forward half, mutations included."""
        return sum(slot.phase is Phase.FORWARD for slot in self.outputs)

    def input_index(self, role: Role, name: str) -> int:
        """Position of an input; raises ``KeyError`` when there is none."""
        return _index(self.inputs, role, name)

    def output_index(self, role: Role, name: str) -> int:
        """Position of an output; raises ``KeyError`` when there is none."""
        return _index(self.outputs, role, name)

    def names(self, role: Role) -> tuple[str, ...]:
        """Names of all inputs or outputs with this role, in order."""
        slots = self.inputs if role in INPUT_ROLES else self.outputs
        return tuple(slot.name for slot in slots if slot.role is role)


def _index(slots: tuple[Slot, ...], role: Role, name: str) -> int:
    for index, slot in enumerate(slots):
        if slot.role is role and slot.name == name:
            return index
    raise KeyError(f"{role} {name!r}")


@dataclass(frozen=True)
class OutputAlias:
    """An output of the model that is one of its inputs, or a view of one.

    Attributes:
        output: position among the model's outputs.
        input: position among the graph's inputs.
        size, stride, offset: geometry of the view; empty `size` and ``offset == -1`` for the input
            itself.
    """

    output: int
    input: int
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = -1


@dataclass(frozen=True)
class Plan:
    """Everything that was decided for one specialisation.

    Attributes:
        spec: the passes that ran, in the spec language.
        signature: inputs and outputs of the final graph.
        backend: ``"eager"`` or ``"inductor"``.
        gradient_sources: for each ``GRAD`` output, in order, the tangents it depends on. A gradient
            all of whose tangents are absent is absent, as in eager.
        aliases: outputs of the model that the graph does not compute.
        facts: what the passes provided.
        grouping: which gradients are reduced together; ``None`` where nothing is reduced.
        wire: what travels: ``"native"``, ``"bf16"`` or ``"int32"``.
        stale: whose reduced gradients a step returns: ``"none"`` its own, ``"double_buffer"`` and
            ``"lag"`` those of the step before.
        tangent_scale: factor on the incoming tangents of a backward that reduces; the mean over
            ranks is taken here, once, where the backward is linear in them.
        curvature: how gradients are preconditioned; ``None`` where they are not.
    """

    spec: str
    signature: Signature
    backend: str = "eager"
    gradient_sources: tuple[tuple[int, ...], ...] = ()
    aliases: tuple[OutputAlias, ...] = ()
    facts: tuple[str, ...] = field(default=())
    grouping: Grouping | None = None
    wire: str = "native"
    stale: str = "none"
    tangent_scale: float = 1.0
    curvature: Curvature | None = None

    def to_json(self) -> str:
        """The plan as JSON text with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        signature = data["signature"]
        return cls(
            spec=data["spec"],
            signature=Signature(
                inputs=tuple(_slot(s) for s in signature["inputs"]),
                outputs=tuple(_slot(s) for s in signature["outputs"]),
            ),
            backend=data["backend"],
            gradient_sources=tuple(tuple(s) for s in data["gradient_sources"]),
            aliases=tuple(
                OutputAlias(
                    a["output"], a["input"], tuple(a["size"]), tuple(a["stride"]), a["offset"]
                )
                for a in data["aliases"]
            ),
            facts=tuple(data["facts"]),
            grouping=Grouping.from_data(data["grouping"]) if data["grouping"] else None,
            wire=data["wire"],
            stale=data["stale"],
            tangent_scale=data["tangent_scale"],
            curvature=Curvature.from_data(data["curvature"]) if data["curvature"] else None,
        )

    @property
    def digest(self) -> str:
        """A hash that is equal on all ranks exactly when their plans are equal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def _slot(data: dict[str, str]) -> Slot:
    return Slot(Role(data["role"]), data["name"], Phase(data["phase"]))
