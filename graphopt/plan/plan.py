"""The plan: everything that was decided for one specialisation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.plan.grouping import Grouping
from graphopt.plan.kfac import Curvature
from graphopt.plan.signature import OutputAlias, Phase, Role, Signature, Slot


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
